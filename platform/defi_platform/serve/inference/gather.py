"""The decision when a forward pass starts: at once, or once the clients that were just answered are back.

A forward pass of n observations takes c(n) = a + b n. Clients in closed loop send their next observation r seconds
after an answer. A server that always starts at once splits n of them into two groups that take turns, a cycle of
2 a + b n; a server that waits until all are back has one group and a cycle of a + b n + r. So waiting pays exactly
when r < a, and then it is bounded by a. Robots that carry out a chunk before they come back have r > a and are never
waited for; nor is anybody whose return time is not known yet. a, b and r are measured all the time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

_MOST_SESSIONS = 4096
_SPREAD = 0.1
_LEAST_GAIN = 0.1
"""Of the time of a pass of all, which waiting must save: below it, it only makes those wait who come in between."""
_PAYS = 0.1
_LEAST_PASSES = 8
_SMALLEST_PAUSE_S = 0.005
_SMALLEST_CAP = 2


class LinearFit:
    """y = intercept + slope * x by least squares over samples that lose weight as new ones come.

    The slope stays as it was while x does not vary: then only the intercept can be seen.
    """

    def __init__(self, memory: float) -> None:
        """Starts without samples.

        Args:
            memory: samples that count, roughly.
        """
        self._keep = 1.0 - 1.0 / memory
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.slope = 0.0
        self.samples = 0
        self.slope_known = False

    def add(self, x: float, y: float) -> None:
        """Adds a sample, both values >= 0."""
        keep = self._keep
        self._weight = keep * self._weight + 1.0
        self._x, self._y = keep * self._x + x, keep * self._y + y
        self._xx, self._xy = keep * self._xx + x * x, keep * self._xy + x * y
        self.samples += 1
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        if variance > (_SPREAD * mean_x) ** 2:
            covariance = self._xy / self._weight - mean_x * mean_y
            self.slope = max(0.0, covariance / variance)
            self.slope_known = True
        if mean_x > 0:
            self.slope = min(self.slope, mean_y / mean_x)

    @property
    def intercept(self) -> float:
        """The value at 0; never negative."""
        if not self._weight:
            return 0.0
        return max(0.0, (self._y - self.slope * self._x) / self._weight)

    def at(self, x: float) -> float:
        """The predicted y; 0 without samples."""
        return self.intercept + self.slope * x


@dataclass(slots=True)
class _Group:
    """The sessions that one forward pass answered."""

    at: float
    back: int = 0


@dataclass(slots=True)
class _Session:
    return_s: float | None = None
    group: _Group | None = None


class GatherRule:
    """Measured cost of forward passes and return times of clients, and the decision to wait that follows from them.

    Pure: times are arguments, in seconds of any one clock.
    """

    def __init__(self, max_batch_size: int) -> None:
        """Starts without knowledge: everything starts at once.

        Args:
            max_batch_size: observations per forward pass, at most.
        """
        self._max = max_batch_size
        self.cost = LinearFit(memory=50)
        """Seconds of a forward pass over its observations."""
        self.returns = LinearFit(memory=200)
        """Seconds until the k-th client of a group is back, over k."""
        self._sessions: OrderedDict[Hashable, _Session] = OrderedDict()
        self._away: dict[Hashable, float] = {}
        """Answered sessions with a known return time -> when they will be back."""
        self._expected: dict[Hashable, float] = {}
        """Sessions that will be back soon -> when they are overdue; oldest first."""

    @property
    def fixed_s(self) -> float:
        """Seconds of a forward pass that do not depend on its size (a), as far as they are known.

        Before two sizes have been seen, half of what a pass takes.
        """
        if self.cost.slope_known:
            return self.cost.intercept
        return 0.5 * self.cost.at(1)

    @property
    def best_size(self) -> int:
        """Observations per pass beyond which a larger batch saves less than a tenth of an observation's time."""
        slope = self.cost.slope
        if not self.cost.slope_known or self.cost.samples < _LEAST_PASSES or slope <= 0:
            return self._max
        pays = math.ceil(self.cost.intercept / (_PAYS * slope))
        return min(self._max, max(_SMALLEST_CAP, pays))

    def warmed(self, seconds: Mapping[int, float]) -> None:
        """Learns from the warm-up, whose times are no accidents: enough to limit the first clients' batches.

        Args:
            seconds: of a pass, by its observations.
        """
        for _ in range(math.ceil(_LEAST_PASSES / max(1, len(seconds)))):
            for size, took in seconds.items():
                self.cost.add(size, took)

    def passed(self, size: int, seconds: float) -> None:
        """Learns from a forward pass of `size` observations."""
        if self.cost.samples >= _LEAST_PASSES:
            # A pause of the machine is not a property of the policy.
            seconds = min(seconds, 3.0 * self.cost.at(size))
        self.cost.add(size, seconds)

    def arrived(self, session: Hashable, now: float) -> None:
        """Learns from an observation of a session."""
        self._expected.pop(session, None)
        self._away.pop(session, None)
        known = self._sessions.get(session)
        if known is None:
            known = self._sessions[session] = _Session()
            if len(self._sessions) > _MOST_SESSIONS:
                forgotten, _ = self._sessions.popitem(last=False)
                self._expected.pop(forgotten, None)
                self._away.pop(forgotten, None)
        self._sessions.move_to_end(session)
        group, known.group = known.group, None
        if group is None:
            return
        took = now - group.at
        if took < 3.0 * self.fixed_s:
            group.back += 1
            self.returns.add(group.back, took)
        if known.return_s is None:
            known.return_s = took
        else:
            # One late return is a pause of the machine; several are a slower client.
            known.return_s = 0.7 * known.return_s + 0.3 * min(took, 3.0 * known.return_s + _SMALLEST_PAUSE_S)

    def answered(self, sessions: Iterable[Hashable], now: float) -> None:
        """Learns that a pass has ended; `sessions` are those it answered."""
        group = _Group(now)
        soon = []
        for session in sessions:
            known = self._sessions.get(session)
            if known is None:
                continue
            known.group = group
            if known.return_s is not None:
                self._away[session] = now + known.return_s
                if known.return_s < self.fixed_s:
                    soon.append(session)
        overdue = now + min(self.fixed_s, 2.0 * self.returns.at(len(soon)) + 0.002)
        for session in soon:
            self._expected.pop(session, None)
            self._expected[session] = overdue

    def wait_until(
        self, now: float, queued: int, since: float, latest_start: float, *, all_slack: bool
    ) -> float | None:
        """Whether to wait for company, with the device free.

        Args:
            now: the time.
            queued: observations that could start, at least 1.
            since: when the device was free and the first of them there.
            latest_start: when a pass must start for all of them to be in time; infinite where none says so.
            all_slack: every one of them allows a later answer.

        Returns:
            None: start now. A time: ask again at the next arrival, at that time at the latest.
        """
        largest = self.best_size
        if queued >= largest or latest_start <= now:
            return None
        until = self._wait_for_group(now, queued, since, largest)
        if all_slack:
            until = max(until, self._wait_in_slack(now, latest_start))
        until = min(until, latest_start)
        return until if until > now else None

    def _wait_for_group(self, now: float, queued: int, since: float, largest: int) -> float:
        while self._expected:
            session, overdue = next(iter(self._expected.items()))
            if overdue > now:
                break
            del self._expected[session]
        expected = len(self._expected)
        passes_saved = 1 + math.ceil(expected / largest) - math.ceil((queued + expected) / largest)
        if not expected or not passes_saved:
            return now
        gain_s = self.fixed_s - self.returns.at(queued + expected)
        if gain_s <= _LEAST_GAIN * self.cost.at(queued + expected):
            return now
        return min(since + self.fixed_s, max(self._expected.values()))

    def _wait_in_slack(self, now: float, latest_start: float) -> float:
        """The last return that is predicted before `latest_start`, with some time for the prediction's error."""
        # Those who did not come back when they were to: looked at once, however many clients have left for good.
        for session in [session for session, back in self._away.items() if back <= now]:
            del self._away[session]
        last = now
        for session, back in self._away.items():
            if back < latest_start:
                last = max(last, back + 0.1 * (self._sessions[session].return_s or 0.0))
        return last
