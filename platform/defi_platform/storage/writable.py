"""Whether a job can write its output, found before anything starts."""

from __future__ import annotations

import uuid

from defi_platform.errors import ConfigError
from defi_platform.storage import filesystem
from defi_platform.storage.filesystem import StorageError


def check_writable(folder: str, key: str = "output") -> None:
    """Writes a small file into a folder and deletes it; a folder that was not there is not there afterwards.

    Args:
        folder: local or remote.
        key: of the config that names it, for the message.

    Raises:
        ConfigError: the name is empty.
        StorageError: it cannot be written.
    """
    if not folder.strip():
        raise ConfigError(f"{key} is empty; name a folder.")
    existed = filesystem.is_folder(folder)
    probe = filesystem.join(folder, f"write-test-{uuid.uuid4().hex[:8]}")
    try:
        filesystem.write_text(probe, "")
        filesystem.delete(probe)
        if not existed and not filesystem.is_remote(folder):
            filesystem.local_path(folder).rmdir()
    except OSError as error:
        raise StorageError(
            f"{key}={folder} cannot be written: {error}. Choose another folder, or change its permissions."
        ) from error
