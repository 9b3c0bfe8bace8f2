"""The digest of a model folder: names its content, wherever the folder lies."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from defi_models.errors import ModelFolderError
from defi_models.pretrained.folder import CARD_FILE

CHUNK_BYTES = 32 * 2**20
_THREADS = 4


def folder_digest(folder: Path) -> str:
    """SHA-256, as 64 hex digits, of the names and contents of a folder's files.

    The card (README.md) and hidden files do not count: nothing is loaded from them. Files are hashed in chunks of
    CHUNK_BYTES side by side, so that gigabytes of weights take seconds.

    Raises:
        ModelFolderError: a file cannot be read.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.relative_to(folder).as_posix() != CARD_FILE
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
        raise ModelFolderError(
            f"model folder {folder} cannot be read: {error.strerror}: {error.filename}."
        ) from error
    return digest.hexdigest()


def _chunk_digest(part: tuple[Path, int]) -> bytes:
    file, start = part
    with file.open("rb") as stream:
        stream.seek(start)
        return hashlib.sha256(stream.read(CHUNK_BYTES)).digest()
