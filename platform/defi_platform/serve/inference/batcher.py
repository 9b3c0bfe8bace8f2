"""Batches of the observations of independent clients: who goes into the next forward pass, and when it starts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from defi_platform.serve.inference.forward_thread import PassResult
from defi_platform.serve.inference.gather import GatherRule
from defi_platform.serve.observation import Observation
from defi_platform.serve.refusals import BusyError, DeadlineError

_SLACK_MARGIN = 1.2
"""A pass starts early enough to end inside the slack even if it takes this many times as long as predicted."""


_BELIEVED_S = 1.0
_BELIEVED_PASSES = 10.0
"""An observation is refused because its pass would take too long only while that has been measured: this many seconds,
and this many times such a pass, after the last one."""


class Device(Protocol):
    """Whatever runs forward passes: `ForwardThread`, or a model of one in a simulation."""

    def start(self, observations: list[Observation], done: Callable[[PassResult], None]) -> None:
        """Starts a batch; `done` is called on the running loop."""


@dataclass(eq=False, slots=True)
class _Pending:
    observation: Observation
    session: Hashable
    answer: asyncio.Future[Batched]
    arrived: float
    latest_answer: float
    """Inside its slack, infinite where it has none."""
    deadline: float
    """When its answer is of no use any more; infinite where it has none."""
    timer: asyncio.TimerHandle | None = None

    @property
    def urgency(self) -> float:
        """The order in which observations start where not all can: by arrival, later with slack."""
        return self.arrived if math.isinf(self.latest_answer) else self.latest_answer


@dataclass(frozen=True)
class Batched:
    """The result of one observation in a batch."""

    outcome: NDArray[Any] | Exception
    """Actions as the policy gave them, or its error."""
    queue_s: float
    """Seconds from arrival to the start of the pass."""
    infer_s: float
    """Seconds of the pass."""
    batch_size: int
    """Observations in it."""


@dataclass(frozen=True)
class QueueState:
    """One moment of the queue."""

    running_for_s: float
    """Seconds that the running pass has taken; 0: none runs."""
    oldest_wait_s: float
    """Seconds that the oldest queued observation has waited."""
    late_s: float
    """Seconds that the most urgent one has waited for the device, beyond its slack."""
    queued: int
    """Observations that wait."""


class Batcher:
    """The queue in front of a device. Times are those of the event loop, on which everything here runs."""

    def __init__(self, device: Device, rule: GatherRule, *, queue_size: int, queue_wait_s: float) -> None:
        """Prepares an empty queue.

        Args:
            device: runs the passes, one at a time.
            rule: decides when a pass starts.
            queue_size: observations that wait, at most.
            queue_wait_s: predicted wait of an observation, at most.
        """
        self._device = device
        self._rule = rule
        self._queue_size = queue_size
        self._queue_wait_s = queue_wait_s
        self._queue: list[_Pending] = []
        self._running: list[_Pending] = []
        self._now: Callable[[], float] = lambda: (
            0.0
        )  # the clock of the loop that the first observation comes on
        self._free_since = 0.0
        self._pass_started = 0.0
        self._last_pass_s = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def state(self) -> QueueState:
        """The queue now; callable from any thread."""
        queue, now, busy = list(self._queue), self._now(), bool(self._running)
        return QueueState(
            running_for_s=now - self._pass_started if busy else 0.0,
            oldest_wait_s=now - queue[0].arrived if queue else 0.0,
            # With the device free, an observation waits for company: not for want of a device.
            late_s=max(0.0, now - min(each.urgency for each in queue)) if queue and busy else 0.0,
            queued=len(queue),
        )

    async def submit(
        self,
        observation: Observation,
        session: Hashable | None = None,
        slack_s: float | None = None,
        deadline_s: float | None = None,
    ) -> Batched:
        """Queues an observation and waits for what becomes of it.

        Args:
            observation: for the device.
            session: see `ActionService.act`.
            slack_s: see `ActionService.act`.
            deadline_s: see `ActionService.act`.

        Raises:
            BusyError: the queue is full or too slow.
            DeadlineError: the deadline passed or cannot be kept.
        """
        loop = asyncio.get_running_loop()
        self._now = loop.time
        now = loop.time()
        self._free_since = self._free_since or now
        self._refuse_if_busy(now)
        pending = _Pending(
            observation,
            session,
            loop.create_future(),
            arrived=now,
            latest_answer=math.inf if slack_s is None else now + slack_s,
            deadline=math.inf if deadline_s is None else now + deadline_s,
        )
        if session is not None:
            self._rule.arrived(session, now)
        if deadline_s is not None:
            pending.timer = loop.call_at(pending.deadline, self._expire, pending, deadline_s)
        self._queue.append(pending)
        self._start_or_wait()
        try:
            return await pending.answer
        finally:
            if pending.timer is not None:
                pending.timer.cancel()
            if pending in self._queue:  # cancelled: its client has gone
                self._queue.remove(pending)
                self._start_or_wait()

    def _refuse_if_busy(self, now: float) -> None:
        largest = self._rule.best_size
        if len(self._queue) < min(largest, self._queue_size):
            return
        a_pass = self._rule.cost.at(largest)
        wait_s = len(self._queue) // largest * a_pass
        if self._running:
            wait_s += max(0.0, self._rule.cost.at(len(self._running)) - (now - self._pass_started))
        if len(self._queue) >= self._queue_size:
            raise BusyError(
                f"{len(self._queue)} observations are waiting, the most that may (limits.queue_size).",
                max(wait_s / 2, 0.1),
            )
        if wait_s > self._queue_wait_s:
            raise BusyError(
                f"the wait would be {wait_s:.1f} s, and at most {self._queue_wait_s:g} s are allowed "
                "(limits.queue_wait_s).",
                max(wait_s - self._queue_wait_s, 0.1),
            )

    def _expire(self, pending: _Pending, deadline_s: float) -> None:
        if not pending.answer.done():
            where = "in the queue" if pending in self._queue else "in the forward pass"
            pending.answer.set_exception(
                DeadlineError(
                    f"no answer within {deadline_s * 1e3:g} ms (deadline_ms): it was still {where}."
                )
            )

    def _start_or_wait(self) -> None:
        """Starts the next pass, or sets a timer to think again, with the device free and somebody there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running or not self._queue:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        # An answer that is due before its pass could end holds up nobody. Where nothing has run for a while, passes may
        # have become quicker meanwhile, and only a pass can show it.
        shortest_s = min(self._rule.cost.at(1), self._last_pass_s)
        believed = now - self._free_since < max(_BELIEVED_S, _BELIEVED_PASSES * shortest_s)
        earliest_end = now + (shortest_s if believed else 0.0)
        for pending in [pending for pending in self._queue if pending.deadline < earliest_end]:
            self._queue.remove(pending)
            if not pending.answer.done():
                limit_ms = (pending.deadline - pending.arrived) * 1e3
                pending.answer.set_exception(
                    DeadlineError(
                        f"no answer within {limit_ms:g} ms (deadline_ms): its forward pass would end too late."
                    )
                )
        self._queue = [pending for pending in self._queue if not pending.answer.done()]
        if not self._queue:
            return
        limits = [min(p.latest_answer, p.deadline) for p in self._queue]
        a_pass = self._rule.cost.at(min(len(self._queue) + 1, self._rule.best_size))
        until = self._rule.wait_until(
            now,
            len(self._queue),
            since=max(self._free_since, self._queue[0].arrived),
            latest_start=min(limits) - _SLACK_MARGIN * a_pass,
            all_slack=not any(math.isinf(pending.latest_answer) for pending in self._queue),
        )
        if until is None:
            self._start(now)
        else:
            self._timer = loop.call_at(until, self._start_or_wait)

    def _start(self, now: float) -> None:
        size = self._rule.best_size
        if len(self._queue) > size:
            first = sorted(self._queue, key=lambda pending: pending.urgency)[:size]
            chosen = set(map(id, first))
            self._queue = [pending for pending in self._queue if id(pending) not in chosen]
        else:
            first, self._queue = self._queue, []
        self._running, self._pass_started = first, now
        self._device.start([pending.observation for pending in first], self._done)

    def _done(self, result: PassResult) -> None:
        now = asyncio.get_running_loop().time()
        batch, self._running = self._running, []
        self._free_since = now
        self._last_pass_s = now - self._pass_started
        if result.whole:
            # By the clock of the loop: what it costs to hand a batch over and back is part of a pass.
            self._rule.passed(len(batch), self._last_pass_s)
        self._rule.answered((p.session for p in batch if p.session is not None), now)
        for pending, outcome in zip(batch, result.outcomes, strict=True):
            if not pending.answer.done():
                queue_s = self._pass_started - pending.arrived
                pending.answer.set_result(Batched(outcome, queue_s, result.seconds, len(batch)))
        self._start_or_wait()
