"""The dialogue of openpi's websocket: a greeting, then an answer or an error text for each observation.

Beyond what openpi's server does: `{"batch": [observation, ...]}` is answered by `{"batch": [answer, ...]}`; the optional
key `episode` says when another episode begins; `seed`, `slack_ms` and `deadline_ms` as in every protocol.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from defi_platform.serve.protocols import openpi
from defi_platform.serve.protocols.wire import Reply, Wire
from defi_platform.serve.refusals import ObservationError, Refusal
from defi_platform.serve.sessions.decoding import unpacked

if TYPE_CHECKING:
    pass

BATCH_KEY: Final = "batch"
MAX_BATCH: Final = 64
"""Observations in one frame."""


class OpenpiWire(Wire):
    """openpi's protocol. openpi-client takes a text message for an error and bytes for an answer."""

    def greeting(self) -> bytes:
        """The metadata map."""
        return openpi.pack({"protocol": openpi.PROTOCOL, **self.service.metadata()})

    async def answer(self, message: bytes | str) -> Reply:
        """The action map of an observation, or the text of what is wrong with it.

        Args:
            message: msgpack of one observation, or of a batch of them.
        """
        arrived = time.perf_counter()
        try:
            if isinstance(message, str):
                raise openpi.ProtocolError(
                    "an observation is one binary message (msgpack); got a text message."
                )
            content = await unpacked(openpi.unpack, message)
            if self.leaving and self.session.observed and self.session.begins_episode(content):
                return Reply(hand_over=True)
            if isinstance(content, dict) and BATCH_KEY in content:
                return await self._answer_batch(content)
            answer = (await self.session.answer(content)).reply(self.service.digest)
        except Refusal as refusal:
            return self.refused(refusal)
        answer["server_timing"]["total_ms"] = (time.perf_counter() - arrived) * 1e3
        return Reply(openpi.pack(answer))

    @property
    def between_episodes(self) -> bool:
        """Before the first observation: an episode is the connection, or one value of the key `episode`."""
        return not self.session.observed

    def state(self) -> dict[str, Any]:
        """The session's state."""
        return self.session.state()

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on with the session.

        Args:
            state: of `state()`.
        """
        self.session.resume(state)

    async def _answer_batch(self, frame: dict[Any, Any]) -> Reply:
        observations = batch_of(frame)
        self.spend(len(observations) - 1)
        answers = await self.session.answer_batch(observations)
        return Reply(openpi.pack({BATCH_KEY: [answer.reply(self.service.digest) for answer in answers]}))


def batch_of(frame: dict[Any, Any]) -> list[Any]:
    """The observations of a batch frame.

    Raises:
        ObservationError: it is not a map of the one key "batch" to a list of 1 to `MAX_BATCH`.
    """
    observations = frame[BATCH_KEY]
    if not isinstance(observations, list) or not 0 < len(observations) <= MAX_BATCH or len(frame) > 1:
        raise ObservationError(
            f"a batch is a map of the one key '{BATCH_KEY}' to a list of 1 to {MAX_BATCH} observations."
        )
    return observations
