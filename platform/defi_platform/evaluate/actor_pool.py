"""A crew of Ray actors that work through units: one at a time each, grouped by task, lost ones done again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from defi_platform.errors import SimulatorError, UserError


class _HasTask(Protocol):
    @property
    def task(self) -> str: ...


Unit = TypeVar("Unit", bound=_HasTask)

LIVES = 3
"""Actors that may die over one unit, or at their start, before it is an error."""
PATIENCE_S = 30.0
"""After that long without any worker it is said what is waited for."""


class Crew(Generic[Unit]):
    """Actors with methods `ready()` and `work(unit)`.

    Changing the task costs an actor most of a second (a new model and rendering context), so an idle one is
    given a unit of the task it last did, else of the task that the fewest others are at.
    """

    def __init__(self, start: Callable[[], Any], workers: int):
        """`start` makes one actor; it is called again for each that dies."""
        self._start = start
        self._workers = max(1, workers)
        self._queue: list[Unit] = []
        self._deaths: Counter[Unit | None] = Counter()

    def submit(self, unit: Unit) -> None:
        """Adds a unit; also while `results` is being read."""
        self._queue.append(unit)

    def results(self) -> Iterator[tuple[Unit, Any]]:
        """Yields (unit, result) as they come until nothing is queued or running, then ends the actors.

        Raises: the UserError that an actor met; SimulatorError for a unit whose actors died LIVES times.
        """
        actors: list[Any] = []
        # What each pending call is: (actor, its unit); no unit: the actor is starting. On a cluster with too
        # few CPUs some never do, and the others carry on without them.
        running: dict[Any, tuple[Any, Unit | None]] = {}
        idle: list[Any] = []
        last_task: dict[Any, str] = {}

        def hire() -> None:
            actors.append(self._start())
            running[actors[-1].ready.remote()] = (actors[-1], None)

        try:
            for _ in range(min(self._workers, len(self._queue))):
                hire()
            while self._queue or any(unit is not None for _, unit in running.values()):
                while self._queue and idle:
                    actor = idle.pop()
                    unit = self._next(last_task.get(actor), [u.task for _, u in running.values() if u])
                    last_task[actor] = unit.task
                    running[actor.work.remote(unit)] = (actor, unit)
                done, _ = ray.wait(list(running), num_returns=1, timeout=PATIENCE_S)
                if not done:
                    if not last_task:
                        self._report_waiting()
                    continue
                actor, finished = running.pop(done[0])
                try:
                    result = ray.get(done[0])
                except RayActorError as error:
                    self._bury(finished, error)
                    hire()
                    continue
                except RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                idle.append(actor)
                if finished is not None:
                    yield finished, result
        finally:
            for actor in actors:
                ray.kill(actor)

    def _report_waiting(self) -> None:
        cluster, free = ray.cluster_resources(), ray.available_resources()
        print(
            f"waiting for a CPU: simulator workers take one each; {free.get('CPU', 0):g} of the cluster's "
            f"{cluster.get('CPU', 0):g} are free",
            flush=True,
        )

    def _next(self, last: str | None, busy: list[str]) -> Unit:
        chosen = min(self._queue, key=lambda unit: (unit.task != last, busy.count(unit.task)))
        self._queue.remove(chosen)
        return chosen

    def _bury(self, unit: Unit | None, error: RayActorError) -> None:
        self._deaths[unit] += 1
        if self._deaths[unit] >= LIVES:
            doing = "starting" if unit is None else f"at {unit}"
            raise SimulatorError(
                f"{LIVES} simulator workers died {doing}, the last: {' '.join(str(error).split())[:300]}. "
                "Look at their logs (`ray logs`) and at the memory of the node."
            ) from error
        if unit is not None:
            self._queue.append(unit)
