"""A pool of Ray actors that work through a queue of units and repeat the units of actors that died."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from defi_platform.errors import SimulatorError, UserError, one_line
from defi_platform.metrics import catalogue


class _HasTask(Protocol):
    @property
    def task(self) -> str: ...


Unit = TypeVar("Unit", bound=_HasTask)

MAX_RESTARTS = 2
"""Restarts after actors died over one unit, or at their start; the next death is an error."""
WAIT_REPORT_S = 30.0
"""Seconds without any running actor after which the missing resources are reported."""


class ActorPool(Generic[Unit]):
    """Actors with methods `ready()` and `work(unit)`, each busy with one unit at a time.

    Changing the task costs an actor most of a second (a new model and rendering context), so an idle one gets
    a unit of its last task, else of the task that the fewest other actors are busy with.

    Restarts are counted here and not by Ray (`max_restarts`, `max_task_retries`): Ray would keep a lost unit
    for the restarted actor, which waits for ever when its node is gone and the other actors hold the CPUs that
    are left. Here the unit goes back to the queue, and any idle actor takes it.
    """

    def __init__(self, create: Callable[[], Any], workers: int):
        """Prepares a pool; its actors start when the results are read.

        Args:
            create: makes one actor handle; called again for each actor that dies.
            workers: number of actors, at least 1.
        """
        self._create = create
        self._workers = max(1, workers)
        self._queue: list[Unit] = []
        self._deaths: Counter[Unit | None] = Counter()

    def submit(self, unit: Unit) -> None:
        """Adds a unit; also while `results` is being read."""
        self._queue.append(unit)

    def results(self) -> Iterator[tuple[Unit, Any]]:
        """Runs the queue to its end, then kills the actors.

        Yields:
            (unit, result of its `work`), in order of completion.

        Raises:
            UserError: an actor raised it.
            SimulatorError: more than MAX_RESTARTS actors died over one unit or at their start.
        """
        actors: list[Any] = []
        # Pending call -> (actor, its unit); no unit: the actor is starting. On a cluster with too few CPUs
        # some never do, and the others carry on without them.
        running: dict[Any, tuple[Any, Unit | None]] = {}
        idle: list[Any] = []
        last_task: dict[Any, str] = {}

        def start() -> None:
            actors.append(self._create())
            running[actors[-1].ready.remote()] = (actors[-1], None)

        try:
            for _ in range(min(self._workers, len(self._queue))):
                start()
            while self._queue or any(unit is not None for _, unit in running.values()):
                while self._queue and idle:
                    actor = idle.pop()
                    unit = self._next_unit(last_task.get(actor), [u.task for _, u in running.values() if u])
                    last_task[actor] = unit.task
                    running[actor.work.remote(unit)] = (actor, unit)
                done, _ = ray.wait(list(running), num_returns=1, timeout=WAIT_REPORT_S)
                if not done:
                    if not last_task:
                        _report_waiting()
                    continue
                actor, finished = running.pop(done[0])
                try:
                    result = ray.get(done[0])
                except RayActorError as error:
                    self._on_actor_death(finished, error)
                    start()
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

    def _next_unit(self, last_task: str | None, busy_tasks: list[str]) -> Unit:
        chosen = min(self._queue, key=lambda unit: (unit.task != last_task, busy_tasks.count(unit.task)))
        self._queue.remove(chosen)
        return chosen

    def _on_actor_death(self, unit: Unit | None, error: RayActorError) -> None:
        """Queues the lost unit again, or raises SimulatorError after too many deaths."""
        self._deaths[unit] += 1
        if self._deaths[unit] > MAX_RESTARTS:
            doing = "starting" if unit is None else f"at {unit}"
            raise SimulatorError(
                f"{self._deaths[unit]} simulator workers died {doing}, the last: {one_line(error)[:300]}. "
                "Look at their logs (`ray logs`) and at the memory of the node."
            ) from error
        if unit is not None:
            catalogue.EVALUATE_REPEATED.add()
            self._queue.append(unit)


def _report_waiting() -> None:
    cluster, free = ray.cluster_resources(), ray.available_resources()
    print(
        f"waiting for a CPU: simulator workers take one each; {free.get('CPU', 0):g} of the cluster's "
        f"{cluster.get('CPU', 0):g} are free",
        flush=True,
    )
