"""Checkpoints behind the steps, with real faults: a store that goes away and comes back, a disk that is full."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from s3_server import s3_server

from defi_platform import storage
from defi_platform.storage import StorageError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.async_saver import MAX_PENDING, MAX_WAIT_S, CheckpointSaver
from defi_platform.train.checkpoint.format import Position
from defi_platform.train.checkpoint.read import Reader
from defi_platform.train.engine.collectives import Communicator
from defi_platform.train.engine.sharded_state import ParameterFragment
from defi_platform.train.observability.metrics_log import MetricsLog, read_metrics

Save = Callable[..., None]


def saver_of(run: str, timeout_s: float = 60.0, keep: int = 2, **options: Any) -> CheckpointSaver:
    communicator = Communicator(use_gpu=False)
    return CheckpointSaver(
        "tiny", run, communicator, keep=keep, keep_best=False, timeout_s=timeout_s, **options
    )


def save(saver: CheckpointSaver, step: int, elements: int = 1000, required: bool = False) -> None:
    values = torch.full((elements,), float(step))
    position = Position(step, step, {"kind": "tiny"}, {"adam_step": float(step)})
    saver.save([ParameterFragment("w", 0, {"param": values})], {}, position, required=required)


def steps(run: str) -> list[int]:
    return [found.step for found in checkpoints.committed(run)]


def first_value(run: str) -> float:
    return float(Reader(checkpoints.committed(run)[0]).read("param", "w")[0])


def test_a_checkpoint_holds_the_state_of_its_step_whatever_happens_to_the_weights_later(
    process_group: None, tmp_path: Path
) -> None:
    run, values = str(tmp_path), torch.zeros(100_000)
    saver = saver_of(run)
    saver.save([ParameterFragment("w", 0, {"param": values})], {}, Position(1, 1, {}, {}))
    values.fill_(7.0)
    saver.wait()
    assert steps(run) == [1] and first_value(run) == 0.0


def test_a_checkpoint_counts_only_once_the_metrics_before_it_are_written(
    process_group: None, tmp_path: Path
) -> None:
    run, written = str(tmp_path), threading.Event()
    saver = saver_of(run, before_commit=lambda: assert_within_a_minute(written))
    save(saver, 1)
    time.sleep(0.3)
    assert steps(run) == []
    written.set()
    saver.wait()
    assert steps(run) == [1]


def assert_within_a_minute(event: threading.Event) -> None:
    assert event.wait(60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system can only be mounted by root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_gives_up_older_checkpoints_before_the_newest(
    process_group: None, small_disk: Path
) -> None:
    run = str(small_disk)
    saver = saver_of(run, keep=10)
    for step in range(1, 9):
        save(saver, step, elements=100_000)
        saver.wait()
    assert steps(run)[0] == 8 and first_value(run) == 8.0


def test_a_full_disk_is_waited_for_and_named_when_it_stays_full(
    process_group: None, small_disk: Path
) -> None:
    run, filler = str(small_disk), small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    saver = saver_of(run)
    save(saver, 1, elements=100_000)
    threading.Timer(1.0, filler.unlink).start()
    saver.wait()
    assert steps(run) == [1]

    filler.write_bytes(bytes(1_500_000))
    impatient = saver_of(run, timeout_s=0.5)
    save(impatient, 2, elements=100_000)
    with pytest.raises(StorageError, match=r"No space left on device.*\n?.*Make room"):
        impatient.wait()
    assert steps(run) == [1], "the one before is still whole"


def test_without_room_on_local_disk_a_checkpoint_is_left_out_unless_it_is_needed(
    process_group: None, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    run, filler = str(tmp_path / "run"), small_disk / "filler"
    filler.write_bytes(bytes(1_900_000))
    saver = saver_of(run)
    save(saver, 1, elements=100_000)
    saver.wait()
    assert steps(run) == [] and saver.take_skipped() and not saver.take_skipped(), "reported once"
    threading.Timer(1.0, filler.unlink).start()
    save(saver, 2, elements=100_000, required=True)
    saver.wait()
    assert steps(run) == [2]
    left = [path for path in small_disk.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == [], "nothing is left on local disk"


def test_metrics_of_a_full_disk_are_written_when_there_is_room_again(small_disk: Path) -> None:
    path, filler = str(small_disk / "metrics.jsonl"), small_disk / "filler"
    log = MetricsLog(path, 0)
    filler.write_bytes(bytes(2 << 20)[:2_090_000])
    while os.statvfs(small_disk).f_bavail:
        with filler.open("ab") as file:
            file.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
    for step in range(1, 400):
        log.append({"step": step, "split": "train"})
    threading.Timer(0.5, filler.unlink).start()
    log.close(timeout_s=30.0)
    assert len(read_metrics(path)) == 399


@pytest.mark.slow
def test_a_store_that_is_away_is_waited_for_behind_the_steps(
    process_group: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    storage.forget_connections()
    run = "s3://runs/a"
    with s3_server(port=port):
        import fsspec

        fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{port}").mkdir("runs")
        saver = saver_of(run, timeout_s=120.0)
        save(saver, 1)
        saver.wait()
    began = time.monotonic()
    for step in range(2, 2 + MAX_PENDING):
        save(saver, step)
    assert saver.is_full() and not saver.wait_for_capacity()
    assert time.monotonic() - began < MAX_WAIT_S + 60, "training goes on while the store is away"
    output = ""
    while "cannot be used, trying again" not in output:
        assert time.monotonic() - began < 110, "nobody has noticed that the store is away"
        time.sleep(0.2)
        output += capfd.readouterr().out
    with s3_server(port=port):
        # A new server knows nothing of the old one's bucket: what a store that comes back would still hold.
        fsspec.filesystem("s3", endpoint_url=f"http://127.0.0.1:{port}").mkdir("runs")
        saver.wait()
        assert steps(run)[0] == 1 + MAX_PENDING and not saver.is_full()
    assert "can be used again" in capfd.readouterr().out
    storage.forget_connections()
