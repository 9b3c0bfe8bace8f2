"""The bodies of `POST /v1/act`: JSON with images as base64, or msgpack as openpi packs it."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from defi_platform.serve.observation import PolicySpec, image_keys
from defi_platform.serve.observation_keys import ObservationKeys, find
from defi_platform.serve.protocols import openpi
from defi_platform.serve.protocols.messages import MAX_DEPTH, MAX_ITEMS, ProtocolError
from defi_platform.serve.refusals import (
    BusyError,
    DeadlineError,
    ObservationError,
    PolicyFailure,
    Refusal,
)
from defi_platform.serve.sessions.session import SessionAnswer
from defi_platform.serve.wording import shown

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
_MSGPACK_NAMES: Final = (MSGPACK, "application/x-msgpack", "application/vnd.msgpack")

_SURROGATE: Final = re.compile("[\ud800-\udfff]")

STATUS: Final[dict[type[Refusal], int]] = {
    ProtocolError: 400,
    ObservationError: 422,
    BusyError: 503,
    DeadlineError: 504,
    PolicyFailure: 500,
}
"""HTTP status by the reason of a refusal; 400 for others."""


def read_body(body: bytes, content_type: str) -> Any:
    """The content of a request.

    Args:
        body: as it came.
        content_type: of the request; JSON where it says nothing.

    Raises:
        ProtocolError: the body is not in that format, or the format is not known.
    """
    kind = media_type(content_type) or JSON
    if kind in _MSGPACK_NAMES:
        return openpi.unpack(body)
    if kind != JSON:
        raise ProtocolError(f"Content-Type is {shown(kind)}; send {JSON} or {MSGPACK}.")
    # What a text could become is counted before it does: base64 has none of these characters.
    if body.count(b"{") + body.count(b"[") + body.count(b",") > MAX_ITEMS:
        raise ProtocolError(f"a message holds at most {MAX_ITEMS} values; this one has more.")
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"body of {len(body)} bytes is not JSON: {shown(str(error), 120)}") from error
    _check(content)
    return content


def with_images(message: Any, spec: PolicySpec, keys: ObservationKeys) -> Any:
    """An observation whose images, where they are base64 text, are bytes.

    Args:
        message: from JSON.
        spec: of the policy.
        keys: where an observation's parts are.

    Raises:
        ObservationError: an image is no base64.
    """
    if not isinstance(message, Mapping):
        return message
    decoded: dict[Any, Any] = {}
    for key in image_keys(message, spec, keys):
        image = find(message, key)
        if isinstance(image, str):
            head, comma, data = image.partition(",") if image[:5] == "data:" else ("", "", image)
            if head and not (comma and head.endswith(";base64")):
                raise ObservationError(f"'{key}' is a data URL without base64.")
            try:
                decoded[key] = base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError) as error:
                raise ObservationError(
                    f"'{key}' is a text that is not base64 of a PNG or JPEG file: {shown(str(error), 80)}"
                ) from error
    return {**message, **decoded} if decoded else message


def reply_body(answer: Mapping[str, Any], content_type: str, accept: str) -> tuple[bytes, str]:
    """The body of a response and its type: what the client accepts, else what it sent.

    Args:
        answer: maps, lists, plain values and arrays.
        content_type: of the request.
        accept: header of the request.
    """
    accepted = media_type(accept)
    if accepted in _MSGPACK_NAMES or (accepted != JSON and media_type(content_type) in _MSGPACK_NAMES):
        return openpi.pack(answer), MSGPACK
    return json.dumps(answer, default=lambda array: array.tolist(), allow_nan=False).encode(), JSON


def reply_of(answers: list[SessionAnswer], digest: str, *, batch: bool) -> dict[str, Any]:
    """The answer map of a request.

    Args:
        answers: of its observations.
        digest: of the policy.
        batch: whether it was a batch.
    """
    replies = [answer.reply(digest) for answer in answers]
    return {"batch": replies} if batch else replies[0]


def status(refusal: Refusal) -> int:
    """The HTTP status of a refusal."""
    return next((code for kind, code in STATUS.items() if isinstance(refusal, kind)), 400)


def media_type(header: str) -> str:
    """The first media type of a header, without its parameters, in lower case."""
    return header.partition(",")[0].partition(";")[0].strip().lower()


def _check(content: Any) -> None:
    """Checks what msgpack cannot be in the first place, or is checked for by `messages.check`.

    Raises:
        ProtocolError: maps and lists too deep within each other, or a text with half of a surrogate pair, which has no
            UTF-8: neither a tokenizer nor a message back to the client could take it.
    """
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value, *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
                raise ProtocolError(f"{shown(value)} holds half of a surrogate pair, which is no character.")
        if not inner:
            return
        level = inner
    raise ProtocolError(f"maps and lists lie at most {MAX_DEPTH} deep within each other.")


def _no_constant(name: str) -> float:
    raise ProtocolError(f"{name} is no number of JSON.")
