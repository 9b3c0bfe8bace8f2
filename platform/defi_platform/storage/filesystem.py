"""Reading, writing and listing of files: local paths, s3:// and any other fsspec URL.

A path is a string: `/data/x`, `relative/x`, `s3://bucket/x`, `memory://x`. Files appear whole or not at all:
local ones are written under another name and renamed, and one put of an object store is atomic by itself.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from defi_platform.storage import s3_listing
from defi_platform.storage.local_walk import LocalWalk, Unreadable
from defi_platform.storage.range_file import RangeFile
from defi_platform.storage.remote import StorageError as StorageError
from defi_platform.storage.remote import attempt, filesystem, protocols, read_range
from defi_platform.storage.remote import forget_connections as forget_connections

PATTERN = frozenset("[*?")
"""Characters for whose sake drivers take a path for a pattern, in requests about many files at once."""


STAMPED = re.compile(r"\d+-.")
"""The beginning of an entry's version."""


class Entry(NamedTuple):
    """One file of a listing."""

    uri: str
    name: str
    """Path below the folder of the listing, with forward slashes."""
    bytes: int
    version: str
    """Size, and the store's etag or else the modification time: changes when the content does."""


class FileChanged(StorageError):
    """A file that is another one than the one that was listed under its name."""


def is_remote(uri: str) -> bool:
    """True for URLs of another store than the local file system."""
    return "://" in uri and not uri.startswith(("file://", "local://"))


def local_path(uri: str) -> Path:
    """The local path behind `uri`; only for URIs that are not remote."""
    return Path(uri.split("://", 1)[1] if "://" in uri else uri).expanduser()


def absolute(uri: str) -> str:
    """The same file or folder, independent of the working directory of the process that reads it."""
    return uri.rstrip("/") if is_remote(uri) else str(local_path(uri).absolute())


def join(base: str, *parts: str) -> str:
    """`base/part/...` with forward slashes, for local paths and URLs alike; a part never replaces what stands before it.

    Names of objects may begin with a slash, as in `s3://bucket/folder//name`.
    """
    for part in parts:
        base = f"{base}{part}" if not base or base.endswith("/") else f"{base}/{part}"
    return base


def exists(uri: str) -> bool:
    """True when there is a file or folder at `uri`."""
    if not is_remote(uri):
        return local_path(uri).exists()
    fs, path = filesystem(uri)
    return attempt(uri, lambda: bool(fs.exists(path)))


def is_folder(uri: str) -> bool:
    """True when `uri` is a folder that exists (on an object store: holds at least one object)."""
    if not is_remote(uri):
        return local_path(uri).is_dir()
    fs, path = filesystem(uri)
    return attempt(uri, lambda: bool(fs.isdir(path)))


def names(folder: str, most: int | None = None) -> list[str]:
    """Sorted names right below `folder`; empty when it does not exist.

    Args:
        folder: local or remote.
        most: only so many, whichever come first, of a folder that may hold millions; None: all.
    """
    if not is_remote(folder):
        local = local_path(folder)
        if not local.is_dir():
            return []
        with os.scandir(local) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, most))
    fs, path = filesystem(folder)
    if "s3" in protocols(fs):
        # `ls` would keep what the store says of every object, and there may be millions.
        return sorted(itertools.islice(s3_listing.names(*_s3_request(folder, fs, path)), most))
    try:
        found = attempt(folder, lambda: fs.ls(path, detail=False, refresh=True))
    except FileNotFoundError:
        return []
    return sorted(name for name in (posixpath.basename(p.rstrip("/")) for p in found) if name)[:most]


def folders(folder: str) -> list[str]:
    """Sorted names of the folders right below `folder`; empty when it does not exist."""
    if not is_remote(folder):
        local = local_path(folder)
        if not local.is_dir():
            return []
        # Not `DirEntry.is_dir`, which raises at a link to itself.
        return sorted(found.name for found in os.scandir(local) if os.path.isdir(found.path))
    fs, path = filesystem(folder)
    if "s3" in protocols(fs):
        return sorted(s3_listing.names(*_s3_request(folder, fs, path), only_folders=True))
    try:
        found = attempt(folder, lambda: fs.ls(path, detail=True, refresh=True))
    except FileNotFoundError:
        return []
    return sorted(posixpath.basename(f["name"].rstrip("/")) for f in found if f["type"] == "directory")


