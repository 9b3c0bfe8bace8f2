"""Replacement of a local folder: readers see the old one or the new one, never a part and never none.

Standard library only: storage of the platform uses it in processes that never import torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

_HERE = -100
"""AT_FDCWD: paths are relative to the working directory."""
_EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2(2)."""
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP)
"""Errors of kernels, containers and file systems, such as NFS, that cannot exchange two names."""


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yields a fresh folder to fill, which takes the place of `target` when the block ends without error.

    Its files get the permissions that new files have, whatever their writers gave them. A `target` that is a link stays
    one: the folder that it leads to is replaced. After an error `target` is as it was, and the fresh folder is gone.

    Raises: NotADirectoryError: `target` is a file.
    """
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; a folder is to be written there. Move it away.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.writing-{uuid.uuid4().hex}"
    fresh.mkdir()
    try:
        yield fresh
        _open_up(fresh)
        if not _put(fresh, target) and not _exchange(fresh, target):
            old = target.parent / f".{target.name}.old-{uuid.uuid4().hex}"
            # A folder that is not empty cannot be renamed over: here there is none for a moment.
            target.rename(old)
            fresh.rename(target)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def remove_leftovers(target: Path) -> None:
    """Removes the folders of writers that were killed; call it only where nobody else replaces `target` now."""
    for kind in ("writing", "old"):
        for folder in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _put(fresh: Path, target: Path) -> bool:
    """Renames a folder. Returns: False where there is one of that name, also of a writer that has just been faster."""
    if target.exists():
        return False
    try:
        fresh.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _open_up(folder: Path) -> None:
    """Gives all below a folder the permissions of the umask, which the folder itself was made with.

    safetensors and others write files that only their owner can read.
    """
    mode = folder.stat().st_mode & 0o777
    for parent, folders, files in os.walk(folder):
        for path in [Path(parent, name) for name in folders + files]:
            if path.is_symlink():
                continue
            before = stat.S_IMODE(path.stat().st_mode)
            # Who may run a file, and which group the files of a folder get, stays as it was.
            path.chmod((mode if path.is_dir() else mode & (0o666 | before)) | (before & 0o7000))


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step. Returns: False where kernel or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in _NO_EXCHANGE:
        return False
    raise OSError(error, os.strerror(error), str(other))
