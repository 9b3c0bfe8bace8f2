"""Push-T: a round hand pushes a T-shaped block onto its outline, in a plane of 512 by 512."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.evaluate.benchmarks.interface import ActionSpec, Benchmark, Step, Task, View


class PushT(Benchmark):
    """One task; solved when the block covers 95 % of its outline."""

    name = "pusht"
    cameras = ("top",)
    default_view = View(("top",), 96, 96)
    state_names = ("hand_x", "hand_y")
    action = ActionSpec(names=("target_x", "target_y"), low=(0.0, 0.0), high=(512.0, 512.0), relative=False)
    """Where the hand is to go."""
    control_hz = 10.0

    @classmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """The one task, with the horizon that gym-pusht registers."""
        return (Task("pusht", "push the grey T onto the green T", horizon=300),)

    def __init__(self, view: View, options: Mapping[str, Any]):
        super().__init__(view, options)
        from gym_pusht.envs.pusht import PushTEnv  # here: the class is also used where it is not installed

        height, width = view.size("top")
        self._env = PushTEnv(obs_type="state", observation_height=height, observation_width=width)

    def protocol(self) -> dict[str, Any]:
        """The version, and the coverage from which on the task is solved."""
        return {"gym-pusht": version("gym-pusht"), "coverage": self._env.success_threshold}

    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Places hand and block by the seed."""
        state, _ = self._env.reset(seed=seed)
        self._block = state[2:]
        return np.asarray(state[:2], np.float32)

    def initial_positions(self) -> dict[str, float]:
        """Of the block, which a policy has to see; the angle is in radians."""
        return dict(zip(("block_x", "block_y", "block_angle"), map(float, self._block), strict=True))

    def step(self, action: NDArray[np.float32]) -> Step:
        """Lets the hand follow its target for a tenth of a second; the reward is the coverage."""
        state, _, _, _, info = self._env.step(action)
        return Step(bool(info["is_success"]), np.asarray(state[:2], np.float32), float(info["coverage"]))

    def render(self) -> dict[str, NDArray[np.uint8]]:
        """The plane from above; gym-pusht's public `render` would mark the last action in it."""
        return {"top": self._env._render(visualize=False)}
