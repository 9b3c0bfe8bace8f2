"""Fetch behind the interface of benchmarks: exact seeds, pictures that show the goal, scripts that solve it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the extra `fetch`")

from defi_platform.evaluate.benchmarks.fetch.fetch import HORIZON, Fetch
from defi_platform.evaluate.benchmarks.interface import FIRST, LAST, View

VIEW = View(("workspace", "side"), 64, 96)


@pytest.fixture(scope="module")
def fetch() -> Iterator[Fetch]:
    opened = Fetch(VIEW, Fetch.resolved_options({}))
    yield opened
    opened.close()


def steps_to_success(fetch: Fetch, task: str, seed: int) -> int | None:
    fetch.reset(task, seed)
    for number in range(1, HORIZON + 1):
        if fetch.step(fetch.action.prepared(fetch.expert_action()[None])[0]).success:
            return number
    return None


@pytest.mark.parametrize(
    ("task", "least"), [("reach", 10), ("push", 10), ("pick-and-place", 10), ("slide", 4)]
)
def test_scripts_solve_the_tasks(fetch: Fetch, task: str, least: int) -> None:
    solved = [steps_to_success(fetch, task, 2000 + n) for n in range(10)]
    assert sum(number is not None for number in solved) >= least, solved


def test_random_actions_solve_no_task_that_has_an_object(fetch: Fetch) -> None:
    random, solved = np.random.default_rng(0), 0
    for seed in range(5):
        fetch.reset("pick-and-place", seed)
        solved += any(fetch.step(random.uniform(-1, 1, 4).astype(np.float32)).success for _ in range(HORIZON))
    assert solved <= 1


def trace(fetch: Fetch, task: str, seed: int) -> list[bytes]:
    seen = [fetch.reset(task, seed).tobytes(), *(image.tobytes() for image in fetch.render().values())]
    for _ in range(12):
        seen.append(fetch.step(fetch.expert_action()).state.tobytes())
    return [*seen, *(image.tobytes() for image in fetch.render().values())]


def test_an_episode_depends_on_task_and_seed_alone(fetch: Fetch) -> None:
    first = trace(fetch, "push", 7)
    trace(fetch, "push", 8)
    trace(fetch, "slide", 7)
    assert trace(fetch, "push", 7) == first
    another = Fetch(VIEW, Fetch.resolved_options({}))
    assert trace(another, "push", 7) == first
    another.close()
    assert trace(fetch, "push", 8) != first


def test_looking_changes_nothing(fetch: Fetch) -> None:
    def states(looks: bool) -> list[bytes]:
        fetch.reset("slide", 20_001)
        seen = []
        for _ in range(20):
            if looks:
                fetch.render()
            seen.append(fetch.step(fetch.expert_action()).state.tobytes())
        return seen

    assert states(looks=True) == states(looks=False)


def test_pictures_are_upright_and_show_the_goal(fetch: Fetch) -> None:
    state = fetch.reset("reach", 3)
    images = fetch.render()
    assert list(images) == ["workspace", "side"]
    assert all(image.shape == (64, 96, 3) and image.dtype == np.uint8 for image in images.values())
    assert state.shape == (len(Fetch.state_names),) == (7,)
    rows = {}
    for seed in range(8):
        goal = float(fetch.reset("reach", seed)[-1])
        image = fetch.render()["side"].astype(int)
        dot = np.nonzero((image[..., 0] > 150) & (image[..., 1:].max(axis=-1) < 60))[0]
        if len(dot):  # else the hand is before it
            rows[goal] = dot.mean()
    assert len(rows) >= 4
    assert rows[max(rows)] < rows[min(rows)], "a goal that lies higher is higher in the picture"


def test_the_published_rule_looks_at_the_last_state_alone() -> None:
    fetch = Fetch(VIEW, Fetch.resolved_options({"success": "last"}))
    fetch.reset("reach", 1)
    results = [fetch.step(fetch.expert_action()) for _ in range(HORIZON)]
    assert results[-2].success and results[-1].success and not any(step.done for step in results)
    assert {task.decided for task in Fetch.tasks({"success": "last"})} == {LAST}
    assert {task.decided for task in Fetch.tasks({"success": "any"})} == {FIRST}
    fetch.close()
