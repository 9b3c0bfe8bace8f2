"""What a validation computes: of which samples, how many, and how sure its figures are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from defi_platform.config import CorpusConfig, FinetuneConfig, PretrainConfig
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.errors import ConfigError
from defi_platform.storage import write_text
from defi_platform.train.config_checks import check_train_config
from defi_platform.train.driver.older_runs import with_meaning
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.recipes.gfdm import clip_figures
from defi_platform.train.recipes.unseen_validation import unseen_by, unseen_line
from defi_platform.train.validation.loss import Validator

SAMPLES = 7


class Gathered:
    """A rank's side of the exchange with the others, whose sums are added afterwards."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        return {name: float(value) / self.world_size for name, value in values.items()}


def validated(config: PretrainConfig, model: torch.nn.Module, world_size: int) -> tuple[float, list[int]]:
    """The validation loss of all ranks, and the sizes of all batches that they computed."""
    loss, sizes = 0.0, []
    for rank in range(world_size):

        def forward(batch: dict[str, Any], generators: list[torch.Generator]) -> dict[str, Tensor]:
            sizes.append(len(batch["sample"]))
            outputs: dict[str, Tensor] = model(batch, generators)
            return outputs

        engine: Any = SimpleNamespace(module=model, device=torch.device("cpu"), noise="cpu", forward=forward)
        ranks: Any = Gathered(rank, world_size)
        loss += Validator(tiny.TinyRecipe(config), engine, ranks).run()["loss"]
    return loss, sizes


def test_a_validation_is_of_the_same_samples_whatever_the_micro_batch_and_the_number_of_workers(
    run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = tiny.TinyModel(0.1).eval()
    x = torch.stack([tiny._values("validation", k) for k in range(SAMPLES)])
    noise = sample_generators(0, "validation", list(range(SAMPLES)))
    with torch.no_grad():
        wanted = float(model({"x": x}, noise)["loss"])
    for micro_batch, world_size, sizes in (
        (1, 1, [1] * 7),
        (3, 1, [3, 3, 1]),
        (100, 1, [7]),
        # A rank that has run out repeats a batch: under ZeRO 3 all of them take part.
        (2, 3, [2, 2, 2, 2, 2, 1]),
        (1, 3, [1] * 9),
    ):
        config = run_config(
            tmp_path, micro_batch=micro_batch, validation_samples=SAMPLES, export_weights="raw"
        )
        loss, found = validated(config, model, world_size)
        assert loss == pytest.approx(wanted, rel=1e-6) and found == sizes, (micro_batch, world_size)


def test_validations_and_sampled_clips_have_at_least_one_sample(
    run_config: Callable[..., PretrainConfig],
) -> None:
    for name in ("validation_samples", "sampled_clips"):
        with pytest.raises(ConfigError, match=rf"train\.{name} is 0; at least 1"):
            check_train_config(run_config(Path("run"), **{name: 0}).train)


def test_a_validation_that_was_counted_in_micro_batches_is_of_as_many_samples() -> None:
    older = with_meaning({"train": {"micro_batch": 6, "validation_batches": 32, "export_weights": "raw"}})
    assert older["train"] == {"micro_batch": 6, "validation_samples": 192, "export_weights": "raw"}
    assert with_meaning(older) == older


def test_intervals_of_picture_quality_are_over_episodes_and_differences_are_of_the_same_clips() -> None:
    # 32 clips of two episodes, which differ by 10 dB; the prediction is 1 dB better than a still picture in each.
    still = torch.tensor([20.0, 30.0] * 16)
    found = clip_figures({"psnr_still": still, "psnr_1_step": still + 1}, ["a", "b"] * 16)
    assert (found["clips"], found["episodes"]) == (32, 2)
    assert found["psnr_1_step"] == 26 and found["psnr_1_step_over_still"] == 1
    assert found["intervals"]["psnr_1_step"] == [21, 31], "all clips of an episode are drawn together"
    assert found["intervals"]["psnr_1_step_over_still"] == [1, 1]
    apart = clip_figures({"psnr_still": still}, [str(number) for number in range(32)])
    low, high = apart["intervals"]["psnr_still"]
    assert 22 < low < 24 < 26 < high < 28, "about two standard errors of 5 / sqrt(32) dB"
    alone = clip_figures({"psnr_still": still}, ["a"] * 32)
    assert alone["psnr_still"] == 25 and alone["intervals"]["psnr_still"] == [None, None]


def test_a_policy_says_whether_pretraining_saw_what_it_is_validated_on(tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> str:
        write_text(str(tmp_path / name / "config.yaml"), json.dumps(settings))
        return str(tmp_path / name / "model")

    split = {"split": str(tmp_path / "split")}
    kept, converted = run("gfdm", data=split), str(tmp_path / "converted")
    config = FinetuneConfig(gfdm=kept, gidm=converted)
    config.data.split = split["split"]
    assert unseen_by(config) == {"gfdm": True, "gidm": False}
    assert "the pretraining of gidm saw" in unseen_line(config)
    config.gidm = run("gidm", data=split, model={"init_from": kept})
    assert unseen_by(config) == {"gfdm": True, "gidm": True}
    assert unseen_line(config) == "validation: episodes that no pretraining saw (data.split)"
    # What a model started from has seen, it has seen.
    config.gidm = run("on", data=split, model={"init_from": converted})
    assert unseen_by(config) == {"gfdm": True, "gidm": False}
    config.gidm = kept
    config.model.init_from = run("policy", data=split, gfdm=kept, gidm=converted)
    assert unseen_by(config) == {"gfdm": True, "gidm": True, "init_from": False}
    config.model.init_from = None
    config.gidm = run("other", data=split | {"corpora": {"videos": {"path": "/videos"}}})
    assert not unseen_by(config)["gidm"], "the split was begun anew: it does not know the run's corpus"
    config.data.split = None
    assert not any(unseen_by(config).values())


def test_a_policy_says_when_its_validation_is_another_trainings_corpus(tmp_path: Path) -> None:
    config = FinetuneConfig(gfdm=str(tmp_path / "run/model"), gidm=str(tmp_path / "run/model"))
    config.data.split = str(tmp_path / "split")
    config.data.corpora = {"official": CorpusConfig(path="/official")}
    write_text(str(tmp_path / "run/config.yaml"), json.dumps({"data": {"split": config.data.split}}))
    project, positions = ProjectSplit(config.data.split), np.arange(1, 21, dtype=np.uint64) << np.uint64(59)
    held = project.decide("videos", positions, positions, 0.2)
    official = held.copy()
    project.decide("official", positions + np.uint64(1), positions, 0.2, named=official)
    assert all(unseen_by(config).values())
    official[np.flatnonzero(~held)[:2]] = True
    project.decide("official", positions + np.uint64(1), positions, 0.2, named=official)
    assert not any(unseen_by(config).values())
    assert "validation: 2 of the episodes" in unseen_line(config)
