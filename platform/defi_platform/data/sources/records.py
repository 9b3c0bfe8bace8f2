"""Records that every source yields: videos, those rejected without opening a file, and notes on what else it found."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.file_index import FileIndex, Key
from defi_platform.data.sources.uri import file_uri


class VideoRecord(NamedTuple):
    """One video as its source describes it; the probe finds out what is true.

    A tuple, because millions are made, sent from process to process, stored and read.
    """

    video_id: str
    """Key within the corpus, from the source and never from a path on one machine."""
    uri: str
    text: str
    camera: str = "main"
    episode_id: str = ""
    """Key that the cameras of one episode share; empty where a video stands alone."""
    bytes: int = 0
    version: str = ""
    """Version of the file as its store knows it."""
    first_frame: int = 0
    """Where the video starts within its file."""
    num_frames: int | None = None
    """Frames from `first_frame` on; None: all there are."""
    min_frames: int | None = None
    """Fewest frames the annotation allows, where it does not fix the number."""
    fps: float | None = None
    """The source's own rate, which wins over the file's; None: ask the file."""
    declared_fps: float | None = None
    """The rate that the source says its files have, to be held against theirs."""
    from_s: float | None = None
    """Seconds into its file at which the video starts, where the source does not give `first_frame`; then
    `first_frame` is only what the declared rate makes of it."""
    to_s: float | None = None
    """Seconds into its file at which it has ended."""
    steady: int = 0
    """1: all timestamps of its file fit the declared rate."""
    frames_before: int = 0
    """Frames of the videos before it in its file, by the source; at least so many."""
    frames_in_file: int = 0
    """Frames of all videos in its file, by the source; at least so many."""
    counted: int = 0
    """1: the two numbers are not only the least there can be."""
    num_actions: int = 0
    """Rows of actions that the source promises; the ingest finds out how many there are."""
    signals_uri: str = ""
    """File that holds the episode's actions and proprioception."""
    signals_version: str = ""
    """Version of that file as its store knows it; "" where it is that of the video, or the file is absent."""
    split: str = ""
    """Split that the source itself names (CALVIN's unseen scene); "": the hash decides."""
    group: str = ""
    """Key of all videos that must lie on one side of the split, such as parts of one recording; "": `episode_id`, or
    else the video by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedRecord:
    """A video that is rejected before its file is opened; goes to quarantine."""

    video_id: str
    uri: str
    reason: str
    message: str
    version: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something that a listing cannot use although no video is rejected for it: counted, and listed by its kind."""

    kind: str
    """One of `rejection.NOTES`."""
    item: str
    """What it is about: a video or episode, or a row of a table; also the example that a warning names."""
    uri: str
    """Of the file that it is in."""
    message: str = ""


@dataclass(frozen=True)
class ListingProgress:
    """Progress of a listing that has no record yet."""

    files: int
    """Found so far."""


Listing = Iterator[VideoRecord | RejectedRecord | Note | ListingProgress]


@dataclass(frozen=True)
class Reading:
    """Says that a library which may crash or hang reads a file next; comes from `steps` only.

    Who takes it sends a `Refusal` back where that has happened before: the file is rejected then, unread.
    """

    uri: str


@dataclass(frozen=True)
class Refusal:
    """A reason for not reading a file."""

    message: str
    listed: bool = False
    """Its records are known already: nothing is to be said of it."""


@dataclass(frozen=True)
class Place:
    """A position in a listing."""

    files: int = 0
    """Files that were said to be read next."""
    items: int = 0
    """Items since the last of them."""

    def after(self, item: object) -> Place:
        """The place behind the next item."""
        return Place(self.files + 1) if isinstance(item, Reading) else Place(self.files, self.items + 1)


Steps = Generator[VideoRecord | RejectedRecord | Note | ListingProgress | Reading, Refusal | None, None]
"""A listing that can be gone on with where a file has ended the process before."""

