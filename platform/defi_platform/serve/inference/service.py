"""The one way from an observation to its actions, whatever protocol it came in."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defi_platform.config import ServeConfig
from defi_platform.errors import ServeError, one_line
from defi_platform.serve.acting import inference_of
from defi_platform.serve.inference.action_check import ActionCheck
from defi_platform.serve.inference.batcher import Batched, Batcher
from defi_platform.serve.inference.forward_thread import Forward, ForwardThread, WarmUp
from defi_platform.serve.inference.gather import GatherRule
from defi_platform.serve.inference.load import LoadMeter, ServiceLoad
from defi_platform.serve.observation import Answer, Observation, PolicySpec
from defi_platform.serve.refusals import BusyError, ObservationError, PolicyFailure, Refusal

log = logging.getLogger("ray.serve")

LONGEST_MS = 3_600_000.0
"""Of `slack_ms` and `deadline_ms`, at most."""


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Limits of a service."""

    max_batch_size: int = 64
    """Observations of different clients in one forward pass, at most."""
    queue_size: int = 256
    """Observations that wait for a forward pass, at most; the next one is refused as busy."""
    queue_wait_s: float = 30.0
    """Predicted seconds that an observation waits for its forward pass, at most."""
    action_margin: float | None = 1.0
    """How far an action may lie outside its range in the training data, in widths of that range; None: anywhere."""
    stuck_after_s: float = 120.0
    """Seconds after which a forward pass that has not ended makes the replica unhealthy."""
    inference: Mapping[str, Any] | None = None
    """How actions are computed, for the greeting; see `acting.inference_of`. None: it does not say."""

    @classmethod
    def of(cls, config: ServeConfig) -> ServiceSettings:
        """The settings that a configuration of serving says."""
        limits = config.limits
        return cls(
            max_batch_size=config.max_batch_size,
            queue_size=limits.queue_size,
            queue_wait_s=limits.queue_wait_s,
            action_margin=limits.action_margin,
            inference=inference_of(config.model),
        )


