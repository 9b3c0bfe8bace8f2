"""Sessions: whole chunks or step by step, episodes, seeds, and going on in another process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar, cast

import msgpack
import numpy as np
import pytest
from sleeping_policy import SPEC, SleepingService, observation

from defi_platform.serve.inference.service import ActionService
from defi_platform.serve.observation import Answer, Observation
from defi_platform.serve.observation_keys import NAMES, OWN, ObservationKeys
from defi_platform.serve.refusals import DeadlineError, ObservationError
from defi_platform.serve.sessions.options import CHUNK, STEP, OptionError, SessionOptions
from defi_platform.serve.sessions.session import Session, SessionAnswer

Result = TypeVar("Result")


class CountingService(SleepingService):
    """Action t of the n-th chunk is 100 n + t; chunks of four."""

    def __init__(self) -> None:
        super().__init__()
        self.chunk, self.spec = 4, replace(SPEC, chunk=4)
        self.seen: list[Observation] = []
        self.options: list[dict[str, Any]] = []

    async def act(self, observation: Observation, **options: Any) -> Answer:
        self.seen.append(observation)
        self.options.append(options)
        chunk = 100.0 * len(self.seen) + np.arange(4)[:, None] + np.zeros((4, 4))
        return Answer(chunk.astype(np.float32), queue_ms=0.0, infer_ms=1.0, batch_size=1)


def session(
    service: SleepingService, answers: str = STEP, keys: ObservationKeys = OWN, **options: Any
) -> Session:
    return Session(cast(ActionService, service), SessionOptions(**options), keys, answers=answers)


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(coroutine)


def steps(one: Session, count: int, **changes: Any) -> list[float]:
    """First numbers of the actions of so many observations."""

    async def ask() -> list[float]:
        return [float((await one.answer(observation(1) | changes)).actions[0]) for _ in range(count)]

    return run(ask())


def test_step_by_step_the_policy_runs_after_open_loop_actions() -> None:
    service = CountingService()
    assert steps(session(service, open_loop=3), 7) == [100, 101, 102, 200, 201, 202, 300]
    assert len(service.seen) == 3


def test_temporal_ensembling_is_the_weighted_mean_of_what_all_chunks_say_of_a_step() -> None:
    weight = np.exp(-0.5)
    third = (102 + 201 * weight + 300 * weight**2) / (1 + weight + weight**2)
    assert steps(session(CountingService(), open_loop=1, ensemble=0.5), 3) == pytest.approx(
        [100, (101 + 200 * weight) / (1 + weight), third], rel=1e-6
    )


def test_an_old_chunk_is_not_carried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    one, clock = session(CountingService(), expiry_s=10.0), [1000.0]
    monkeypatch.setattr("defi_platform.serve.sessions.session.time.monotonic", lambda: clock[0])
    one._last = clock[0]
    first = steps(one, 2)
    clock[0] += 11
    assert first + steps(one, 1) == [100, 101, 200]


def test_a_move_makes_a_chunk_no_younger(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("defi_platform.serve.sessions.session.time.monotonic", lambda: clock[0])
    one = session(CountingService(), expiry_s=10.0)
    steps(one, 1)
    clock[0] += 6
    moved = session(CountingService(), expiry_s=10.0)
    moved.resume(one.state())
    clock[0] += 6
    assert steps(moved, 1) == [100], "101 is of an observation of 12 s ago"


def test_a_moved_session_gets_what_it_got_whatever_new_ones_get_there() -> None:
    one, there = session(CountingService(), CHUNK), session(CountingService(), STEP)
    run(one.answer(observation(1)))
    there.resume(one.state())
    assert run(there.answer(observation(1))).actions.shape == (4, 4)


def test_another_instruction_drops_the_chunk() -> None:
    one = session(CountingService())
    assert steps(one, 2) + steps(one, 2, prompt="stop") == [100, 101, 200, 201]
    moved = session(CountingService())
    moved.resume(one.state())
    assert steps(moved, 1, prompt="stop") == [202]


def test_ensembling_has_something_to_average_whatever_the_contract_says() -> None:
    first, second = steps(session(CountingService(), ensemble=0.0), 2)
    assert (first, second) == (100, (101 + 200) / 2)
    service = CountingService()
    service.spec = replace(service.spec, action={"execute_steps": 2})
    assert steps(session(service, ensemble=0.0), 3) == [100, 101, (102 + 200) / 2]


def test_another_episode_drops_the_chunk_and_the_same_one_does_not() -> None:
    one = session(CountingService())
    assert steps(one, 2, episode="a") + steps(one, 2, episode="a") == [100, 101, 102, 103]
    one = session(CountingService())
    assert steps(one, 2, episode="a") + steps(one, 1, episode="b") == [100, 101, 200]


def test_seeds_follow_from_the_session_seed_the_episode_and_the_number() -> None:
    def seeds(**options: Any) -> list[int]:
        service = CountingService()
        one = session(service, CHUNK, **options)
        for episode in ("a", "a", "b"):
            run(one.answer({**observation(1), "seed": None, "episode": episode}))
        return [seen.seed for seen in service.seen]

    assert seeds(seed=5) == seeds(seed=5) and len(set(seeds(seed=5))) == 3
    assert seeds(seed=5) != seeds(seed=6) and seeds() != seeds()


def test_a_moved_session_goes_on_in_the_middle_of_its_chunk_unless_the_policy_is_another() -> None:
    one = session(CountingService(), open_loop=2, ensemble=0.1)
    before = steps(one, 3)
    state = msgpack.unpackb(msgpack.packb(one.state()))
    same, other = CountingService(), CountingService()
    same.seen, other.digest = list(cast(CountingService, one.service).seen), "d1"
    there, elsewhere = session(same, open_loop=2, ensemble=0.1), session(other, open_loop=2)
    there.resume(state)
    elsewhere.resume(state)
    assert before + steps(there, 2) == steps(session(CountingService(), open_loop=2, ensemble=0.1), 5)
    assert steps(elsewhere, 1) == [100]
    assert there.state()["seed"] == one.state()["seed"]


def test_what_a_client_says_of_time_reaches_the_batcher_and_its_name_is_its_own() -> None:
    service = CountingService()
    one, two = session(service, CHUNK), session(service, CHUNK)
    for client in (one, one, two):
        run(client.answer(observation(1) | {"slack_ms": 30, "deadline_ms": np.float32(80)}))
    assert all(options["slack_ms"] == 30.0 and options["deadline_ms"] == 80.0 for options in service.options)
    names = [options["session"] for options in service.options]
    assert names[0] == names[1] != names[2]


def test_one_bad_observation_of_a_batch_is_named_and_nothing_is_asked() -> None:
    service = CountingService()
    batch = [observation(1), observation(2) | {"prompt": 3}]
    with pytest.raises(ObservationError, match=r"batch\[1\]: 'prompt' is of type int"):
        run(session(service, CHUNK).answer_batch(batch))
    with pytest.raises(ObservationError, match="step by step"):
        run(session(service, STEP).answer_batch(batch))
    assert not service.seen


def test_an_unanswered_observation_of_a_batch_leaves_nothing_running() -> None:
    service = SleepingService(sleep_s=5.0)
    slow = service.act

    async def act(observation: Observation, **options: Any) -> Answer:
        if observation.seed == 2:
            raise DeadlineError("no answer within 5 ms")
        return await slow(observation, **options)

    service.act = act  # type: ignore[method-assign]

    async def ask() -> list[SessionAnswer]:
        return await session(service, CHUNK).answer_batch([observation(1), observation(2)])

    with pytest.raises(DeadlineError):
        run(ask())
    assert service.given_up == 1


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("answers=all", "answers=chunk and answers=step"),
        ("open_loop=0", "from 1 to 10000"),
        ("open_loop=9999999999999999999999", "whole number"),
        ("seed=-1", "seed='-1'"),
        ("ensemble=nan", "from 0 to 100"),
        ("a=" + "b" * 600, "at most 500"),
        ("ensemble=0.1", "ensemble is of sessions that answer step by step; add answers=step"),
        ("open_loop=2&answers=chunk", "open_loop is of sessions"),
    ],
)
def test_options_of_the_address_are_checked(query: str, complaint: str) -> None:
    with pytest.raises(OptionError, match=complaint):
        SessionOptions().with_query(query)


def test_options_of_the_address_come_before_the_servers() -> None:
    server = SessionOptions(answers=CHUNK, open_loop=4)
    assert SessionOptions().with_query("open_loop=2", STEP).open_loop == 2
    options = server.with_query("answers=step&open_loop=8&seed=3&ensemble=0.01&token=x")
    assert (options.answers, options.open_loop, options.seed, options.ensemble) == (STEP, 8, 3, 0.01)


IMAGE = np.full((8, 8, 3), 7, np.uint8)
EXAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "calvin": ("rgb_static", {"rgb_obs": {"rgb_static": IMAGE}, "robot_obs": np.ones(3), "language": "go"}),
    "metaworld": ("*", {"pixels": IMAGE, "agent_pos": np.ones(3), "task": "go"}),
    "libero": (
        "image",
        {"observation/image": IMAGE, "observation/state": np.ones(3), "prompt": "go"},
    ),
    "simpler_env": (
        "3rd_view_camera",
        {"image": {"3rd_view_camera": {"rgb": IMAGE}}, "agent": {"qpos": np.ones(3)}, "instruction": "go"},
    ),
    "lerobot": (
        "top",
        {"observation.images.top": IMAGE, "observation.state": np.ones(3), "task": "go"},
    ),
    "droid": (
        "wrist_image_left",
        {
            "observation/wrist_image_left": IMAGE,
            "observation/joint_position": np.ones(2),
            "observation/gripper_position": 1.0,
            "prompt": "go",
        },
    ),
    "vla_eval": (
        "agentview",
        {"images": {"agentview": IMAGE}, "states": np.ones(3), "task_description": "go"},
    ),
    "xpolicylab": (
        "cam_head",
        {
            "vision": {"cam_head": {"color": IMAGE, "depth": IMAGE}},
            "state": {"arm_joint_state": np.ones(2), "ee_joint_state": np.ones(1)},
            "instruction": "go",
        },
    ),
}


def test_every_set_of_names_has_an_example() -> None:
    assert set(EXAMPLES) == set(NAMES) - {"defi"}


@pytest.mark.parametrize("names", EXAMPLES)
@pytest.mark.parametrize("named", [True, False])
def test_names_of_simulators_and_formats_find_images_state_and_prompt(names: str, named: bool) -> None:
    camera, message = EXAMPLES[names]
    service = CountingService()
    service.spec = replace(SPEC, cameras=(camera if named else "*",), state_dim=3)
    answer = run(session(service, CHUNK, NAMES[names]).answer(message))
    (seen,) = service.seen
    assert (seen.images == 7).all() and seen.prompt == "go"
    assert seen.state is not None and seen.state.tolist() == [1, 1, 1]
    assert answer.ignored == (("vision/cam_head/depth",) if names == "xpolicylab" else ())
    missing = {key: value for key, value in message.items() if key != NAMES[names].prompt}
    with pytest.raises(ObservationError, match=f"'{NAMES[names].prompt}' is missing"):
        run(session(service, CHUNK, NAMES[names]).answer(missing))
