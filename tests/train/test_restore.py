"""A resume takes the newest checkpoint that can be used, and changes nothing when there is none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as distributed
from in_process import work
from ranks import Ranks

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
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.engine.sharded_state import MOMENTS

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


def test_a_resume_reads_each_marker_once_to_choose_and_once_to_delete(
    recipe: tiny.TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    whole = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: (reads.append(uri), whole(uri))[1])
    assert restored(recipe) == 10
    markers = [uri for uri in reads if not uri.endswith("pieces.json")]
    assert len(markers) == 2 * len(STEPS) and len(reads) == len(markers) + 1


@pytest.mark.parametrize("cut", [False, True])
def test_a_checkpoint_whose_marker_is_damaged_is_passed_over_and_kept(
    cut: bool, recipe: tiny.TinyRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = shard_of(recipe, 10).with_suffix(".json")
    text = marker.read_text()
    marker.write_text(text[:-9] if cut else text.replace('"samples": 80', '"samples": 88'))
    assert restored(recipe) == 5
    assert "its marker shard_00000_of_00001.json is" in capsys.readouterr().out
    assert marker.exists() and (marker.parent / checkpoints.PASSED_OVER).exists()


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


def resume_from_own_share(run: Path, config: PretrainConfig) -> None:
    """Trains a step, saves, and resumes at the same number of ranks: what is read, and what comes of it."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    communicator = Communicator(use_gpu=False)
    whole = storage.read_into
    for stage in (0, 1, 2, 3):
        train = replace(config.train, output=str(run / str(stage)), zero_stage=stage)
        recipe = tiny.TinyRecipe(replace(config, train=train))
        engine = TrainingEngine(recipe.build(), train, world_size)
        for _ in range(engine.accumulation):
            x = torch.stack([tiny._values("train", k) for k in (2 * rank, 2 * rank + 1)])
            engine.backward(engine.forward({"x": x}, sample_generators(0, "noise", [0, 1]))["loss"])
            assert engine.step(1e-2)
        saved = list(engine.fragments())
        seen = {} if rank else {"seen": torch.tensor([4])}
        local = run / f"local_{stage}_{rank}"
        local.mkdir(parents=True)
        shard = checkpoints.write_shard(local, rank, world_size, saved, seen)
        folder = storage.join(train.output, checkpoints.FOLDER, checkpoints.folder_name(1, "abcdef"))
        checkpoints.commit_shard(shard, folder, Position(1, 8, {}, engine.scalars()))
        communicator.barrier()
        reads: list[int] = []

        def read_into(uri: str, start: int, buffer: memoryview, reads: list[int] = reads) -> None:
            reads.append(len(buffer))
            whole(uri, start, buffer)

        with mock.patch.object(storage, "read_into", read_into):
            fresh, position = restore_engine(recipe, recipe.build(), "", communicator)
        assert position and fresh.scalars() == engine.scalars()
        for piece, there in zip(saved, fresh.fragments(), strict=True):
            assert piece.tensors.keys() == there.tensors.keys() == {"param", *MOMENTS, "ema"}
            for kind, value in piece.tensors.items():
                assert torch.equal(there.tensors[kind], value), (stage, piece.name, kind)
        share = sum(4 * len(value) for piece in saved for value in piece.tensors.values())
        assert share <= sum(reads) <= 1.2 * share, f"ZeRO {stage}: {sum(reads)} bytes read of {share}"


def test_a_rank_reads_no_more_than_its_share_and_gets_it_back_bit_for_bit(
    two_ranks: Ranks, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    two_ranks.run(functools.partial(resume_from_own_share, tmp_path, run_config(tmp_path)))


class OnOneMachineOnly(tiny.TinyRecipe):
    """A recipe whose model folder the second rank does not see."""

    def build(self) -> torch.nn.Module:
        if distributed.get_rank() == 1:
            raise CheckpointError("model folder /models does not exist.")
        return super().build()


def start_without_a_folder(config: PretrainConfig) -> None:
    outcome = work(OnOneMachineOnly(config))
    kind, message = outcome["error"]
    assert kind == "CheckpointError" and message.startswith("on ") and "/models" in message


def test_what_one_rank_alone_does_not_find_ends_all_of_them(
    two_ranks: Ranks, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    """The others would wait for it in the next exchange, until the process group's half hour is over."""
    two_ranks.run(functools.partial(start_without_a_folder, run_config(tmp_path)))