class ActionService:
    """Batches observations of independent clients, checks what the policy makes of them, and counts.

    All coroutines run on one event loop; the forward pass runs in a thread of its own.
    """

    def __init__(
        self,
        forward: Forward,
        spec: PolicySpec,
        digest: str,
        settings: ServiceSettings | None = None,
        *,
        warm_up: Callable[[], WarmUp] | None = None,
    ) -> None:
        """Prepares a service, and returns once it is warm.

        Args:
            forward: the policy.
            spec: its inputs and outputs.
            digest: of its folder; names the policy in greetings and answers.
            settings: the defaults when None.
            warm_up: run once, in the thread of the forward passes; None: the first clients do it.
        """
        self.spec = spec
        self.digest = digest
        self.meter = LoadMeter()
        """Counts; its `observer` sees every answer."""
        self._settings = settings or ServiceSettings()
        thread = ForwardThread(forward)
        warm = thread.run(warm_up) if warm_up is not None else WarmUp({}, self._settings.max_batch_size)
        self._rule = GatherRule(min(warm.largest, self._settings.max_batch_size))
        self._rule.warmed(warm.seconds)
        self._batcher = Batcher(
            thread,
            self._rule,
            queue_size=self._settings.queue_size,
            queue_wait_s=self._settings.queue_wait_s,
        )
        self._check = ActionCheck(spec, self._settings.action_margin)
        self._in_flight = 0
        self._failed_since_success = 0

    def metadata(self) -> dict[str, Any]:
        """The greeting of every protocol, as plain values."""
        inference = self._settings.inference
        said = {"inference": dict(inference)} if inference else {}
        return {**self.spec.metadata(), "policy_digest": self.digest, **said}

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
            deadline_ms: after this long an answer is of no use, and a refusal is sent in its place.

        Returns:
            Finite actions, not far outside their range in the training data.

        Raises:
            Refusal: `BusyError`, `DeadlineError` or `PolicyFailure`, counted; `ObservationError` for times that are
                none, counted by whoever asked like every other of its kind.
        """
        arrived = asyncio.get_running_loop().time()
        slack_s, deadline_s = _seconds("slack_ms", slack_ms), _seconds("deadline_ms", deadline_ms)
        self._in_flight += 1
        try:
            batched = await self._batcher.submit(observation, session, slack_s, deadline_s)
            actions = self._checked(batched)
        except Refusal as refusal:
            self.count(refusal)
            raise
        finally:
            self._in_flight -= 1
        answer = Answer(actions, batched.queue_s * 1e3, batched.infer_s * 1e3, batched.batch_size)
        total_s = asyncio.get_running_loop().time() - arrived
        self.meter.answer(answer.queue_ms, answer.infer_ms, total_s * 1e3, answer.batch_size)
        return answer

    def count(self, refusal: Refusal) -> None:
        """Counts a refusal that was decided before the service was asked, such as an `ObservationError`."""
        self.meter.refusals[refusal.reason] += 1

    def decoded(self, milliseconds: float) -> None:
        """Notes how long it took to read an observation: its images decoded and resized."""
        if self.meter.decode_observer is not None:
            self.meter.decode_observer(milliseconds)

    def snapshot(self) -> ServiceLoad:
        """The load now; callable from any thread."""
        queue = self._batcher.state()
        load = self.meter.snapshot(
            in_flight=self._in_flight,
            queued=queue.queued,
            oldest_wait_ms=queue.oldest_wait_s * 1e3,
            running_for_s=queue.running_for_s,
        )
        largest = self._rule.best_size
        return replace(
            load,
            late_ms=queue.late_s * 1e3,
            largest_batch=largest,
            largest_batch_ms=self._rule.cost.at(largest) * 1e3,
            each_ms=self._rule.cost.slope * 1e3,
        )

    async def check_health(self, probe: Observation | None = None) -> None:
        """Finds out whether the policy still works; to be called now and then.

        Args:
            probe: an observation that must work; tried when all since the last success have failed.

        Raises:
            ServeError: a pass does not end, or the probe fails as well: the process must be replaced.
        """
        running_for_s = self._batcher.state().running_for_s
        if running_for_s > self._settings.stuck_after_s:
            raise ServeError(f"a forward pass has been running for {running_for_s:.0f} s.")
        if probe is None or not self._failed_since_success:
            return
        try:
            batched = await self._batcher.submit(probe)
        except BusyError:  # the queue is full of other observations, which show it just as well
            return
        if isinstance(batched.outcome, Exception):
            raise ServeError(
                f"the policy fails on every observation: {type(batched.outcome).__name__}: {one_line(batched.outcome)}"
            )
        self._failed_since_success = 0

    def _checked(self, batched: Batched) -> np.ndarray:
        outcome = batched.outcome
        if isinstance(outcome, Exception):
            self._failed_since_success += 1
            log.warning("no action for an observation: %s: %s", type(outcome).__name__, one_line(outcome))
            raise PolicyFailure(
                f"the policy failed on this observation: {type(outcome).__name__}: {one_line(outcome)}"
            ) from outcome
        self._failed_since_success = 0
        self._check(outcome)
        return outcome


def _seconds(key: str, milliseconds: float | None) -> float | None:
    """A time that a client set, in seconds.

    Raises:
        ObservationError: it is no positive number of a sensible size.
    """
    if milliseconds is None:
        return None
    number = isinstance(milliseconds, int | float | np.integer | np.floating)
    if (
        not number
        or isinstance(milliseconds, bool)
        or not math.isfinite(milliseconds)
        or not 0 <= milliseconds <= LONGEST_MS
        or (key == "deadline_ms" and not milliseconds)
    ):
        raise ObservationError(
            f"'{key}' is {str(milliseconds)[:40]}; expected milliseconds, at most {LONGEST_MS:.0f}"
            f"{' and more than 0' if key == 'deadline_ms' else ''}."
        )
    return float(milliseconds) / 1e3
