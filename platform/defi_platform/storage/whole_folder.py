"""Folders that appear whole or not at all, and readers that reject an upload that was cut short.

Local folders are written under another name and renamed. Object stores cannot rename: there a marker is written first and deleted last,
and whatever reads the folder rejects it as long as the marker exists.
"""

from __future__ import annotations

import contextlib
import functools
import posixpath
from collections.abc import Collection, Iterator
from pathlib import Path

from defi_models.pretrained.replace_folder import replaced_folder
from defi_platform.storage.filesystem import below, delete, get_file, is_remote, join, local_path, names
from defi_platform.storage.parallel_read import side_by_side
from defi_platform.storage.remote import StorageError, attempt, filesystem
from defi_platform.storage.scratch import scratch

INCOMPLETE = "_INCOMPLETE"
"""Empty object in a remote folder whose upload has begun and not ended."""


@contextlib.contextmanager
def committed_folder(uri: str) -> Iterator[Path]:
    """Yields a local folder to fill; when the block ends without error it stands at `uri`, whole.

    A folder that stood there before is replaced. After an error in the block `uri` is as it was. An upload that is
    cut short leaves a folder that `ensure_complete` rejects, until the next one ends.
    """
    if is_remote(uri):
        with scratch("upload") as staging:
            yield staging
            _upload(staging, uri)
    else:
        with replaced_folder(local_path(uri).absolute()) as fresh:
            yield fresh


def ensure_complete(uri: str, top: Collection[str] | None = None) -> None:
    """Rejects a folder whose upload was cut short.

    Args:
        uri: the folder, local or remote; one that does not exist passes.
        top: names right below it, where they are known.

    Raises: StorageError that names the folder and the fix.
    """
    if INCOMPLETE in (names(uri) if top is None else top):
        raise StorageError(
            f"{uri} was not written to its end: it still holds {INCOMPLETE}. Wait until the job that writes it has "
            "ended, or run that job again."
        )


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yields a local path of a file or folder: the thing itself, or a temporary download of a remote one.

    Raises: StorageError for a folder whose upload was cut short; FileNotFoundError.
    """
    if not is_remote(uri):
        local = local_path(uri)
        if local.is_dir():
            ensure_complete(uri)
        yield local
        return
    fs, path = filesystem(uri)
    with scratch("download") as folder:
        target = folder / (posixpath.basename(uri.rstrip("/")) or "root")
        if attempt(uri, lambda: fs.isdir(path)):
            ensure_complete(uri)
            _download(uri, target)
        else:
            get_file(uri, target)
        yield target


def _download(uri: str, target: Path) -> None:
    """Copies every file below `uri`, each by its own name: drivers take some names of folders for patterns."""
    target.mkdir()

    def copy(found: tuple[str, str]) -> None:
        name, file = found
        parts = [part for part in name.split("/") if part]
        if ".." in parts:
            raise StorageError(f"{file} has a name that leads out of its folder. Rename it.")
        if parts and not name.endswith("/"):
            local = target.joinpath(*parts)
            local.parent.mkdir(parents=True, exist_ok=True)
            get_file(file, local)

    for _ in side_by_side(copy, below(uri), remote=True):
        pass


def _upload(staging: Path, uri: str) -> None:
    """Replaces whatever is at `uri` by the files below `staging`."""
    fs, path = filesystem(uri)
    marker = posixpath.join(path, INCOMPLETE)
    old = names(uri)
    # First and last, so that neither a half-removed nor a half-written folder is taken for a whole one.
    attempt(uri, lambda: fs.pipe_file(marker, b""))
    for name in old:
        if name != INCOMPLETE:
            delete(join(uri, name))
    for file in sorted(found for found in staging.rglob("*") if found.is_file()):
        target = posixpath.join(path, file.relative_to(staging).as_posix())
        attempt(uri, functools.partial(fs.put_file, str(file), target))
    attempt(uri, lambda: fs.rm_file(marker))
