"""The digest of a policy folder: names its content in greetings and answers, and fixes it at deployment."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from defi_platform import storage
from defi_platform.config import ServedActingConfig
from defi_platform.errors import CheckpointError
from defi_platform.serve.acting import acting_of, differences, with_config

CHUNK_BYTES = 32 * 2**20
_THREADS = 4
_CARD = "README.md"


def policy_digest(folder: str, acting: ServedActingConfig | None = None) -> str:
    """SHA-256, as 64 hex digits, of the names and contents of a policy folder's files, and of settings over them.

    The card (README.md) and hidden files do not count: nothing is loaded from them. Files are hashed in chunks of
    CHUNK_BYTES side by side, so that gigabytes of weights take seconds.

    Args:
        folder: local or remote; a remote one is downloaded for it.
        acting: settings in place of the folder's; those that differ from them are part of the digest.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: a setting cannot be.
    """
    with storage.local_copy(folder) as local:
        found = folder_digest(Path(local))
        if acting is None or acting == ServedActingConfig():
            return found
        own = acting_of(Path(local))
        other = differences(own, with_config(own, acting))
        return hashlib.sha256(f"{found}:{other}".encode()).hexdigest() if other else found


def folder_digest(folder: Path) -> str:
    """`policy_digest` of a local folder."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.relative_to(folder).as_posix() != _CARD
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    parts = [(file, start) for file in files for start in range(0, max(1, file.stat().st_size), CHUNK_BYTES)]
    digest = hashlib.sha256()
    try:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="digest") as threads:
            for (file, start), part in zip(parts, threads.map(_chunk_digest, parts), strict=True):
                name = file.relative_to(folder).as_posix().encode()
                digest.update(b"%d:%s:%d:" % (len(name), name, start) + part)
    except OSError as error:
        raise CheckpointError(
            f"policy folder {folder} cannot be read: {error.strerror}: {error.filename}."
        ) from error
    return digest.hexdigest()


def _chunk_digest(part: tuple[Path, int]) -> bytes:
    file, start = part
    with file.open("rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(CHUNK_BYTES)).digest()
