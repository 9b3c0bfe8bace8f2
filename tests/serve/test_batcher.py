"""What the batching service promises each observation, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from virtual_time import numbered

from defi_platform.errors import ServeError
from defi_platform.serve.inference.action_check import ActionCheck
from defi_platform.serve.inference.forward_thread import WarmUp
from defi_platform.serve.inference.service import ActionService, ServiceSettings
from defi_platform.serve.observation import Answer, PolicySpec
from defi_platform.serve.refusals import (
    BusyError,
    DeadlineError,
    ObservationError,
    PolicyFailure,
    Refusal,
)

SPEC = PolicySpec(
    policy="doubling",
    preset="nano",
    cameras=("front",),
    image_size=(2, 2),
    state_dim=0,
    action_dim=1,
    chunk=1,
    action={"names": ["grip"], "min": [0.0], "max": [1000.0]},
)


class Doubling:
    """A policy that doubles seeds and remembers the batches; can be held, and fails for seeds below 0."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        if not held:
            self.go.set()

    def __call__(self, observations: Sequence[Any]) -> list[np.ndarray]:
        items = [observation.seed for observation in observations]
        self.batches.append(items)
        assert self.go.wait(60)
        if min(items) < 0:
            raise ValueError(f"negative: {min(items)}")
        return [np.array([[2 * item]], np.float32) for item in items]


def service_of(forward: Any, **settings: Any) -> ActionService:
    return ActionService(forward, SPEC, "abc123", ServiceSettings(**settings))


def two_seconds() -> WarmUp:
    """A warm-up that found passes of two seconds."""
    return WarmUp({1: 2.0}, largest=64)


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_lone_observation_starts_at_once() -> None:
    service = service_of(Doubling())

    async def several() -> list[tuple[float, Answer]]:
        found = []
        for _ in range(6):  # the first starts the thread
            started = time.perf_counter()
            answer = await service.act(numbered(21), session="robot")
            found.append((time.perf_counter() - started, answer))
        return found

    answers = asyncio.run(several())
    assert all((answer.actions.item(), answer.batch_size) == (42, 1) for _, answer in answers)
    # The quickest: a busy machine may keep one from its core for long, a batcher that waits keeps them all.
    assert min(seconds for seconds, _ in answers) < 0.1
    assert min(answer.queue_ms for _, answer in answers) < 50


def test_what_queues_while_a_forward_pass_runs_is_the_next_batch_and_each_gets_its_own_answer() -> None:
    run = Doubling(held=True)
    service = service_of(run, max_batch_size=4)

    async def many() -> list[Answer]:
        first = asyncio.create_task(service.act(numbered(0)))
        await until(lambda: run.batches)
        rest = [asyncio.create_task(service.act(numbered(n))) for n in range(1, 8)]
        await asyncio.sleep(0.01)
        load = service.snapshot()
        assert (load.in_flight, load.queued) == (8, 7) and load.oldest_wait_ms >= 9
        run.go.set()
        return [await task for task in [first, *rest]]

    answers = asyncio.run(many())
    assert run.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]
    assert [a.actions.item() for a in answers] == [2 * n for n in range(8)]
    assert [a.batch_size for a in answers] == [1, 4, 4, 4, 4, 3, 3, 3]
    load = service.snapshot()
    assert (load.answered, load.in_flight, load.queued) == (8, 0, 0)
    assert load.batch_sizes == {1: 1, 4: 4, 3: 3} and load.batch_size == pytest.approx(8 / 3)


def test_the_observation_with_the_least_slack_starts_first_where_not_all_can() -> None:
    run = Doubling(held=True)
    service = service_of(run, max_batch_size=2)

    async def many() -> None:
        tasks = [asyncio.create_task(service.act(numbered(0)))]
        await until(lambda: run.batches)
        for number, slack_ms in ((1, 9000), (2, 5000), (3, None), (4, 7000)):
            tasks.append(asyncio.create_task(service.act(numbered(number), slack_ms=slack_ms)))
        await asyncio.sleep(0)
        run.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(many())
    assert [sorted(batch) for batch in run.batches] == [[0], [2, 3], [1, 4]]


