"""Push-T behind the interface of benchmarks, which is also the example of docs/extending.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gym_pusht", reason="needs the extra `pusht`")

from defi_platform.evaluate.benchmarks.pusht.pusht import PushT
from defi_platform.evaluate.episode import RandomPolicy, Rollout, run_episode
from defi_platform.evaluate.simulation.process import SimulatorProcess

HERE = "defi_platform/evaluate/benchmarks/pusht/pusht.py"


@pytest.fixture(scope="module")
def pusht() -> Iterator[PushT]:
    opened = PushT(PushT.default_view, {})
    yield opened
    opened.close()


def trace(pusht: PushT, seed: int) -> list[bytes]:
    seen = [pusht.reset("pusht", seed).tobytes(), pusht.render()["top"].tobytes()]
    random = np.random.default_rng(seed)
    for _ in range(40):
        seen.append(pusht.step(random.uniform(100, 400, 2).astype(np.float32)).state.tobytes())
    return [*seen, pusht.render()["top"].tobytes()]


def test_an_episode_depends_on_the_seed_alone(pusht: PushT) -> None:
    first = trace(pusht, 7)
    assert trace(pusht, 8) != first
    assert trace(pusht, 7) == first


def test_it_is_solved_from_a_coverage_of_95_percent_on(pusht: PushT) -> None:
    covered = {}
    for degrees in (45, 46, 48, 60):
        pusht.reset("pusht", 0)
        env = pusht._env
        env.agent.position = (20, 20)
        env.block.angle = np.deg2rad(degrees)  # the goal is at 45
        env.block.position = (256, 256)
        step = pusht.step(np.array([20, 20], np.float32))
        covered[degrees] = step.reward
        assert step.success == (step.reward > 0.95)
    assert covered[45] > 0.99 and covered[60] < 0.95 < covered[46]
    assert pusht.protocol()["coverage"] == 0.95


def test_the_picture_has_the_hand_where_the_state_says(pusht: PushT) -> None:
    state = pusht.reset("pusht", 3)
    for _ in range(15):
        state = pusht.step(np.array([60, 420], np.float32)).state
    red, _, blue = np.moveaxis(pusht.render()["top"].astype(int), 2, 0)
    rows, columns = np.nonzero(blue - red > 100)  # the hand is royal blue
    assert np.allclose(state, [60, 420], atol=2)
    assert np.allclose([columns.mean(), rows.mean()], state / 512 * 96, atol=2)


def test_the_example_of_the_docs_is_this_file_and_runs_from_outside(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "docs/extending.md").read_text()
    (code,) = re.findall(r"<!-- example: benchmark -->\n```python\n(.*?)```", page, flags=re.DOTALL)
    assert code == (repository / "platform" / HERE).read_text() and len(code.splitlines()) <= 60
    (tmp_path / "my_pusht.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rollout = Rollout("random", "pusht", 4)
    rows = []
    for name in ("my_pusht:PushT", "pusht"):
        with SimulatorProcess(name, PushT.default_view, {}) as simulator:
            arm = RandomPolicy(rollout, PushT.action)
            outcome = run_episode(simulator, arm, rollout, max_steps=60, frame_every=0, control_hz=10.0)
            rows.append(
                (outcome.row["reward"], outcome.row["initial_state"], outcome.steps["executed"].tobytes())
            )
            assert outcome.row["steps"] == 60 and not outcome.row["success"]
    assert rows[0] == rows[1]
