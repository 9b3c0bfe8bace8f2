"""XPolicyLab's websocket protocol: msgpack frames, each request answered by a frame with its `message_id`.

A frame is {"message_type", "message_id", "evaluation_id", "action_case_id", "trial_id", "repeat_index", "step",
"sent_at", "payload"}. Arrays travel as msgpack-numpy writes them: {b"nd": True, b"type": "<f4", b"kind": b"", b"shape",
b"data"}, NumPy scalars with b"nd": False. Source: client_server/ws/protocol of github.com/XPolicyLab/XPolicyLab.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgpack
import numpy as np
from numpy.typing import NDArray

from defi_platform.serve.observation_keys import ABSENT, NAMES, ObservationKeys, find
from defi_platform.serve.protocols import messages
from defi_platform.serve.protocols.messages import ProtocolError
from defi_platform.serve.protocols.wire import Reply, Wire
from defi_platform.serve.refusals import ObservationError, Refusal
from defi_platform.serve.sessions.decoding import unpacked
from defi_platform.serve.wording import described, shown

if TYPE_CHECKING:
    pass

PROTOCOL: Final = "xpolicylab-websocket"
ANSWERS: Final = {
    "hello": "hello_ack",
    "prepare_case": "prepare_case_ack",
    "reset": "reset_result",
    "infer": "infer_result",
    "trial_end": "trial_end_ack",
    "heartbeat": "heartbeat_ack",
}
"""Types of requests, and of their answers."""
CLOSE: Final = "close"
NORMAL_CLOSURE: Final = 1000

_ECHOED = ("message_id", "evaluation_id", "action_case_id", "trial_id", "repeat_index", "step")
_MAX_ECHO = 200
_TWO_ARMS = tuple(f"state/{side}_{part}_joint_state" for side in ("left", "right") for part in ("arm", "ee"))


def pack(frame: Mapping[str, Any]) -> bytes:
    """Encodes a frame; arrays may sit anywhere in it."""
    packed: bytes = msgpack.packb(frame, default=_pack_array)
    return packed


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """Decodes a frame.

    Args:
        data: one frame.

    Raises:
        ProtocolError: truncated, not msgpack, over the limits of `messages`, or with a bad array.
    """
    return messages.unpack(data, _unpack_array)


class XPolicyLabWire(Wire):
    """XPolicyLab's protocol: whole chunks, as lists of actions."""

    default_keys = NAMES["xpolicylab"]
    _in_trial = False
    _echo: Mapping[str, Any] = MappingProxyType({})

    async def answer(self, message: bytes | str) -> Reply:
        """The frame that answers a request.

        Args:
            message: msgpack of one frame.
        """
        self._echo = {"message_id": "", "evaluation_id": ""}
        try:
            if isinstance(message, str):
                raise ProtocolError("a frame is one binary message (msgpack); got a text message.")
            kind, payload = self._read(await unpacked(unpack, message))
            if kind == CLOSE:
                return Reply(close=(NORMAL_CLOSURE, "closed as asked"))
            if kind in ("reset", "prepare_case") and self.leaving:
                return Reply(hand_over=True)
            return Reply(self._frame(ANSWERS[kind], await self._answer(kind, payload)))
        except Refusal as refusal:
            return self.refused(refusal)

    async def turn_away(self, message: bytes | str, refusal: Refusal) -> Reply:
        """An error frame with the `message_id` of the request: its client would wait for another in vain.

        Args:
            message: as it came.
            refusal: why it gets no answer.
        """
        self._echo = {"message_id": "", "evaluation_id": ""}
        if isinstance(message, bytes):
            try:
                self._read(await unpacked(unpack, message))
            except Refusal as error:
                return self.refused(error)
        return self.refused(refusal)

    def refuse(self, refusal: Refusal) -> Reply:
        """An error frame with the `message_id` of the request.

        Args:
            refusal: why a request gets no answer.
        """
        code = "invalid_frame" if isinstance(refusal, ProtocolError) else "infer_failed"
        words = {"code": code, "message": str(refusal), "details": {"reason": refusal.reason}}
        return Reply(self._frame("error", words))

    @property
    def between_episodes(self) -> bool:
        """Before the first request of a trial, after its `trial_end`."""
        return not self._in_trial

    def state(self) -> dict[str, Any]:
        """The session's state, and whether a trial is running."""
        return {"session": self.session.state(), "in_trial": self._in_trial}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on with the session.

        Args:
            state: of `state()`.
        """
        self.session.resume(state["session"])
        self._in_trial = state["in_trial"]

    def _read(self, frame: Any) -> tuple[str, Mapping[Any, Any]]:
        if not isinstance(frame, Mapping):
            raise ProtocolError(f"a frame is a map, got {described(frame)}.")
        for name in _ECHOED:
            value = frame.get(name)
            if value is None:
                continue
            if not isinstance(value, str | int) or (isinstance(value, str) and len(value) > _MAX_ECHO):
                raise ProtocolError(
                    f"'{name}' is {shown(value)}; expected an integer or up to {_MAX_ECHO} characters."
                )
            self._echo = {**self._echo, name: value}
        kind = frame.get("message_type")
        if not isinstance(kind, str) or kind not in (*ANSWERS, CLOSE):
            raise ProtocolError(f"'message_type' is {shown(kind)}; there is {', '.join((*ANSWERS, CLOSE))}.")
        if not self._echo["message_id"]:
            raise ProtocolError("'message_id' is missing: the client finds the answer by it.")
        payload = frame.get("payload") or {}
        if not isinstance(payload, Mapping):
            raise ProtocolError(f"'payload' is {described(payload)}; expected a map.")
        return kind, payload

    async def _answer(self, kind: str, payload: Mapping[Any, Any]) -> dict[str, Any]:
        if kind == "hello":
            return {"ok": True, "server": "defi_platform", "policy": self.service.metadata()}
        if kind == "infer":
            return await self._infer(payload)
        if kind == "reset":
            self.session.start_episode()
            self._in_trial = True
        elif kind == "trial_end":
            self.session.end_episode()
            self._in_trial = False
        return {"ok": True}

    async def _infer(self, payload: Mapping[Any, Any]) -> dict[str, Any]:
        observation = payload.get("observation")
        if not isinstance(observation, Mapping):
            raise ObservationError(f"'observation' is {described(observation)}; expected a map.")
        self._in_trial = True
        self.session.keys = self._keys_of(observation)
        answer = await self.session.answer(observation)
        chunk = answer.actions if answer.actions.ndim == 2 else answer.actions[None]
        reply = answer.reply(self.service.digest)
        return reply | {"actions": self._actions(chunk), "latency_ms": answer.timing["total_ms"]}

    def _keys_of(self, observation: Mapping[Any, Any]) -> ObservationKeys:
        two = self.settings.keys is None and find(observation, _TWO_ARMS[0]) is not ABSENT
        return replace(self.keys, state=_TWO_ARMS) if two else self.keys

    def _actions(self, chunk: NDArray[np.float32]) -> list[Any]:
        parts = self.settings.actions
        if not parts:
            return list(chunk)
        ends = np.cumsum(list(parts.values()))[:-1]
        return [dict(zip(parts, np.split(action, ends), strict=True)) for action in chunk]

    def _frame(self, kind: str, payload: Mapping[str, Any]) -> bytes:
        frame = {
            "message_type": kind,
            "action_case_id": None,
            "trial_id": None,
            "repeat_index": None,
            "step": 0,
        }
        sent_at = datetime.now(UTC).isoformat()
        return pack({**frame, **self._echo, "sent_at": sent_at, "payload": payload})


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": value.tobytes(),
        }
    raise TypeError(f"msgpack has no form for a {type(value).__name__}")


def _unpack_array(entries: dict[Any, Any]) -> Any:
    if b"nd" not in entries:
        return entries
    if entries.get(b"kind") not in (None, b"", ""):
        raise ProtocolError("bad array: structured and object arrays are not read.")
    data, dtype = entries.get(b"data"), entries.get(b"type")
    if entries[b"nd"] is True:
        return messages.array(data, dtype, entries.get(b"shape"))
    return messages.array(data, dtype, [1])[0]
