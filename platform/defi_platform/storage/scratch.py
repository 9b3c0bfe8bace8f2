"""Temporary folders on local disk.

What a killed process has left there, gigabytes perhaps, the next process that needs one removes.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """Yields a new folder below TMPDIR, which is removed at the end."""
    folder = scratch_folder(purpose)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def scratch_folder(purpose: str) -> Path:
    """Makes a new folder below TMPDIR that the caller removes.

    Raises: OSError, ENOSPC for a full disk too.
    """
    return Path(
        tempfile.mkdtemp(prefix=f"{purpose}-", dir=_process_folder(tempfile.gettempdir(), os.getpid()))
    )


@contextlib.contextmanager
def native_scratch(purpose: str) -> Iterator[None]:
    """Has libraries that make folders below TMPDIR themselves make them where `scratch_folder` does.

    What they leave is removed with this process, or after it was killed. Other threads see the other TMPDIR meanwhile.
    """
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(scratch_folder(purpose))
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


@functools.cache
def _process_folder(temporary: str, process: int) -> Path:
    """Makes the folder of this process, which holds a lock on the file of the same name as long as it lives."""
    parent = Path(temporary) / f"defi-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    _sweep(parent)
    while True:
        lock = parent / f"{process}-{uuid.uuid4().hex[:8]}.lock"
        file = lock.open("x")
        # Some network file systems have no locks: nothing is ever swept there.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another process may have taken it for left over before it was locked.
        if lock.exists():
            break
        file.close()
    folder = lock.with_suffix("")
    folder.mkdir()
    atexit.register(_remove, folder, lock, process, file)
    return folder


def _sweep(parent: Path) -> None:
    """Removes what processes have left that are no more: the lock goes with its process, however that ends."""
    for lock in parent.glob("*.lock"):
        # It is held, or somebody else has just removed it.
        with contextlib.suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()


def _remove(folder: Path, lock: Path, process: int, file: IO[str]) -> None:
    if os.getpid() == process:  # not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
    file.close()
