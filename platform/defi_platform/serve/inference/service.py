"""The one way from an observation to its actions, whatever protocol it came in."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.errors import one_line
from defi_platform.serve.batching import GreedyBatcher
from defi_platform.serve.inference.load import LoadMeter, ServiceLoad
from defi_platform.serve.observation import Answer, Observation, PolicySpec
from defi_platform.serve.refusals import BusyError, PolicyFailure, Refusal

Forward = Callable[[list[Observation]], Sequence[NDArray[Any]]]
"""One forward pass: n observations -> n arrays (chunk, A) float32 in raw units. Never called twice at a time."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Limits of a service."""

    max_batch_size: int = 8
    """Observations of different clients in one forward pass, at most."""
    queue_size: int = 256
    """Observations that wait for a forward pass, at most; the next one is refused as busy."""


class ActionService:
    """Batches observations of independent clients, checks what the policy makes of them, and counts.

    All coroutines run on one event loop; the forward pass runs in a thread of its own.
    """

    def __init__(
        self, forward: Forward, spec: PolicySpec, digest: str, settings: ServiceSettings | None = None
    ) -> None:
        """Prepares a service; nothing runs yet.

        Args:
            forward: the policy.
            spec: its inputs and outputs.
            digest: of its folder; names the policy in greetings and answers.
            settings: the defaults when None.
        """
        self.spec = spec
        self.digest = digest
        self._settings = settings or ServiceSettings()
        self._batcher = GreedyBatcher(forward, self._settings.max_batch_size)
        self._meter = LoadMeter()
        self._in_flight = 0

    def metadata(self) -> dict[str, Any]:
        """The greeting of every protocol, as plain values."""
        return {**self.spec.metadata(), "policy_digest": self.digest}

    async def act(
        self,
        observation: Observation,
        *,
        session: Hashable | None = None,
        slack_ms: float | None = None,
        deadline_ms: float | None = None,
    ) -> Answer:
        """Actions for one observation, computed together with whatever else is waiting.

        Args:
            observation: checked against the policy.
            session: whose it is: anything that stays the same from one observation of a client to its next.
                The batcher learns from it how soon that client comes back after an answer.
            slack_ms: the answer may take this long; company is waited for only inside it.
            deadline_ms: after this long an answer is of no use.

        Returns:
            Finite actions.

        Raises:
            Refusal: `BusyError`, `DeadlineError` or `PolicyFailure`, counted.
        """
        try:
            return await self._act(observation)
        except Refusal as refusal:
            self.count(refusal)
            raise

    def count(self, refusal: Refusal) -> None:
        """Counts a refusal that was decided before the service was asked, such as an `ObservationError`."""
        self._meter.refusals[refusal.reason] += 1

    def snapshot(self) -> ServiceLoad:
        """The load now."""
        return self._meter.snapshot(in_flight=self._in_flight, queued=0, oldest_wait_ms=0.0)

    async def _act(self, observation: Observation) -> Answer:
        arrived = time.perf_counter()
        if self._in_flight >= self._settings.queue_size:
            raise BusyError(f"{self._in_flight} observations are waiting (limits.queue_size)", 1.0)
        self._in_flight += 1
        try:
            answer = await self._batcher.submit(observation)
        except Exception as error:
            raise PolicyFailure(
                f"the policy failed on this observation: {type(error).__name__}: {one_line(error)}"
            ) from error
        finally:
            self._in_flight -= 1
        if not np.isfinite(answer.actions).all():
            raise PolicyFailure("the policy gave actions that are not finite numbers for this observation.")
        self._meter.answer(
            answer.queue_ms, answer.infer_ms, (time.perf_counter() - arrived) * 1e3, answer.batch_size
        )
        return answer
