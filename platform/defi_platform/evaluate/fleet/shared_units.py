"""The units of an evaluation on which several drivers may work: who takes which, what is finished, when it is enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from defi_platform.evaluate.episode import Rollout
from defi_platform.evaluate.fleet.actor_pool import nearest
from defi_platform.evaluate.fleet.stop_rule import Decision, StopRule, decide
from defi_platform.evaluate.store.episodes import EpisodeStore
from defi_platform.retry import Clock
from defi_platform.storage.leases import Leases

REFRESH_S = 5.0
"""Seconds between two looks at what other drivers have finished; ten times as long as a look takes, where that is more."""


class SharedUnits:
    """The choice of an actor pool's next unit, among drivers that share a store."""

    def __init__(
        self,
        store: EpisodeStore,
        leases: Leases,
        blocks: Sequence[Sequence[Rollout]],
        *,
        retries: int,
        rule: StopRule | None = None,
        workers: int = 1,
        clock: Clock = time,
    ):
        """Prepares the units; nothing is taken yet.

        Args:
            store: of the episodes, refreshed.
            leases: of this driver.
            blocks: all units in their fixed order; the units of one seed together where there is a rule.
            retries: tries of a unit after the first before it is left out.
            rule: after whose answer the evaluation ends.
            workers: of this driver; with a rule so many units beyond the first unfinished block may be begun.
            clock: by which looks at the store are apart.
        """
        self.on_found: Callable[[Rollout], None] = lambda unit: None
        """Called for a unit that another driver has finished."""
        self._store, self._leases, self._blocks = store, leases, blocks
        self._retries, self._rule, self._clock = retries, rule, clock
        self._ahead = workers
        self._next_look = clock.monotonic()
        self._elsewhere: dict[str, float] = {}

    def name(self, unit: Rollout) -> str:
        """The unit's name in the store."""
        return self._store.unit(unit.arm, unit.task, unit.seed)

    def row(self, unit: Rollout) -> dict[str, Any] | None:
        """The row of a finished unit; None for others."""
        return self._store.rows.get(self.name(unit))

    def is_left_out(self, unit: Rollout) -> bool:
        """Whether the unit's simulators have failed too often, in all drivers together."""
        name = self.name(unit)
        return name not in self._store.rows and len(self._store.faults.get(name, ())) > self._retries

    def is_open(self, unit: Rollout) -> bool:
        """Whether the unit is still to be done."""
        return self.row(unit) is None and not self.is_left_out(unit)

    def decision(self) -> Decision | None:
        """The state of the test; None without a rule."""
        if self._rule is None:
            return None
        blocks: list[list[bool | None] | None] = []
        for block in self._blocks:
            if any(map(self.is_open, block)):
                break
            rows = [self.row(unit) for unit in block if unit.arm == "policy"]
            blocks.append([None if row is None else bool(row["success"]) for row in rows])
        return decide(self._rule, blocks)

    def table(self) -> list[Rollout]:
        """The units that the results are of: all, or with a rule those up to its answer."""
        decision = self.decision()
        blocks = self._blocks[: decision.blocks] if decision and decision.found else self._blocks
        return [unit for block in blocks for unit in block]

    def is_enough(self) -> bool:
        """Whether the rule has its answer."""
        decision = self.decision()
        return decision is not None and decision.found is not None

    def remaining(self, units: Sequence[Rollout]) -> list[Rollout]:
        """The units that are still to be done; looks at the store now and then. See `actor_pool.Choice`."""
        if self.is_enough():
            return []
        if (start := self._clock.monotonic()) >= self._next_look:
            self._store.refresh()
            now = self._clock.monotonic()
            self._next_look = now + max(REFRESH_S, 10 * (now - start))
        left = []
        for unit in units:
            if self.is_open(unit):
                left.append(unit)
            elif self.row(unit) is not None:
                self.on_found(unit)
        return [] if self.is_enough() else left

    def take(self, units: Sequence[Rollout], last_task: str | None, busy_tasks: list[str]) -> Rollout | None:
        """Takes a unit that no other driver has. See `actor_pool.Choice`.

        Args:
            units: in their order.
            last_task: of the idle actor.
            busy_tasks: of the units that are being worked on.
        """
        now = self._clock.monotonic()
        free = [unit for unit in self._window(units) if self._elsewhere.get(self.name(unit), 0.0) <= now]
        while free:
            unit = nearest(free, last_task, busy_tasks)
            free.remove(unit)
            name = self.name(unit)
            if not self._leases.take(name):
                self._elsewhere[name] = now + REFRESH_S
            elif self._store.look_up(name) is None:  # finished before the lease was free
                return unit
        return None

    def _window(self, units: Sequence[Rollout]) -> list[Rollout]:
        """The units that may be begun now: with a rule the first of them, since later ones may not be needed."""
        if self._rule is None or not units:
            return list(units)
        waiting = set(units)
        first = next(block for block in self._blocks if not waiting.isdisjoint(block))
        return list(units[: sum(unit in waiting for unit in first) + self._ahead])