def walk(folder: str, unreadable: list[Unreadable] | None = None) -> Iterator[Entry]:
    """Yields every file below `folder`, sorted by name within each sub-folder, page by page as the store answers.

    Names that start with a dot are skipped.

    Args:
        folder: local or remote.
        unreadable: takes the links that lead nowhere or in circles.

    Raises: StorageError when `folder` cannot be listed.
    """
    if is_remote(folder):
        for name, path, info in _below(folder):
            if name and not any(part.startswith(".") for part in name.split("/")):
                yield _remote_entry(path, name, info)
        return
    local = LocalWalk(local_path(folder), [] if unreadable is None else unreadable)
    try:
        for name, status in local.files():
            yield Entry(join(folder, name), name, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
    except OSError as error:
        raise StorageError(f"{error.filename or folder} cannot be listed: {error.strerror}.") from error


def entry(uri: str) -> Entry:
    """Size and version of one file. Raises: FileNotFoundError, StorageError."""
    if not is_remote(uri):
        status = local_path(uri).stat()
        return Entry(uri, posixpath.basename(uri), status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
    fs, path = filesystem(uri)
    return _remote_entry(uri, posixpath.basename(uri), attempt(uri, lambda: fs.info(path)))


def check_version(uri: str, version: str) -> None:
    """Makes sure that a file is the one that was listed, on disks and S3: others may say versions otherwise in listings.

    Args:
        uri: of the file.
        version: as in its `Entry`; one of another form, such as that of a run of CALVIN's files, says nothing.

    Raises: FileChanged, FileNotFoundError, StorageError.
    """
    if STAMPED.match(version) and (not is_remote(uri) or "s3" in protocols(filesystem(uri)[0])):
        _compare(uri, entry(uri).version, version)


def _compare(uri: str, now: str, version: str) -> None:
    if now != version:
        raise FileChanged(
            f"{uri} is version {now} (bytes, and time or tag), not {version} as when it was listed. Copies of it on "
            "several machines must have the same times (cp -p, rsync -t)."
        )


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises: FileNotFoundError, StorageError."""
    if not is_remote(uri):
        return local_path(uri).read_bytes()
    fs, path = filesystem(uri)
    # Otherwise S3's driver first asks for the size of each file, to read large ones in parts.
    options = {"max_concurrency": 1} if "s3" in protocols(fs) else {}
    return attempt(uri, lambda: cast(bytes, fs.cat_file(path, **options)))


def read_text(uri: str) -> str:
    """The whole file as UTF-8. Raises: FileNotFoundError, StorageError, UnicodeDecodeError."""
    return read_bytes(uri).decode("utf-8")


def read_into(uri: str, start: int, buffer: memoryview) -> None:
    """Fills a buffer with the bytes of a file from `start` on.

    Args:
        uri: of the file.
        start: offset of the first byte.
        buffer: writable, of bytes; its length says how many.

    Raises: EOFError when the file ends before; FileNotFoundError, StorageError.
    """
    if not len(buffer):
        return
    if is_remote(uri):
        content = read_range(uri, start, start + len(buffer))
        count = len(content)
        buffer[:count] = content
    else:
        with local_path(uri).open("rb", buffering=0) as file:
            file.seek(start)
            count = 0
            while count < len(buffer) and (more := file.readinto(buffer[count:])):
                count += more
    if count < len(buffer):
        raise EOFError(f"{uri} ends before byte {start + len(buffer)}, which was expected")


def open_seekable(uri: str, block_bytes: int = 1 << 20, version: str = "") -> IO[bytes]:
    """Opens a file that the caller closes; remote ones are read in ranges of `block_bytes`, not downloaded whole.

    Every range is asked for again like any other request; a failure that stays is also kept in `RangeFile.failures`.

    Args:
        uri: of the file.
        block_bytes: of a range.
        version: that an object on S3 must have, see `check_version`.

    Raises: FileNotFoundError, StorageError, FileChanged.
    """
    if not is_remote(uri):
        return local_path(uri).open("rb")
    fs, path = filesystem(uri)
    info = attempt(uri, lambda: fs.info(path))
    if STAMPED.match(version) and "s3" in protocols(fs):
        _compare(uri, _remote_entry(uri, "", info).version, version)
    size = int(info["size"])
    return cast("IO[bytes]", RangeFile(functools.partial(read_range, uri), size, block_bytes))


def write_bytes(uri: str, content: bytes | memoryview) -> None:
    """Writes a file so that readers see the old content or the new, never a part."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        attempt(uri, lambda: fs.pipe_file(path, bytes(content)))
        return
    with _staged(local_path(uri)) as staged:
        staged.write_bytes(content)


def write_text(uri: str, content: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(uri, content.encode("utf-8"))


def put_file(local: Path, uri: str) -> None:
    """Copies a local file of any size to `uri`, where it appears whole or not at all."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        attempt(uri, lambda: fs.put_file(str(local), path))
        return
    with _staged(local_path(uri)) as staged:
        shutil.copyfile(local, staged)


def get_file(uri: str, local: Path) -> None:
    """Downloads a file of any size. Raises: FileNotFoundError, StorageError."""
    if is_remote(uri):
        fs, path = filesystem(uri)
        attempt(uri, lambda: fs.get_file(path, str(local)))
    else:
        shutil.copyfile(local_path(uri), local)


def delete(uri: str) -> None:
    """Removes a file or a whole folder; nothing happens when it is not there."""
    if is_remote(uri):
        _delete_remote(uri)
    elif local_path(uri).is_dir():
        shutil.rmtree(local_path(uri))
    else:
        local_path(uri).unlink(missing_ok=True)


def set_aside(folder: str) -> str:
    """Renames a folder to `<folder>.old-1`, or the next free number. Returns: the new name."""
    number = next(n for n in itertools.count(1) if not exists(f"{folder}.old-{n}"))
    aside = f"{folder}.old-{number}"
    move(folder, aside)
    return aside


def move(source: str, target: str) -> None:
    """Moves a file or a whole folder within a store; nothing may be at `target`. Once interrupted, it can be done again."""
    if not is_remote(source):
        local_path(target).parent.mkdir(parents=True, exist_ok=True)
        local_path(source).rename(local_path(target))
        return
    fs, path = filesystem(source)
    moved = [("", source)] if attempt(source, lambda: bool(fs.isfile(path))) else list(below(source))
    for name, uri in moved:
        to = fs._strip_protocol(join(target, name) if name else target)
        attempt(uri, functools.partial(fs.cp_file, fs._strip_protocol(uri), to))
    delete(source)


# --------------------------------------------------------------------------- local


@contextlib.contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yields a path to write to, which is flushed to disk and renamed to `target` at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    try:
        yield staged
        with staged.open("rb") as file:
            os.fsync(file.fileno())
        staged.replace(target)
    finally:
        staged.unlink(missing_ok=True)


# --------------------------------------------------------------------------- remote


def _remote_entry(uri: str, name: str, info: dict[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    stamp = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime")
    stamp = stamp or info.get("created") or ""
    return Entry(uri, name, size, f"{size}-{stamp}".replace('"', ""))


def below(folder: str) -> Iterator[tuple[str, str]]:
    """Yields (name, uri) of every file below a remote folder, those too whose names start with a dot."""
    return ((name, uri) for name, uri, _ in _below(folder))


def _below(folder: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    fs, path = filesystem(folder)
    root = path.rstrip("/")
    found = _s3_objects(folder, fs, root) if "s3" in protocols(fs) else _found(folder, fs, path)
    for full, info in found:
        # Not stripped: the names of objects may begin with a slash.
        name = full[len(root) + 1 :]
        yield name, join(folder.rstrip("/"), name), info


def _delete_remote(uri: str) -> None:
    fs, path = filesystem(uri)
    if not attempt(uri, lambda: fs.exists(path)):
        return
    if not PATTERN & set(path):
        attempt(uri, lambda: fs.rm(path, recursive=True))
        return
    for file in [*(found for _, found in below(uri)), uri]:
        with contextlib.suppress(FileNotFoundError):
            attempt(file, functools.partial(fs.rm_file, fs._strip_protocol(file)))


def _s3_objects(folder: str, fs: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (path, description) of every object, page by page: `find` would answer after the last page only."""
    request, prefix = _s3_request(folder, fs, root)
    for found in s3_listing.objects(request, prefix):
        if not found["Key"].endswith("/"):
            bucket = root.partition("/")[0]
            yield f"{bucket}/{found['Key']}", {"size": found["Size"], "ETag": found.get("ETag")}


def _s3_request(folder: str, fs: Any, root: str) -> tuple[s3_listing.Request, str]:
    """(sends a ListObjectsV2 to the bucket of `root`, the prefix of what lies below `root`)."""
    bucket, _, key = root.rstrip("/").partition("/")

    def request(arguments: dict[str, Any]) -> dict[str, Any]:
        return attempt(folder, lambda: fs.call_s3("list_objects_v2", Bucket=bucket, **arguments))

    return request, f"{key}/" if key else ""


def _found(folder: str, fs: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        found = attempt(folder, lambda: fs.find(path, detail=True, refresh=True))
    except FileNotFoundError as error:
        raise StorageError(f"{folder} does not exist.") from error
    yield from ((full, info) for full, info in sorted(found.items()) if info.get("type") == "file")
