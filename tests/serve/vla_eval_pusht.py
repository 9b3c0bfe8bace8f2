"""Our Push-T as a benchmark of vla-eval, for its own runner."""

from __future__ import annotations

from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.specs import DimSpec

from defi_platform.evaluate.benchmarks.pusht.pusht import PushT


class PushTOfVlaEval(StepBenchmark):
    """Counts an episode as solved where the hand got to within 40 pixels of (256, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self._benchmark = PushT(PushT.default_view, {})

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": "pusht"}]

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"actions": DimSpec("actions", 2, "absolute")}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"states": DimSpec("states", 2, "absolute")}

    def reset(self, task: dict[str, Any]) -> np.ndarray:
        return self._benchmark.reset("pusht", int(task.get("episode_idx", 0)))

    def step(self, action: dict[str, Any]) -> StepResult:
        first = np.asarray(action["actions"], np.float32).reshape(-1, 2)[0]
        state = self._benchmark.step(first).state
        near = bool(np.linalg.norm(state - 256) < 40)
        return StepResult(state, 0.0, near, {"near": near})

    def make_obs(self, raw_obs: np.ndarray, task: dict[str, Any]) -> dict[str, Any]:
        return {
            "images": {"front": self._benchmark.render()["top"]},
            "states": raw_obs,
            "task_description": "push the grey T onto the green T",
        }

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": bool(step_result.info.get("near"))}