PROGRESS_EVERY = 1000
"""Files between two reports of progress: a page of an object store."""


@dataclass(frozen=True)
class Signals:
    """Actions and proprioception of one episode of n steps; raw units of the robot."""

    actions: np.ndarray
    """(n, A) float32"""
    proprio: np.ndarray | None
    """(n, P) float32; None where the corpus has none."""


@dataclass(frozen=True)
class SignalNames:
    """Names of the entries of actions and states, where a corpus gives any."""

    action: tuple[str, ...] = ()
    state: tuple[str, ...] = ()


def signal_matrix(values: Any, name: str) -> np.ndarray:
    """Makes (n, D) float32 of the values that a source has for n steps; a number counts as a row of one.

    Args:
        values: lists or an array.
        name: of the signal, for messages.

    Raises: ValueError for ragged rows and values that are no finite numbers.
    """
    try:
        with np.errstate(over="ignore"):  # infinite then, which is said below
            matrix = np.asarray(values, np.float32)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error
    matrix = matrix.reshape(len(matrix), -1) if matrix.ndim and len(matrix) else matrix.reshape(0, 0)
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise ValueError(f"{name}: step {bad[0]} has a value that is no finite number ({len(bad)} steps do)")
    return matrix


class Files(Mapping[str, storage.Entry]):
    """Files below a folder by their names, which may be millions; in the order in which they were listed.

    Args:
        root: the folder.
        keys: of `rows`.
    """

    def __init__(self, root: str, **keys: Key) -> None:
        self._below = storage.join(root, "")
        self.rows = FileIndex(2, **keys)
        """Name, bytes, version."""

    def add(self, entry: storage.Entry) -> None:
        """Takes a file of the folder."""
        self.rows.add(entry.name, entry.bytes, entry.version)

    def __getitem__(self, name: str) -> storage.Entry:
        row = self.rows.find(name)
        if row is None:
            raise KeyError(name)
        return self._entry(*row[1:])

    def __iter__(self) -> Iterator[str]:
        return self.rows.names()

    def __len__(self) -> int:
        return len(self.rows)

    def entries(self, wanted: Callable[[str], bool] = bool) -> Iterator[storage.Entry]:
        """Those whose names are `wanted`, without looking each one up."""
        return (self._entry(*row) for row in self.rows if wanted(row[0]))

    def _entry(self, name: str, size: int, version: str) -> storage.Entry:
        return storage.Entry(self._below + name, name, size, version)


def files_below(root: str, **keys: Key) -> Generator[ListingProgress | RejectedRecord, None, Files]:
    """Yields progress, and links that lead nowhere as rejected. Returns: every file below `root`, with `keys`."""
    files, unreadable = Files(root, **keys), list[storage.Unreadable]()
    for entry in storage.walk(root, unreadable):
        files.add(entry)
        if len(files) % PROGRESS_EVERY == 0:
            yield ListingProgress(len(files))
    yield from rejected_links(unreadable)
    return files


def rejected_links(unreadable: Iterable[storage.Unreadable]) -> Iterator[RejectedRecord]:
    """Rejects what `storage.walk` could not read."""
    for link in unreadable:
        reason = "bad_source" if link.is_circle else "missing"
        yield RejectedRecord(video_id=link.name, uri=link.uri, reason=reason, message=link.message)


def record_or_missing(
    files: Files, name: str, root: str, record: VideoRecord
) -> VideoRecord | RejectedRecord:
    """Completes a record with size and version of its file, or rejects it when the listing lacks the file.

    Args:
        files: below `root`.
        name: of the file within `root`.
        root: of the corpus.
        record: without `uri`, `bytes` and `version`.
    """
    entry = files.get(name)
    if entry is None:
        return RejectedRecord(
            video_id=record.video_id,
            uri=storage.join(root, name),
            reason="missing",
            message=f"{name} is named by the source but is not there",
        )
    return record._replace(uri=file_uri(entry.uri), bytes=entry.bytes, version=entry.version)
