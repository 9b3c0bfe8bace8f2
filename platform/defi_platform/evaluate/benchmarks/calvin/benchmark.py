"""CALVIN ABC-D, long horizon: a policy trained on tables A, B and C gets five instructions in a row on table D.

Seed n is sequence n of the official 1000. The scene is put into the sequence's initial state once; a subtask goes
on from wherever the one before it ended, and is solved when CALVIN's own oracle says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from defi_platform.evaluate.benchmarks.calvin import sequences
from defi_platform.evaluate.benchmarks.calvin.clones import clones
from defi_platform.evaluate.benchmarks.interface import ActionSpec, Benchmark, Step, Task, View
from defi_platform.evaluate.benchmarks.published import PublishedChains

HORIZONS = {"official": 360, "released": 720}
"""Control steps per subtask: CALVIN's own, and that of DeFI's released evaluator (after X-VLA)."""


_PAPER = "arXiv 2604.16391"
PUBLISHED = (
    PublishedChains("DeFI", 4.51, (0.979, 0.942, 0.907, 0.870, 0.812), HORIZONS["released"], _PAPER),
    PublishedChains("DeFI, static camera alone", 4.05, None, HORIZONS["released"], _PAPER),
    PublishedChains("VPP", 4.33, source=_PAPER),
    PublishedChains("Seer", 4.28, source=_PAPER),
    PublishedChains("GR00T N1", 4.01, source=_PAPER),
    PublishedChains("OpenVLA", 3.27, source=_PAPER),
)
"""As DeFI's paper reports them; for others than DeFI it does not say which horizon was used."""


class Calvin(Benchmark):
    """1000 sequences of five tasks of a Franka arm at a table with a drawer, a sliding door, lamps and blocks."""

    name = "calvin"
    cameras = ("static", "gripper")
    default_view = View(("static", "gripper"), 200, 200, {"gripper": (84, 84)})
    """As the dataset was recorded."""
    state_names = (
        *("x", "y", "z", "roll", "pitch", "yaw", "gripper_opening"),
        *(f"joint_{number}" for number in range(7)),
        "gripper_action",
    )
    """`robot_obs`: metres and radians (Euler angles)."""
    action = ActionSpec(
        names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
        low=(-1.0,) * 7,
        high=(1.0,) * 7,
        clip=False,
        binary=(6,),
    )
    """`rel_actions`: 1 is 2 cm or 0.05 rad. The simulator takes larger ones as they are, but only -1 (close) or 1
    for the gripper."""
    control_hz = 30.0
    robot = "franka_panda"
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "horizon": tuple(HORIZONS),
        "renderer": ("egl", "tiny"),
    }
    published = PUBLISHED
    chain_length = 5
    seeds = sequences.SEQUENCES

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """The long-horizon evaluation; its subtasks follow from the seed."""
        return (Task("long_horizon", "five instructions in a row", HORIZONS[options["horizon"]]),)

    @classmethod
    def check_view(cls, view: View) -> str | None:
        """The cameras' field of view is a square."""
        for camera in view.cameras:
            height, width = view.size(camera)
            if height != width:
                return f"CALVIN's camera {camera} is square, and {height} x {width} would squeeze its images"
        return None

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        from defi_platform.evaluate.benchmarks.calvin.table import PlayTable

        self._clones = clones()
        self._table = PlayTable(self._clones, view, egl=options["renderer"] == "egl")
        self._subtasks: tuple[Task, ...] = ()
        self._subtask = ""

    def protocol(self) -> dict[str, Any]:
        """Versions, digests of the two repositories, horizon and renderer."""
        from importlib.metadata import version

        return {
            "benchmark": "CALVIN ABC-D, long horizon",
            "sequences": sequences.SEQUENCES,
            "horizon": HORIZONS[self.given["horizon"]],
            "renderer": self.given["renderer"],
            "repositories": self._clones.contents(),
            "versions": {name: version(name) for name in ("pybullet", "numpy")},
        }

    def chain(self, task: str, seed: int) -> tuple[Task, ...]:
        """The five tasks of sequence `seed`, with the first validation annotation of each."""
        horizon = self._by_name[task].horizon
        return tuple(Task(name, self._table.instruction(name), horizon) for name in sequences.sequence(seed))

    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Puts the scene into the initial state of sequence `seed`; returns `robot_obs`, (15,)."""
        self._subtasks = self.chain(task, seed)
        state = self._table.reset(*sequences.initial_state(sequences.start_condition(seed)))
        self.begin(0)
        return state

    def begin(self, index: int) -> None:
        """Asks for subtask `index`: what happens from the present state on is judged."""
        self._subtask = self._subtasks[index].name
        self._table.begin()

    def step(self, action: NDArray[np.float32]) -> Step:
        """Executes one action (7,): a thirtieth of a second."""
        state = self._table.step(action)
        success = self._table.solved(self._subtask)
        return Step(success, state, float(success))

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """The cameras' images of the present state."""
        return self._table.pictures()

    def close(self) -> None:
        """Frees the simulator."""
        self._table.close()
