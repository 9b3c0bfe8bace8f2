"""The vla-eval websocket protocol: typed msgpack messages, with episodes that begin and end.

A message is {"type", "payload", "seq", "timestamp"}. The client speaks first (HELLO), says when an episode begins and
ends (no answer), and gets an ACTION or an ERROR with the `seq` of its OBSERVATION. An array travels as
{"__ndarray__": True, "data", "dtype", "shape"}, an image as {"__image__": True, "format": raw | png | jpeg, "data", ...}.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgpack
import numpy as np

from defi_models import __version__
from defi_platform.serve.observation_keys import NAMES
from defi_platform.serve.protocols import messages
from defi_platform.serve.protocols.messages import ProtocolError
from defi_platform.serve.protocols.wire import Reply, Wire
from defi_platform.serve.refusals import Refusal
from defi_platform.serve.sessions.decoding import unpacked
from defi_platform.serve.sessions.options import STEP
from defi_platform.serve.wording import described, shown

if TYPE_CHECKING:
    pass

PROTOCOL: Final = "vla-eval-websocket"
VERSION: Final = 1
HELLO, OBSERVATION, ACTION = "hello", "observation", "action"
EPISODE_START, EPISODE_END, ERROR = "episode_start", "episode_end", "error"


def pack(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    """Encodes a message.

    Args:
        kind: its type.
        payload: plain values and arrays.
        seq: of the message that it answers.
    """
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    packed: bytes = msgpack.packb(message, default=_pack_array)
    return packed


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """Decodes a message; encoded images stay the bytes of their file.

    Args:
        data: one message.

    Raises:
        ProtocolError: truncated, not msgpack, over the limits of `messages`, or with a bad array or image.
    """
    return messages.unpack(data, _unpack_array)


class VlaEvalWire(Wire):
    """vla-eval's protocol: one action for each observation, unless the options of the session say otherwise."""

    answers = STEP
    default_keys = NAMES["vla_eval"]
    _in_episode = False
    _seq = 0

    async def answer(self, message: bytes | str) -> Reply:
        """The HELLO, ACTION or ERROR that answers a message, or nothing.

        Args:
            message: msgpack of one message.
        """
        self._seq = 0
        try:
            if isinstance(message, str):
                raise ProtocolError("a message is binary (msgpack); got a text message.")
            content = await unpacked(unpack, message)
            kind, payload = self._read(content)
            if kind == HELLO:
                return Reply(pack(HELLO, self._hello(), self._seq))
            if kind == EPISODE_START:
                if self.leaving:
                    return Reply(hand_over=True)
                self.session.start_episode()
                self._in_episode = True
                return Reply()
            if kind == EPISODE_END:
                self.session.end_episode()
                self._in_episode = False
                return Reply()
            if kind == ERROR:
                return Reply()
            return await self._act(payload)
        except Refusal as refusal:
            return self.refused(refusal)

    async def turn_away(self, message: bytes | str, refusal: Refusal) -> Reply:
        """An ERROR with the `seq` of the message. The beginning and the end of an episode are taken in nevertheless.

        Args:
            message: as it came.
            refusal: why it gets no answer.
        """
        self._seq = 0
        if isinstance(message, bytes):
            try:
                kind, _ = self._read(await unpacked(unpack, message))
            except Refusal as error:
                return self.refused(error)
            if kind in (EPISODE_START, EPISODE_END, ERROR):  # their clients wait for no answer
                return await self.answer(message)
        return self.refused(refusal)

    def refuse(self, refusal: Refusal) -> Reply:
        """An ERROR with the `seq` of the message.

        Args:
            refusal: why a message gets no action.
        """
        return Reply(pack(ERROR, {"error": str(refusal), "reason": refusal.reason}, self._seq))

    @property
    def between_episodes(self) -> bool:
        """Before EPISODE_START, after EPISODE_END."""
        return not self._in_episode

    def state(self) -> dict[str, Any]:
        """The session's state, and whether an episode is running."""
        return {"session": self.session.state(), "in_episode": self._in_episode}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on with the session.

        Args:
            state: of `state()`.
        """
        self.session.resume(state["session"])
        self._in_episode = state["in_episode"]

    def _read(self, content: Any) -> tuple[str, Any]:
        if not isinstance(content, Mapping):
            raise ProtocolError(f"a message is a map with type, payload and seq; got {described(content)}.")
        seq = content.get("seq")
        if type(seq) is int:
            self._seq = seq
        kind = content.get("type")
        kinds = (HELLO, EPISODE_START, OBSERVATION, EPISODE_END, ERROR)
        if not isinstance(kind, str) or kind not in kinds:
            raise ProtocolError(f"'type' is {shown(kind)}; there is {', '.join(kinds)}.")
        payload = content.get("payload")
        if not isinstance(payload, Mapping):
            raise ProtocolError(f"'payload' is {described(payload)}; expected a map.")
        return kind, payload

    async def _act(self, payload: Mapping[Any, Any]) -> Reply:
        self._in_episode = True
        # Benchmarks send "states"; the convention that they describe says "state".
        own = self.settings.keys is None and "states" not in payload and "state" in payload
        self.session.keys = replace(self.keys, state=("state",)) if own else self.keys
        answer = await self.session.answer(payload)
        return Reply(pack(ACTION, answer.reply(self.service.digest), self._seq))

    def _hello(self) -> dict[str, Any]:
        spec = self.service.spec
        cameras = " ".join(spec.cameras)
        wanted = {
            "send_state": spec.state_dim > 0,
            "send_wrist_image": len(spec.cameras) > 1 or "wrist" in cameras or "gripper" in cameras,
        }
        return {
            "harness_version": f"defi-platform {__version__}",
            "protocol_version": VERSION,
            "model_server": "DeFIPolicy",
            "capabilities": {},
            # Benchmarks leave out what no policy asks for.
            "observation_params": {name: True for name, wish in wanted.items() if wish},
            **self.service.metadata(),
        }


def _pack_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {
            "__ndarray__": True,
            "data": value.tobytes(),
            "dtype": value.dtype.str,
            "shape": list(value.shape),
        }
    raise TypeError(f"msgpack has no form for a {type(value).__name__}")


def _unpack_array(entries: dict[Any, Any]) -> Any:
    if "__image__" in entries:
        form, data = entries.get("format"), entries.get("data")
        if form == "raw":
            return messages.array(data, entries.get("dtype"), entries.get("shape"))
        if form not in ("png", "jpeg") or not isinstance(data, bytes):
            raise ProtocolError(f"bad image: 'format' is {shown(form)}, 'data' {described(data)}.")
        return data
    if "__ndarray__" in entries:
        return messages.array(entries.get("data"), entries.get("dtype"), entries.get("shape"))
    return entries
