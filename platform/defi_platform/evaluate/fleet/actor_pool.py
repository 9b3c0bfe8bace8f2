"""A pool of Ray actors that work through a queue of units and repeat the units of actors that died."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError

from defi_platform.cluster.actors import kill_all
from defi_platform.errors import SimulatorError, SimulatorFault, UserError, one_line
from defi_platform.metrics import catalogue


class _HasTask(Protocol):
    @property
    def task(self) -> str: ...


class Choice(Protocol):
    """Units that others may take too, such as those of an evaluation on which several drivers work."""

    def take(self, units: Sequence[Any], last_task: str | None, busy_tasks: list[str]) -> Any | None:
        """Chooses the next unit and makes it this driver's; see `nearest`, which is the usual choice.

        Args:
            units: in their order.
            last_task: of the idle actor.
            busy_tasks: of the units that are being worked on.

        Returns: one of `units`; None while there is none to be had.
        """
        ...

    def remaining(self, units: Sequence[Any]) -> list[Any]:
        """The units that are still to be done, in their order; called before each choice."""
        ...


Unit = TypeVar("Unit", bound=_HasTask)

MAX_RESTARTS = 2
"""Restarts after actors died over one unit, or at their start; the next death is an error."""
POLL_S = 2.0
"""Seconds between two looks at units that others have."""
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

    def __init__(
        self,
        create: Callable[[], Any],
        workers: int,
        *,
        choice: Choice | None = None,
        on_fault: Callable[[Unit, SimulatorFault], bool] | None = None,
    ):
        """Prepares a pool; its actors start when the results are read.

        Args:
            create: makes one actor handle; called again for each actor that dies.
            workers: number of actors, at least 1.
            choice: of the next unit, where units are shared; None: all are this pool's.
            on_fault: called when a unit's simulator has failed, or its actor has died (kind "worker"); whether the unit is to be
                tried again. None: a simulator's failure is an error, and so is the last of MAX_RESTARTS deaths.
        """
        self._create = create
        self._workers = max(1, workers)
        self._choice = choice
        self._on_fault = on_fault
        self._queue: list[Unit] = []
        self._deaths: Counter[Unit | None] = Counter()

    def submit(self, unit: Unit) -> None:
        """Adds a unit; also while `results` is being read."""
        self._queue.append(unit)

    def results(self) -> Generator[tuple[Unit, Any], None, None]:
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
                if self._choice is not None and self._queue and idle:
                    self._queue = self._choice.remaining(self._queue)
                while self._queue and idle:
                    unit = self._next_unit(
                        last_task.get(idle[-1]), [u.task for _, u in running.values() if u]
                    )
                    if unit is None:
                        break
                    actor = idle.pop()
                    last_task[actor] = unit.task
                    running[actor.work.remote(unit)] = (actor, unit)
                elsewhere = bool(self._queue and idle)  # with other drivers
                if not running:
                    time.sleep(POLL_S if self._queue else 0)
                    continue
                wait_s = POLL_S if elsewhere else WAIT_REPORT_S
                done, _ = ray.wait(list(running), num_returns=1, timeout=wait_s)
                if not done:
                    if not last_task and not elsewhere:
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
                    if isinstance(error.cause, SimulatorFault) and finished is not None and self._on_fault:
                        idle.append(actor)
                        self._try_again(finished, error.cause)
                        continue
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                idle.append(actor)
                if finished is None:
                    self._deaths.pop(None, None)  # actors can start; those that could not are of the past
                else:
                    yield finished, result
        finally:
            kill_all(actors)

    def _next_unit(self, last_task: str | None, busy_tasks: list[str]) -> Unit | None:
        take = nearest if self._choice is None else self._choice.take
        chosen: Unit | None = take(self._queue, last_task, busy_tasks)
        if chosen is not None:
            self._queue.remove(chosen)
        return chosen

    def _on_actor_death(self, unit: Unit | None, error: RayActorError) -> None:
        """Queues the lost unit again, or raises SimulatorError after too many deaths."""
        self._deaths[unit] += 1
        if unit is not None and self._on_fault is not None:
            self._try_again(unit, SimulatorFault("worker", one_line(error)[:300]))
            return
        if self._deaths[unit] > MAX_RESTARTS:
            doing = "starting" if unit is None else f"at {unit}"
            raise SimulatorError(
                f"{self._deaths[unit]} simulator workers died {doing}, the last: {one_line(error)[:300]}. "
                "Look at their logs (`ray logs`) and at the memory of the node."
            ) from error
        if unit is not None:
            catalogue.EVALUATE_REPEATED.add()
            self._queue.append(unit)

    def _try_again(self, unit: Unit, fault: SimulatorFault) -> None:
        assert self._on_fault is not None
        if self._on_fault(unit, fault):
            catalogue.EVALUATE_REPEATED.add()
            self._queue.append(unit)


def nearest(units: Sequence[Unit], last_task: str | None, busy_tasks: list[str]) -> Unit:
    """The unit for an idle actor: of its last task, else of the task that the fewest other actors are busy with.

    Args:
        units: to choose from, at least one.
        last_task: of the actor.
        busy_tasks: of the units that are being worked on.
    """
    return min(units, key=lambda unit: (unit.task != last_task, busy_tasks.count(unit.task)))


def _report_waiting() -> None:
    cluster, free = ray.cluster_resources(), ray.available_resources()
    print(
        f"waiting for a CPU: simulator workers take one each; {free.get('CPU', 0):g} of the cluster's "
        f"{cluster.get('CPU', 0):g} are free",
        flush=True,
    )
