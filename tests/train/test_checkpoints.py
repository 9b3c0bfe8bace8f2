from __future__ import annotations

from pathlib import Path

import pytest
import torch

from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.format import DamagedCheckpoint, Position, Reader
from defi_platform.train.engine.deepspeed_engine import ParameterFragment

WHOLE = torch.arange(10.0)
MODEL = {"kind": "tiny", "preset": "nano", "overrides": {}}


def write(
    run: Path, step: int, ranks: tuple[int, ...] = (0, 1), loss: float | None = None, target: str = ""
) -> Path:
    """A checkpoint of two ranks: `w` is split between them at element 6."""
    folder = run / checkpoints.FOLDER / checkpoints.folder_name(step, "abcdef")
    for rank in ranks:
        scratch = run / f"scratch_{step}_{rank}"
        scratch.mkdir(parents=True)
        start, stop = ((0, 6), (6, 10))[rank]
        pieces = [ParameterFragment("w", start, {"param": WHOLE[start:stop], "exp_avg": -WHOLE[start:stop]})]
        buffers = {"seen": torch.tensor([3])} if rank == 0 else {}
        position = Position(step, step * 8, MODEL, {"adam_step": float(step)}, validation_loss=loss)
        shard = checkpoints.write_shard(scratch, rank, 2, pieces, buffers)
        checkpoints.commit_shard(shard, str(target or folder), position)
    return folder


def test_shards_of_all_ranks_come_back_as_whole_tensors(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (found,) = checkpoints.committed(str(tmp_path))
    with Reader(found) as reader:
        assert torch.equal(reader.read("param", "w", torch.Size([2, 5])), WHOLE.view(2, 5))
        assert torch.equal(reader.read("exp_avg", "w"), -WHOLE)
        assert torch.equal(reader.read("buffer", "seen"), torch.tensor([3]))
        assert reader.position == Position(5, 40, MODEL, {"adam_step": 5.0})


def test_a_checkpoint_that_lacks_a_rank_is_never_picked(tmp_path: Path) -> None:
    write(tmp_path, 5)
    write(tmp_path, 10, ranks=(0,))
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [5]


def test_a_shard_without_its_marker_is_never_picked(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    next(folder.glob("shard_00001*.json")).unlink()
    assert checkpoints.committed(str(tmp_path)) == []


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_passed_over(tmp_path: Path) -> None:
    """Runs delete old ones while a validation beside them, or an export, looks for its own."""
    write(tmp_path, 10)
    marker = next(write(tmp_path, 5).glob("shard_00001*.json"))
    marker.unlink()
    marker.symlink_to(tmp_path / "gone")  # still listed, but not there to be read
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [10]


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "gone"])
def test_a_damaged_shard_is_recognised(tmp_path: Path, damage: str) -> None:
    shard = next(write(tmp_path, 5).glob("shard_00001*.safetensors"))
    content = bytearray(shard.read_bytes())
    if damage == "flipped byte":
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-3])
    else:
        shard.unlink()
    with pytest.raises(DamagedCheckpoint, match="shard_00001_of_00002"):
        Reader(checkpoints.committed(str(tmp_path))[0])


def test_pruning_keeps_the_newest_and_spares_what_is_still_being_written(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step)
    partial = write(tmp_path, 20, ranks=(1,))
    checkpoints.prune(str(tmp_path), keep=2, unfinished=False)
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [15, 10]
    assert partial.exists()
    checkpoints.prune(str(tmp_path), keep=2, unfinished=True)
    assert not partial.exists()


def test_a_tensor_of_another_model_is_named(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with Reader(checkpoints.committed(str(tmp_path))[0]) as reader:
        with pytest.raises(CheckpointError, match="'head'"):
            reader.read("param", "head")
        with pytest.raises(CheckpointError, match="10 elements, the model's has 12"):
            reader.read("param", "w", torch.Size([12]))


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in ((5, 0.3), (10, 0.1), (15, 0.2), (20, None)):
        write(tmp_path, step, loss=loss)
    checkpoints.prune(str(tmp_path), keep=1, unfinished=False, keep_best=True)
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [20, 10]


def test_checkpoints_live_on_any_store(tmp_path: Path) -> None:
    write(tmp_path, 5, target="memory://runs/a/checkpoints/step_000000005_abcdef")
    (found,) = checkpoints.committed("memory://runs/a")
    with Reader(found) as reader:
        assert torch.equal(reader.read("param", "w"), WHOLE)
    checkpoints.prune("memory://runs/a", keep=0, unfinished=True)
    assert checkpoints.committed("memory://runs/a") == []
