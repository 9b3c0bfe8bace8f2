"""A run reads the version of the manifest that it began with, whatever is ingested while it trains or stands still."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import write_video
from in_process import prepare, train_here, work
from torch import Tensor, nn

from defi_platform.config import CorpusConfig, DataConfig, ModelConfig, PretrainConfig
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.manifest.commit_marker import prune_tables
from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver.run import dry_run_all
from defi_platform.train.recipe import EvalReport
from defi_platform.train.recipes.gfdm import GFDMRecipe

SEEN: list[list[str]] = []
"""Video ids of each training batch."""


class Brightness(nn.Module):
    """Learns the mean of the frames it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Linear(1, 1)

    def forward(self, batch: dict[str, Any], generator: list[torch.Generator]) -> dict[str, Tensor]:
        if self.training:
            SEEN.append(batch["video_id"])
        mean = batch["frames"].float().mean() / 255
        return {"loss": (self.level(torch.ones(1, 1)) - mean).float().pow(2).mean()}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


class BrightnessRecipe(GFDMRecipe):
    """GFDM's samples for a model of two numbers."""

    def build_without_cache(self) -> nn.Module:
        return Brightness()

    def text_encoders(self, model: nn.Module) -> list[Any]:
        return []

    def cost(self) -> None:  # type: ignore[override]
        return None

    def validation_counts(self, outputs: dict[str, Tensor]) -> None:
        return None

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        return EvalReport()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six videos."""
    for number in range(6):
        write_video(tmp_path / "corpus" / f"{number}.mp4", range(number * 30, number * 30 + 12))
    return tmp_path / "corpus"


@pytest.fixture
def recipe(
    corpus: Path, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> Callable[..., BrightnessRecipe]:
    """Makes the recipe of a run: its name, its steps, changes to `data`."""

    def make(name: str = "run", steps: int = 4, **change: Any) -> BrightnessRecipe:
        data = DataConfig(
            corpora={"c": CorpusConfig(path=str(corpus))},
            manifest=str(tmp_path / "manifest"),
            height=16, width=16, clip_frames=2, clip_span_s=0.3, holdout=0.2, **change,
        )  # fmt: skip
        config = run_config(tmp_path / name, steps=steps, checkpoint_every=2)
        model = ModelConfig(overrides={"frames": 2, "height": 16, "width": 16})
        return BrightnessRecipe(dataclasses.replace(config, data=data, model=model))

    return make


def seen(run: Callable[[], object]) -> list[list[str]]:
    SEEN.clear()
    run()
    return list(SEEN)


def test_a_run_reads_the_videos_it_began_with_until_it_is_asked_to_take_in_new_ones(
    process_group: None,
    recipe: Callable[..., BrightnessRecipe],
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = seen(lambda: train_here(recipe("whole", steps=6)))

    # Another job's ingest after the driver's, before the workers open the manifest.
    first = recipe(steps=4)
    prepare(first)
    begun = first.data_version()["data"]
    for number in range(6, 9):
        write_video(corpus / f"{number}.mp4", range(12))
    replaced, *others = sorted({video for batch in whole for video in batch})
    (corpus / replaced).unlink()
    shutil.copy(corpus / others[0], corpus / replaced)
    newest = ingest(first.config.data)
    assert newest.tables != begun
    parts = seen(lambda: work(first))
    (position,) = {checkpoints.committed(first.config.train.output)[0].position.data["data"]["c"]}
    assert position == begun["c"]

    capfd.readouterr()
    resumed = recipe(steps=6)
    parts += seen(lambda: train_here(resumed))
    said = capfd.readouterr().out
    assert "corpus c has 9 videos, 6 when this run began: 3 new, 1 in another version of their file" in said
    assert "data.take_in_new=true takes in the new ones" in said
    # The file that was replaced is another one now, so a video that was there from the beginning stands in for it.
    assert [len(batch) for batch in parts] == [len(batch) for batch in whole]
    assert all(
        now == then or (then == replaced and now in others)
        for batch, before in zip(parts, whole, strict=True)
        for now, then in zip(batch, before, strict=True)
    )
    card = json.loads((tmp_path / "run" / "run_card.json").read_text())
    assert card["data_version"] == {"data": begun}
    epoch = sum(resumed.plan("train").samples_per_epoch.values())
    assert epoch % 9 == 0 and epoch <= 6 * 9, "nine starts in each of the videos from before"
    assert f"data: train: {epoch} samples per epoch" in dry_run_all([recipe(steps=8)])[0].lines

    taken = recipe(steps=20, take_in_new=True)
    later = seen(lambda: train_here(taken))
    said = capfd.readouterr().out
    assert "3 new, 1 in another version of their file; taken in from here on" in said
    assert "data.take_in_new: the samples from step 6 on are of other videos" in said
    assert taken.data_version()["data"] == newest.tables
    assert {"6.mp4", "7.mp4", "8.mp4"} & {video for batch in later for video in batch}
    train_here(recipe(steps=22))


def test_a_run_whose_version_is_gone_says_so_before_it_starts(
    process_group: None, recipe: Callable[..., BrightnessRecipe], corpus: Path
) -> None:
    train_here(recipe(steps=2))
    write_video(corpus / "9.mp4", range(12))
    resumed = recipe(steps=4)
    ingest(resumed.config.data)
    assert prune_tables(resumed.config.data.manifest, "c", older_than_days=-1.0)
    with pytest.raises(
        CheckpointError, match=r"cannot go on with the videos.*is gone.*data\.take_in_new=true"
    ):
        prepare(resumed)
    train_here(recipe(steps=4, take_in_new=True))
