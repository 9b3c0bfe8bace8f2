"""Checks of the folders that a job reads and writes: from every node, and how fast."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from defi_platform import storage
from defi_platform.errors import one_line
from defi_platform.preflight.findings import CLIENT, Finding, fail, named, number, ok, span, warn

MIB = 2**20
TEST_FOLDER = ".defi-check-"
"""Start of the name of the folder for test files; its dot hides it from ingests."""
MARKER = "marker"
DEFAULT_MIB = 32


@dataclass(frozen=True)
class Folder:
    """A folder that a job uses."""

    uri: str
    key: str
    """Config key that names it."""
    writes: bool
    """Whether the job writes there."""


@dataclass(frozen=True)
class Access:
    """Result of one node's try to use a folder."""

    error: str = ""
    """Why it could not; "" where it could."""
    marked: bool = True
    """False: the node sees a folder of its own under this name, without the file that the client has put there."""
    write_mb_s: float = 0.0
    read_mb_s: float = 0.0
    list_ms: float = 0.0
    present: bool = True
    """Whether there is anything at the path, of a folder that is only read."""


class WriteTest:
    """Test files in a folder that a job writes to, or is to make: put there by the client, deleted at the end.

    A local folder that does not exist yet is tested in the nearest one above it that does, so that nothing is left.

    Args:
        folder: that the job writes to.
    """

    def __init__(self, folder: str) -> None:
        base = storage.absolute(folder)
        if not storage.is_remote(folder):
            while not os.path.isdir(base) and os.path.dirname(base) != base:
                base = os.path.dirname(base)
        self.folder = storage.join(base, f"{TEST_FOLDER}{uuid.uuid4().hex[:8]}")

    def prepare(self) -> None:
        """Puts the client's file there. Raises: OSError, StorageError."""
        storage.write_text(storage.join(self.folder, MARKER), "")

    def delete(self) -> None:
        """Removes everything that nodes have put there. Raises: OSError, StorageError."""
        storage.delete(self.folder)


def try_writing(test_folder: str, mib: int) -> Access:
    """Writes a file, reads it back, lists its folder and deletes it.

    Args:
        test_folder: of a `WriteTest`.
        mib: size of the file in MiB.
    """
    path = storage.join(test_folder, uuid.uuid4().hex)
    content = os.urandom(MIB) * mib
    try:
        began = time.perf_counter()
        marked = MARKER in storage.names(test_folder)
        listed = time.perf_counter()
        storage.write_bytes(path, content)
        written = time.perf_counter()
        same = storage.read_bytes(path) == content
        read = time.perf_counter()
        storage.delete(path)
    except (OSError, storage.StorageError) as error:
        return Access(error=one_line(error))
    if not same:
        return Access(error=f"{path} was read back with other bytes than were written")
    megabytes = len(content) / 1e6
    return Access(
        marked=marked,
        write_mb_s=megabytes / (written - listed),
        read_mb_s=megabytes / (read - written),
        list_ms=1000 * (listed - began),
    )


def try_reading(folder: str, mib: int) -> Access:
    """Reads the first file of a folder, or the file itself.

    Args:
        folder: that a job reads; a file will do.
        mib: MiB to read at most.
    """
    try:
        began = time.perf_counter()
        if not storage.exists(folder):
            return Access(present=False)
        uri = folder
        if storage.is_folder(folder):
            first = next(iter(storage.walk(folder)), None)
            if first is None:
                return Access(list_ms=1000 * (time.perf_counter() - began))
            uri = first.uri
        found = time.perf_counter()
        size = 0
        with storage.open_seekable(uri) as file:
            while size < mib * MIB and (part := file.read(MIB)):
                size += len(part)
        seconds = time.perf_counter() - found
    except (OSError, storage.StorageError) as error:
        return Access(error=one_line(error))
    return Access(list_ms=1000 * (found - began), read_mb_s=size / 1e6 / seconds if size else 0.0)


def judge_folder(folder: Folder, found: Mapping[str, Access], silent: Sequence[str]) -> list[Finding]:
    """Compares what the nodes could do with a folder.

    Args:
        folder: it.
        found: node, or the client, -> what it could do.
        silent: nodes that have not answered in time.
    """
    title = f"{folder.uri} ({folder.key})"
    count = len(found) + len(silent)
    failures = {node: access.error for node, access in found.items() if access.error}
    failures |= dict.fromkeys(silent, "no answer in time")
    if failures:
        errors: dict[str, list[str]] = {}
        for node, error in failures.items():
            errors.setdefault(error, []).append(node)
        return [
            fail(
                "storage",
                f"{title}: {_from(nodes, count)}: {error}{'' if len(nodes) == count else _ONE_NODE}",
            )
            for error, nodes in errors.items()
        ]
    apart = [node for node, access in found.items() if not access.marked]
    absent = [node for node, access in found.items() if not access.present]
    if apart or 0 < len(absent) < len(found):
        return [
            fail(
                "storage",
                f"{title}: {_from(apart or absent, count)} another folder than the others' lies under this name. Use "
                "one that all nodes share: s3://, or a disk that is mounted everywhere (DEFI_HOME sets all of them).",
            )
        ]
    if absent:
        return [warn("storage", f"{title}: there is nothing yet; an earlier job has to make it")]
    nodes = list(found.values())
    speeds = (
        [f"read {span([one.read_mb_s for one in nodes], 'MB/s')}"] if any(n.read_mb_s for n in nodes) else []
    )
    if folder.writes:
        speeds.append(f"write {span([one.write_mb_s for one in nodes], 'MB/s')}")
    speeds.append(f"list {span([one.list_ms for one in nodes], 'ms')}")
    each = " each, all at once" if len(nodes) > 1 else ""
    return [ok("storage", f"{title}: {', '.join(speeds)}{each}, from {_places(found)}")]


_ONE_NODE = " The others reach it: compare credentials, network and clock of that machine with theirs."


def _from(nodes: Sequence[str], count: int) -> str:
    if list(nodes) == [CLIENT]:
        return f"from {CLIENT}"
    return f"from {named(nodes)}" if len(nodes) < count or count == 1 else f"from all {count}"


def _places(found: Mapping[str, Access]) -> str:
    nodes = number(sum(name != CLIENT for name in found), "node")
    return f"{nodes} and {CLIENT}" if CLIENT in found else nodes