def test_an_observation_that_fails_does_not_fail_its_batch() -> None:
    run = Doubling(held=True)
    service = service_of(run)

    async def many() -> list[Any]:
        hold = asyncio.create_task(service.act(numbered(0)))
        await until(lambda: run.batches)
        tasks = [asyncio.create_task(service.act(numbered(n))) for n in (1, 2, -3, 4, 5)]
        await asyncio.sleep(0)
        run.go.set()
        await hold
        return await asyncio.gather(*tasks, return_exceptions=True)

    (*_,) = outcomes = asyncio.run(many())
    good = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    assert [answer.actions.item() for answer in good] == [2, 4, 8, 10]
    assert isinstance(outcomes[2], PolicyFailure) and "ValueError: negative: -3" in str(outcomes[2])
    assert service.snapshot().refusals == {"policy": 1}


def test_an_observation_whose_client_has_gone_is_not_computed() -> None:
    run = Doubling(held=True)
    service = service_of(run, max_batch_size=1)

    async def leave() -> None:
        first = asyncio.create_task(service.act(numbered(1)))
        gone = asyncio.create_task(service.act(numbered(2)))
        last = asyncio.create_task(service.act(numbered(3)))
        await asyncio.sleep(0.01)
        gone.cancel()
        run.go.set()
        await asyncio.gather(first, last)

    asyncio.run(leave())
    assert run.batches == [[1], [3]] and service.snapshot().in_flight == 0


def test_a_policy_that_loses_results_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(PolicyFailure, match="0 results for 1 observations"):
        asyncio.run(service_of(lambda items: []).act(numbered(1)))


def test_a_full_queue_refuses_the_next_observation_and_says_when_to_come_back() -> None:
    run = Doubling(held=True)
    service = service_of(run, queue_size=2)

    async def many() -> BusyError:
        tasks = [asyncio.create_task(service.act(numbered(0)))]
        await until(lambda: run.batches)
        tasks += [asyncio.create_task(service.act(numbered(n))) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match=r"busy, retry after .* 2 observations are waiting") as caught:
            await service.act(numbered(3))
        run.go.set()
        await asyncio.gather(*tasks)
        await service.act(numbered(3))
        return caught.value

    assert 0 < asyncio.run(many()).retry_after_s < 60
    assert service.snapshot().refusals == {"busy": 1}


def test_a_wait_that_would_be_too_long_is_refused_at_once() -> None:
    run = Doubling(held=True)
    service = ActionService(
        run, SPEC, "abc", ServiceSettings(max_batch_size=1, queue_wait_s=4.5), warm_up=two_seconds
    )

    async def many() -> None:
        tasks = [asyncio.create_task(service.act(numbered(n))) for n in range(3)]
        await until(lambda: run.batches)
        with pytest.raises(BusyError, match=r"wait would be [56]\.\d s, and at most 4\.5 s"):
            await service.act(numbered(3))
        run.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(many())


def test_a_deadline_is_kept_by_a_refusal_in_the_queue_and_in_the_pass() -> None:
    run = Doubling(held=True)
    service = service_of(run)

    async def many() -> list[Any]:
        passing = asyncio.create_task(service.act(numbered(1), deadline_ms=60))
        await until(lambda: run.batches)
        queued = asyncio.create_task(service.act(numbered(2), deadline_ms=30))
        found = await asyncio.gather(passing, queued, return_exceptions=True)
        run.go.set()
        await until(lambda: not service.snapshot().running_for_s)
        return found

    passing, queued = asyncio.run(many())
    assert isinstance(passing, DeadlineError) and "within 60 ms" in str(passing) and "pass" in str(passing)
    assert isinstance(queued, DeadlineError) and "still in the queue" in str(queued)
    assert run.batches == [[1]], "an observation past its deadline was computed"
    assert service.snapshot().refusals == {"deadline": 2}


def test_an_answer_that_would_come_too_late_is_not_computed() -> None:
    run = Doubling()
    service = ActionService(run, SPEC, "abc", warm_up=two_seconds)
    with pytest.raises(DeadlineError, match="forward pass would end too late"):
        asyncio.run(service.act(numbered(1), deadline_ms=500))
    assert run.batches == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, "5", True, 1e12])
def test_times_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(ObservationError, match="slack_ms"):
        asyncio.run(service_of(Doubling()).act(numbered(1), slack_ms=bad))


