"""The dialogue of openpi's websocket: a greeting, then an answer or an error text for each observation."""

from __future__ import annotations

import time
from typing import Any

from defi_platform.serve.observation import ObservationError, read_observation
from defi_platform.serve.protocols import openpi
from defi_platform.serve.protocols.wire import Reply, Wire


class OpenpiWire(Wire):
    """openpi's protocol. openpi-client takes a text message for an error and bytes for an answer."""

    _episode: Any = None
    _observed = False

    def greeting(self) -> bytes:
        """The metadata map."""
        return openpi.pack({"protocol": openpi.PROTOCOL, **self.service.metadata()})

    async def answer(self, message: bytes | str) -> Reply:
        """The action map of an observation, or the text of what is wrong with it.

        Args:
            message: msgpack of one observation.
        """
        arrived = time.perf_counter()
        if isinstance(message, str):
            return Reply("an observation is one binary message (msgpack); got a text message.")
        try:
            observation = read_observation(openpi.unpack(message), self.service.spec)
            answer = await self.service.act(observation)
        except (openpi.ProtocolError, ObservationError) as error:
            return Reply(str(error))
        self._observed = True
        reply: dict[str, Any] = {
            "actions": answer.actions,
            "seed": observation.seed,
            "policy_digest": self.service.digest,
            "server_timing": {
                "queue_ms": answer.queue_ms,
                "infer_ms": answer.infer_ms,
                "batch_size": answer.batch_size,
                "total_ms": (time.perf_counter() - arrived) * 1e3,
            },
        }
        if observation.ignored:
            reply["ignored"] = list(observation.ignored)
        return Reply(openpi.pack(reply))

    @property
    def between_episodes(self) -> bool:
        """Before the first observation: an episode is the connection, or one value of the key `episode`."""
        return not self._observed

    def state(self) -> dict[str, Any]:
        """Whether its episode has begun."""
        return {"observed": self._observed}

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on with the episode.

        Args:
            state: of `state()`.
        """
        self._observed = bool(state.get("observed"))
