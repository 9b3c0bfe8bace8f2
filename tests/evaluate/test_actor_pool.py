"""The order and the restarts of an actor pool, with actors in this process in place of Ray's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from ray.exceptions import RayActorError, RaySystemError, RayTaskError

from defi_platform.cluster import actors
from defi_platform.errors import SimulatorError
from defi_platform.evaluate.fleet import actor_pool
from defi_platform.evaluate.fleet.actor_pool import ActorPool


@dataclass(frozen=True)
class Unit:
    task: str
    seed: int


class Call:
    """A pending call, run when its result is fetched; `remote` as on a method of an actor."""

    def __init__(self, run: Callable[..., Any], *arguments: Any):
        self.run, self.arguments = run, arguments

    def remote(self, *arguments: Any) -> Call:
        return Call(self.run, *arguments)


class Actor:
    never_created = False

    def __init__(self, work: Callable[[Unit], Any]):
        self.ready = Call(lambda: None)
        self.work = Call(work)


class LocalRay:
    """`wait`, `get` and `kill` of Ray, one call at a time in the order of submission."""

    def __init__(self) -> None:
        self.killed: list[Any] = []

    def wait(self, calls: list[Call], **_: Any) -> tuple[list[Call], list[Call]]:
        return calls[:1], calls[1:]

    def get(self, call: Call) -> Any:
        return call.run(*call.arguments)

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)
        if actor.never_created:
            raise RaySystemError("Actor creation cancelled.")


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> LocalRay:
    local = LocalRay()
    monkeypatch.setattr(actor_pool, "ray", local)
    monkeypatch.setattr(actors, "ray", local)
    return local


def test_an_actor_stays_with_its_task_as_long_as_there_are_units_of_it(ray: LocalRay) -> None:
    pool: ActorPool[Unit] = ActorPool(lambda: Actor(lambda unit: unit.seed), workers=1)
    units = [Unit("open", 0), Unit("close", 1), Unit("open", 2), Unit("close", 3)]
    for unit in units:
        pool.submit(unit)
    assert [result for _, result in pool.results()] == [0, 2, 1, 3]
    assert len(ray.killed) == 1


def test_a_unit_is_repeated_after_the_death_of_its_actor_until_three_have_died(ray: LocalRay) -> None:
    deaths = 0
    fatal = 2

    def work(unit: Unit) -> int:
        nonlocal deaths
        if unit.seed == 7 and deaths < fatal:
            deaths += 1
            raise RayActorError()
        return unit.seed

    def run() -> list[int]:
        pool: ActorPool[Unit] = ActorPool(lambda: Actor(work), workers=2)
        for seed in (6, 7, 8):
            pool.submit(Unit("open", seed))
        return sorted(result for _, result in pool.results())

    assert run() == [6, 7, 8] and deaths == 2
    assert len(ray.killed) == 2 + 2, "two actors took the place of those that died"
    deaths, fatal = 0, 3
    with pytest.raises(SimulatorError, match=r"3 simulator workers died at Unit\(task='open', seed=7\)"):
        run()


def test_a_users_error_in_an_actor_ends_the_pool_with_that_error(ray: LocalRay) -> None:
    def work(unit: Unit) -> int:
        raise RayTaskError("work", "traceback", SimulatorError("no EGL"))

    pool: ActorPool[Unit] = ActorPool(lambda: Actor(work), workers=1)
    pool.submit(Unit("open", 0))
    with pytest.raises(SimulatorError, match="no EGL"):
        list(pool.results())
    assert len(ray.killed) == 1


def test_actors_that_die_at_their_start_are_replaced_twice(ray: LocalRay) -> None:
    deaths = 2

    def create() -> Actor:
        nonlocal deaths
        actor = Actor(lambda unit: unit.seed)
        if deaths:
            deaths -= 1
            actor.ready, actor.never_created = Call(die), True
        return actor

    def die() -> None:
        raise RayActorError()

    def run() -> list[int]:
        pool: ActorPool[Unit] = ActorPool(create, workers=1)
        pool.submit(Unit("open", 5))
        return [result for _, result in pool.results()]

    assert run() == [5] and len(ray.killed) == 3
    deaths = 3
    with pytest.raises(SimulatorError, match="3 simulator workers died starting"):
        run()