def test_no_slack_is_a_time_and_no_deadline_is_none() -> None:
    service = service_of(Doubling())
    asyncio.run(service.act(numbered(1), slack_ms=0))
    with pytest.raises(ObservationError, match="deadline_ms"):
        asyncio.run(service.act(numbered(1), deadline_ms=0))
    assert not service.snapshot().refusals, "counted here and by the protocol"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "nan for 'grip' at step 0"),
        (np.inf, "inf for 'grip'"),
        (2001.0, r"2001 for 'grip' .* far outside its range in the training data \(0 to 1000"),
        (-1001.0, "far outside"),
    ],
)
def test_actions_that_no_robot_should_carry_out_never_leave(value: float, words: str) -> None:
    service = service_of(lambda items: [np.array([[value]], np.float32) for _ in items])
    with pytest.raises(PolicyFailure, match=words):
        asyncio.run(service.act(numbered(1)))
    assert service.snapshot().refusals == {"policy": 1} and service.snapshot().answered == 0


def test_actions_a_little_outside_the_training_range_do_leave() -> None:
    service = service_of(lambda items: [np.array([[1999.0]], np.float32) for _ in items])
    assert asyncio.run(service.act(numbered(1))).actions.item() == 1999.0


def test_an_action_that_was_constant_in_training_may_vary_as_the_head_does() -> None:
    constant = replace(SPEC, action=SPEC.action | {"min": [1.0], "max": [1.0]})

    def act(value: float) -> Answer:
        service = ActionService(lambda items: [np.array([[value]], np.float32) for _ in items], constant, "d")
        return asyncio.run(service.act(numbered(1)))

    assert act(-0.9).actions.item() == pytest.approx(-0.9)
    with pytest.raises(PolicyFailure, match="far outside"):
        act(3.1)


def test_an_action_that_hardly_varied_in_training_may_vary_as_the_head_does() -> None:
    noisy = replace(SPEC, action=SPEC.action | {"min": [0.1], "max": [0.1000001]}, action_scale=(1.0,))
    scaled = replace(SPEC, action=SPEC.action | {"min": [0.0], "max": [0.5]}, action_scale=(0.25,))
    for spec, good, bad in ((noisy, -0.9, 2.2), (scaled, 0.99, 1.01)):
        check = ActionCheck(spec, margin=1.0)
        check(np.array([[good]], np.float32))
        with pytest.raises(PolicyFailure, match="far outside"):
            check(np.array([[bad]], np.float32))


def test_a_full_queue_does_not_make_a_replica_unhealthy() -> None:
    run = Doubling(held=True)
    service = service_of(run, queue_size=1)

    async def full() -> None:
        run.go.set()
        with pytest.raises(PolicyFailure):
            await service.act(numbered(-1))
        run.go.clear()
        tasks = [asyncio.create_task(service.act(numbered(1)))]
        await until(lambda: len(run.batches) == 2)
        tasks.append(asyncio.create_task(service.act(numbered(2))))
        await asyncio.sleep(0)
        await service.check_health(numbered(5))
        run.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(full())


def test_a_replica_is_unhealthy_once_even_the_probe_fails_and_not_because_a_client_sends_what_fails() -> None:
    async def checks(service: ActionService) -> None:
        for _ in range(5):
            with pytest.raises(Refusal):
                await service.act(numbered(-1))
        await service.check_health(numbered(5))

    asyncio.run(checks(service_of(Doubling())))
    with pytest.raises(ServeError, match="fails on every observation: RuntimeError: no device"):
        asyncio.run(checks(service_of(broken)))


def broken(observations: Sequence[Any]) -> list[np.ndarray]:
    raise RuntimeError("no device")


def test_a_pass_that_does_not_end_makes_a_replica_unhealthy() -> None:
    run = Doubling(held=True)
    service = service_of(run, stuck_after_s=0.02)

    async def hang() -> None:
        task = asyncio.create_task(service.act(numbered(1)))
        await until(lambda: run.batches)
        await asyncio.sleep(0.03)
        with pytest.raises(ServeError, match="a forward pass has been running"):
            await service.check_health()
        run.go.set()
        await task

    asyncio.run(hang())
