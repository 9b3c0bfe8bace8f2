"""Asynchronous validation, with a real Ray task on real checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import tiny
import torch
from in_process import train_here
from torch import nn

from defi_platform import storage
from defi_platform.config import FinetuneConfig, PretrainConfig
from defi_platform.errors import ConfigError
from defi_platform.train.config_checks import check_train_config
from defi_platform.train.recipe import EvalReport
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.validation.async_task import AsyncValidation

STARTED: list[ray.ObjectRef[bytes]] = []
"""Tasks that validate, in their order."""


class ExaminedRecipe(tiny.TinyRecipe):
    """Looks at step 5 while training waits before step 9, fails over step 10, which step 15 finds under way."""

    evaluated_samples = 2

    def after_update(self, engine: Any, step: int) -> dict[str, float]:
        run = Path(self.config.train.output)
        if step == 9:
            tiny.wait_for(run / "media" / "5.txt")
            assert ray.wait(STARTED[:1], timeout=120)[0], "the answer is on its way to the worker"
        if step == 16:
            (run / "past_15").touch()
        return super().after_update(engine, step)

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        if step == 10:
            tiny.wait_for(Path(folder) / "past_15")
            raise ValueError("no opinion on step 10")
        assert not model.training and batch["x"].shape == (2, tiny.WIDTH)
        with torch.no_grad():
            loss = float(model(batch, [torch.Generator().manual_seed(0)] * 2)["loss"])
        storage.write_text(storage.join(folder, f"media/{step}.txt"), str(loss))
        return EvalReport([f"media/{step}.txt"], {"examined_loss": loss})


@pytest.mark.slow
def test_an_async_validation_evaluates_checkpoints_and_never_stops_training(
    ray_cluster: None,
    process_group: None,
    run_config: Callable[..., PretrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    STARTED.clear()
    start = AsyncValidation.start_if_due

    def recorded(self: AsyncValidation, step: int) -> None:
        start(self, step)
        if self.step == step and self._task is not None:
            STARTED.append(self._task)

    monkeypatch.setattr(AsyncValidation, "start_if_due", recorded)
    config = run_config(tmp_path / "run", steps=17, async_validation_every=5, keep_checkpoints=1)
    summary = train_here(ExaminedRecipe(config)).values
    assert summary["async_validations"] == {"done": 1, "failed": 1, "left_out": 1}
    (row,) = tiny.rows(tmp_path / "run", "async_validation")
    assert row["of_step"] == 5 and row["step"] >= 8
    assert row["examined_loss"] == float((tmp_path / "run" / "media" / "5.txt").read_text())
    assert summary["examined_loss"] < row["examined_loss"], "the model of the last step has learned more"
    assert sorted(tiny.losses(tmp_path / "run")) == list(range(1, 18))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["media"] == ["media/17.txt"]


def test_a_rhythm_that_meets_no_checkpoints_is_refused(run_config: Callable[..., PretrainConfig]) -> None:
    config = run_config(Path("run"), async_validation_every=7, checkpoint_every=5)
    with pytest.raises(
        ConfigError, match=r"async_validation_every=7 is no multiple of .*checkpoint_every=5.*Set it to 5"
    ):
        check_train_config(config.train)


def test_a_gidm_that_has_nothing_to_be_probed_on_is_refused(
    run_config: Callable[..., PretrainConfig],
) -> None:
    config = run_config(Path("run"), async_validation_every=5)
    with pytest.raises(
        ConfigError, match=r"async_validation_every=5 without train\.probe.*train\.probe\.corpora"
    ):
        GIDMRecipe(config)


def test_a_policy_that_would_not_be_measured_is_refused(run_config: Callable[..., PretrainConfig]) -> None:
    train = run_config(Path("run"), async_validation_every=5).train
    with pytest.raises(ConfigError, match=r"policy: train\.async_validation_every=5.* Set .*=0"):
        PolicyRecipe(FinetuneConfig(train=train, gfdm="gfdm", gidm="gidm"))
