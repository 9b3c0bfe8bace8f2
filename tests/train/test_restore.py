"""A resume takes the newest checkpoint that can be used, and changes nothing when there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from defi_platform import storage
from defi_platform.config import PretrainConfig
from defi_platform.errors import CheckpointError
from defi_platform.retry import RetryPolicy
from defi_platform.storage.remote import StorageUnavailable
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint import restore
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.checkpoint.restore import restore_engine
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.deepspeed_engine import TrainingEngine

STEPS = (5, 10)


@pytest.fixture
def recipe(process_group: None, run_config: Callable[..., PretrainConfig], tmp_path: Path) -> tiny.TinyRecipe:
    """A run with two checkpoints, whose weights are all their step."""
    recipe = tiny.TinyRecipe(run_config(tmp_path / "run", ema_decay=None))
    run = recipe.config.train.output
    engine = TrainingEngine(recipe.build(), recipe.config.train, world_size=1)
    for step in STEPS:
        fragments = list(engine.fragments())
        for fragment in fragments:
            fragment.tensors["param"].fill_(step)
        shard = checkpoints.write_shard(tmp_path, 0, 1, fragments, {"seen": torch.tensor([8 * step])})
        folder = storage.join(run, checkpoints.FOLDER, checkpoints.folder_name(step, "abcdef"))
        checkpoints.commit_shard(shard, folder, Position(step, 8 * step, {}, {"adam_step": 0.0}))
    return recipe


def restored(recipe: tiny.TinyRecipe) -> int:
    """Step that a resume goes on from."""
    engine, position = restore_engine(recipe, recipe.build(), "", Communicator(use_gpu=False))
    assert position
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            assert (parameter == position.step).all(), f"{name}: the working copy too"
    assert engine.module.get_buffer("seen").item() == 8 * position.step
    return position.step


def shard_of(recipe: tiny.TinyRecipe, step: int) -> Path:
    folder = Path(recipe.config.train.output) / checkpoints.FOLDER / checkpoints.folder_name(step, "abcdef")
    return folder / "shard_00000_of_00001.safetensors"


def damage(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")


def steps(recipe: tiny.TinyRecipe) -> list[int]:
    return [found.step for found in checkpoints.committed(recipe.config.train.output)]


def test_a_damaged_checkpoint_is_passed_over_and_kept(
    recipe: tiny.TinyRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert restored(recipe) == 10
    damage(shard_of(recipe, 10))
    assert restored(recipe) == 5
    assert "damaged" in capsys.readouterr().out
    assert steps(recipe) == [5] and shard_of(recipe, 10).exists()
    assert "SHA-256" in (shard_of(recipe, 10).parent / checkpoints.PASSED_OVER).read_text()


def test_a_checkpoint_that_the_disk_does_not_give_is_passed_over_and_kept(
    recipe: tiny.TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_into(uri: str, start: int, buffer: memoryview) -> None:
        if "000000010" in uri:
            raise OSError(5, "Input/output error")
        whole(uri, start, buffer)

    whole = storage.read_into
    monkeypatch.setattr(storage, "read_into", read_into)
    monkeypatch.setattr(restore, "DISK_ERRORS", RetryPolicy(max_attempts=2, first_pause_s=0.0))
    assert restored(recipe) == 5
    assert shard_of(recipe, 10).exists()


def test_a_store_that_is_away_is_no_reason_to_take_an_older_checkpoint(
    recipe: tiny.TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_into(uri: str, start: int, buffer: memoryview) -> None:
        raise StorageUnavailable(f"{uri}: the store failed 5 times")

    monkeypatch.setattr(storage, "read_into", read_into)
    with pytest.raises(StorageUnavailable, match="cannot be read"):
        restored(recipe)
    assert steps(recipe) == [10, 5]


def test_a_run_without_any_usable_checkpoint_does_not_begin_anew(recipe: tiny.TinyRecipe) -> None:
    for step in STEPS:
        damage(shard_of(recipe, step))
    with pytest.raises(CheckpointError, match="has 2 checkpoints and none can be used"):
        restored(recipe)
    assert steps(recipe) == [10, 5], "nothing was changed"
