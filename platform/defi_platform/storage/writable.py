"""Whether a job can write its output, found before anything starts."""

from __future__ import annotations

import uuid

from defi_platform.errors import ConfigError
from defi_platform.storage import filesystem
from defi_platform.storage.filesystem import StorageError


def check_writable(folder: str, key: str = "output") -> None:
    """Writes a small file into a folder, or where that is still to be made beside it, and deletes it.

    Args:
        folder: local or remote.
        key: of the config that names it, for the message.

    Raises:
        ConfigError: the name is empty.
        StorageError: it cannot be written.
    """
    if not folder.strip():
        raise ConfigError(f"{key} is empty; name a folder.")
    probe = filesystem.join(_existing(folder), f"write-test-{uuid.uuid4().hex[:8]}")
    try:
        filesystem.write_text(probe, "")
        filesystem.delete(probe)
    except OSError as error:
        raise StorageError(
            f"{key}={folder} cannot be written: {error}. Choose another folder, or change its permissions."
        ) from error


def _existing(folder: str) -> str:
    """The folder, or the nearest one above it that is there: what makes and removes a folder races with other jobs."""
    if filesystem.is_remote(folder):
        return folder
    path = filesystem.local_path(folder).absolute()
    return str(next(one for one in (path, *path.parents) if one.exists()))
