from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint import read
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.checkpoint.pieces import DamagedCheckpoint
from defi_platform.train.checkpoint.read import Reader
from defi_platform.train.engine.sharded_state import ParameterFragment, Span

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
    reader = Reader(found)
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
    (folder / "shard_00001_of_00002.json").unlink()
    assert checkpoints.committed(str(tmp_path)) == []


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_passed_over(tmp_path: Path) -> None:
    """Runs delete old ones while a validation beside them, or an export, looks for its own."""
    write(tmp_path, 10)
    marker = write(tmp_path, 5) / "shard_00001_of_00002.json"
    marker.unlink()
    marker.symlink_to(tmp_path / "gone")  # still listed, but not there to be read
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [10]


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "gone"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pieces.json"])
def test_a_damaged_shard_or_index_is_recognised(tmp_path: Path, damage: str, suffix: str) -> None:
    shard = write(tmp_path, 5) / f"shard_00001_of_00002{suffix}"
    content = bytearray(shard.read_bytes())
    if damage == "flipped byte":
        content[-3] ^= 1
        shard.write_bytes(content)
    elif damage == "truncated":
        shard.write_bytes(content[:-3])
    else:
        shard.unlink()
    with pytest.raises(DamagedCheckpoint, match="shard_00001_of_00002"):
        Reader(checkpoints.committed(str(tmp_path))[0]).read("param", "w")


def test_a_bit_that_turns_over_on_its_way_once_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 5)
    reads: list[str] = []

    def read_into(uri: str, start: int, buffer: memoryview) -> None:
        whole(uri, start, buffer)
        buffer[1] ^= not reads
        reads.append(uri)

    whole = storage.read_into
    monkeypatch.setattr(storage, "read_into", read_into)
    assert torch.equal(Reader(checkpoints.committed(str(tmp_path))[0]).read("param", "w"), WHOLE)
    assert len(reads) == 3, "two shards, one of them twice"


def without_index(folder: Path) -> None:
    """Makes a checkpoint one of those written before there was an index: a marker holds the SHA-256 of its shard."""
    for index in folder.glob("*.pieces.json"):
        index.unlink()
        marker = folder / index.name.replace(".pieces", "")
        values = json.loads(marker.read_text())
        del values["pieces"], values["pieces_sha256"], values["marker_sha256"]
        values["sha256"] = hashlib.sha256((folder / values["file"]).read_bytes()).hexdigest()
        marker.write_text(json.dumps(values))


