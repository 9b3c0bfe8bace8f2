"""What passes through local disk, and what is left of it when processes die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from defi_platform.storage.scratch import native_scratch

HOLD = """
import sys
from defi_platform.storage.scratch import scratch_folder
folder = scratch_folder("shard")
(folder / "gigabytes").write_text("x")
print(folder, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a scratch folder below `tmp_path` until its input ends, and the folder."""
    process = start(tmp_path)
    assert process.stdout
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.wait()


def start(temporary: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def use_another(temporary: Path) -> None:
    process = start(temporary)
    process.communicate("")
    assert process.returncode == 0


def test_what_a_killed_process_has_left_is_removed_by_the_next(
    holder: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, folder = holder
    use_another(tmp_path)
    assert (folder / "gigabytes").exists(), "its process lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "gigabytes").exists()
    use_another(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_process_that_ends_leaves_nothing(
    holder: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, folder = holder
    process.communicate("")
    assert process.returncode == 0 and not folder.exists()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_libraries_that_ask_tmpdir_themselves_unpack_where_it_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before in (None, str(tmp_path)):
        monkeypatch.delenv("TMPDIR", raising=False)
        if before:
            monkeypatch.setenv("TMPDIR", before)
        with pytest.raises(ValueError, match="of a library"), native_scratch("package"):
            assert f"/defi-{os.getuid()}/" in os.environ["TMPDIR"] and Path(os.environ["TMPDIR"]).is_dir()
            raise ValueError("of a library")
        assert os.environ.get("TMPDIR") == before
