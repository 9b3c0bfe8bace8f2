"""Updates that are left out because of one bad batch: at the end of a run, before a stop, and under fp16."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from deepspeed.accelerator import get_accelerator
from in_process import prepare, train_here, work
from test_engine import engine_of

from defi_platform.config import PretrainConfig
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.stop_request import request_stop
from defi_platform.train.worker.divergence_policy import DivergencePolicy, UpdateDecision

Make = Callable[..., PretrainConfig]
STEPS = 4


class SpoiledRecipe(tiny.TinyRecipe):
    """The samples of some steps are no numbers; before one of them somebody asks the run to stop."""

    def __init__(
        self, config: PretrainConfig, bad: set[int], stop_at: int = 0, diverge_at: int | None = None
    ):
        super().__init__(config, diverge_at=diverge_at)
        self.bad, self.stop_at = bad, stop_at

    def stream(self, plan: str, shard: Any) -> Any:
        for batch in super().stream(plan, shard):
            step = batch["sample"][0].item() // self.config.train.global_batch + 1
            if step in self.bad:
                batch["x"] *= math.nan
            if step == self.stop_at:
                request_stop(self.config.train.output)
            yield batch


def short(make: Make, run: Path) -> PretrainConfig:
    return make(run, steps=STEPS, micro_batch=8, validation_samples=8, checkpoint_every=3)


def test_a_run_whose_last_update_is_skipped_is_complete(
    process_group: None, run_config: Make, tmp_path: Path
) -> None:
    summary = train_here(SpoiledRecipe(short(run_config, tmp_path), {STEPS}))
    assert summary.values["skipped_updates"] == 1
    assert checkpoints.committed(str(tmp_path))[0].step == STEPS
    assert math.isfinite(summary.values["validation"]["last"]["loss"])


def test_a_run_whose_weights_are_ruined_before_the_last_update_has_diverged(
    process_group: None, run_config: Make, tmp_path: Path
) -> None:
    recipe = SpoiledRecipe(short(run_config, tmp_path), set(), diverge_at=STEPS - 1)
    prepare(recipe)
    kind, message = work(recipe)["error"]
    assert kind == "Diverged" and "samples 24 to 31" in message
    assert not (tmp_path / "summary.json").exists()


def test_a_request_to_stop_in_a_skipped_update_leaves_a_checkpoint_of_that_step(
    process_group: None, run_config: Make, tmp_path: Path
) -> None:
    recipe = SpoiledRecipe(short(run_config, tmp_path), {2}, stop_at=2)
    prepare(recipe)
    assert work(recipe) == {"stopped": 2}
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [2]
    recipe.bad = set()
    recipe.stop_at = 0
    assert train_here(recipe).values["resumed_from"] == 2
    assert [row["step"] for row in tiny.rows(tmp_path, "skipped")] == [2]


def test_a_checkpoint_that_was_due_in_a_skipped_update_follows_in_the_next(
    process_group: None, run_config: Make, tmp_path: Path
) -> None:
    config = short(run_config, tmp_path)
    config.train.steps = 6
    train_here(SpoiledRecipe(config, {3}))
    # 3 was due; 6 is the last one.
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [6, 4]


def test_a_stop_with_ruined_weights_leaves_no_checkpoint_of_them(
    process_group: None, run_config: Make, tmp_path: Path
) -> None:
    recipe = SpoiledRecipe(short(run_config, tmp_path), set(), stop_at=2, diverge_at=1)
    prepare(recipe)
    assert work(recipe) == {"stopped": 2}
    assert not checkpoints.committed(str(tmp_path))
    assert "no checkpoint" in json.loads((tmp_path / "status.json").read_text())["phase"]


def test_fp16_whose_loss_scale_has_come_to_its_lowest_skips_like_the_others(
    process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    engine = engine_of(1, "fp16", max_skipped_in_a_row=None)
    scaler: Any = engine.engine.optimizer.loss_scaler
    scaler.cur_scale, scaler.cur_hysteresis = 2.0, 1
    weights = {name: values.clone() for name, _, values in engine.master_fragments()}
    policy, decisions = DivergencePolicy("fp16"), []

    def update(values: torch.Tensor) -> bool:
        applied = True
        for micro in range(2):
            generators = sample_generators(0, "noise", [micro * 2, micro * 2 + 1])
            engine.backward(engine.forward({"x": values}, generators)["loss"])
            applied = engine.step(1e-3)
        return applied

    while not decisions or decisions[-1] is UpdateDecision.SKIP:
        assert not update(torch.full((2, tiny.WIDTH), math.nan))
        decisions.append(policy.decide(False, math.nan, None, lowest_scale=engine.is_at_lowest_scale()))
    assert len(decisions) == 3 and policy.consecutive_skips == 3
    assert all(bool((values == weights[name]).all()) for name, _, values in engine.master_fragments())
    assert update(torch.ones(2, tiny.WIDTH)), "nothing of the bad batches is left in the gradients"
    assert engine.has_finite_weights()
    assert engine.scalars()["cur_hysteresis"] == 1


def test_a_search_for_the_loss_scale_is_no_row_of_bad_updates() -> None:
    policy = DivergencePolicy("fp16")
    found = [policy.decide(False, 1.0, None) for _ in range(16)]
    found += [policy.decide(False, 1.0, None, lowest_scale=True) for _ in range(3)]
    assert found.index(UpdateDecision.STOP) == 18