def test_a_checkpoint_from_before_there_was_an_index_is_read_and_checked(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    without_index(folder)
    (found,) = checkpoints.committed(str(tmp_path))
    assert torch.equal(Reader(found).read("param", "w"), WHOLE)
    assert torch.equal(Reader(found).read("buffer", "seen"), torch.tensor([3]))
    shard = folder / "shard_00001_of_00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(DamagedCheckpoint, match=r"shard_00001_of_00002\.safetensors is damaged"):
        Reader(found)


WIDTHS = [600_000, 40, 200_000, 700, 400_000, 5, 300_000, 64]
"""Elements of the parameters of a larger state, 12 MB with a moment."""


def large(run: Path, ranks: int) -> list[list[Span]]:
    """A checkpoint of parameters that lie behind one another, shared equally. Returns: each rank's share."""
    total, spans = sum(WIDTHS), []
    for rank in range(ranks):
        first, last = (total * (rank + end) // ranks for end in (0, 1))
        start, fragments = 0, []
        for number, width in enumerate(WIDTHS):
            begin, end = max(first, start) - start, min(last, start + width) - start
            start += width
            if begin < end:
                values = torch.arange(begin, end, dtype=torch.float32)
                kinds = {"param": values, "exp_avg": -values}
                fragments.append(ParameterFragment(f"p{number}", begin, kinds))
        (run / f"scratch_{rank}").mkdir(parents=True)
        shard = checkpoints.write_shard(run / f"scratch_{rank}", rank, ranks, fragments, {})
        folder = run / checkpoints.FOLDER / checkpoints.folder_name(1, "abcdef")
        checkpoints.commit_shard(shard, str(folder), Position(1, 1, MODEL, {"adam_step": 1.0}))
        spans.append(
            [
                Span(kind, one.name, one.start, one.start + len(values))
                for one in fragments
                for kind, values in one.tensors.items()
            ]
        )
    return spans


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each range that is asked for."""
    found: list[int] = []
    whole = storage.read_into

    def read_into(uri: str, start: int, buffer: memoryview) -> None:
        found.append(len(buffer))
        whole(uri, start, buffer)

    monkeypatch.setattr(storage, "read_into", read_into)
    return found


@pytest.mark.parametrize("ranks", [4, 3])
def test_a_rank_reads_its_own_share_in_few_requests(tmp_path: Path, reads: list[int], ranks: int) -> None:
    own = large(tmp_path / "a", 4)
    wanted = own if ranks == 4 else large(tmp_path / "b", ranks)
    reader = Reader(checkpoints.committed(str(tmp_path / "a"))[0])
    for spans in wanted:
        reads.clear()
        covered = 0
        for span, values in reader.spans(spans):
            sign = 1 if span.kind == "param" else -1
            assert torch.equal(values, sign * torch.arange(span.start, span.stop, dtype=torch.float32))
            covered += len(values)
        share = sum(span.stop - span.start for span in spans)
        assert covered == share
        # Pieces are read whole: at another number of ranks those at both ends hold more than is wanted.
        assert sum(reads) <= (1.0 if ranks == 4 else 1.8) * 4 * share
        assert len(reads) <= (1 if ranks == 4 else 3), "not one for each of the pieces"


def test_few_bytes_are_under_way_while_the_first_ones_are_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[int]
) -> None:
    [spans] = large(tmp_path, 1)
    monkeypatch.setattr(read, "REQUEST_BYTES", 1 << 20)
    monkeypatch.setattr(read, "IN_FLIGHT_BYTES", 5 << 20)
    found = Reader(checkpoints.committed(str(tmp_path))[0]).spans(spans)
    next(found)
    deadline = time.monotonic() + 60
    while len(reads) < 2:
        assert time.monotonic() < deadline, "nothing is read ahead"
        time.sleep(0.01)
    time.sleep(0.3)  # for whatever else might be asked for
    assert sum(reads) <= 5 << 20
    assert 1 + sum(1 for _ in found) == len(spans) and sum(reads) >= 8 * sum(WIDTHS)


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
    reader = Reader(checkpoints.committed(str(tmp_path))[0])
    with pytest.raises(CheckpointError, match="'head'"):
        reader.read("param", "head")
    with pytest.raises(CheckpointError, match="10 elements, the model's has 12"):
        reader.read("param", "w", torch.Size([12]))


def test_a_checkpoint_that_was_passed_over_stays_until_enough_newer_ones_are_whole(tmp_path: Path) -> None:
    folder = write(tmp_path, 10)
    write(tmp_path, 5)
    checkpoints.pass_over(checkpoints.committed(str(tmp_path))[0], "a broken disk")
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [5]
    assert "a broken disk" in (folder / checkpoints.PASSED_OVER).read_text()
    write(tmp_path, 15)
    checkpoints.prune(str(tmp_path), keep=2, unfinished=True)
    assert folder.exists()
    write(tmp_path, 20)
    checkpoints.prune(str(tmp_path), keep=2, unfinished=False)
    assert not folder.exists()


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step, loss in ((5, 0.3), (10, 0.1), (15, 0.2), (20, None)):
        write(tmp_path, step, loss=loss)
    checkpoints.prune(str(tmp_path), keep=1, unfinished=False, keep_best=True)
    assert [found.step for found in checkpoints.committed(str(tmp_path))] == [20, 10]


def test_checkpoints_live_on_any_store(tmp_path: Path) -> None:
    write(tmp_path, 5, target="memory://runs/a/checkpoints/step_000000005_abcdef")
    (found,) = checkpoints.committed("memory://runs/a")
    assert torch.equal(Reader(found).read("param", "w"), WHOLE)
    checkpoints.prune("memory://runs/a", keep=0, unfinished=True)
    assert checkpoints.committed("memory://runs/a") == []
