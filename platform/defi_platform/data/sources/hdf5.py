"""HDF5 episodes (the xbot layout): `/observations/images/<camera>`, `/action`, `/observations/*`, `/text`.

Source of the layout: docs/formats.md, "HDF5 episodes". A file may name other files (external links and storage,
virtual datasets), which are never followed: whatever a stranger's file points to on this machine is not its own.
"""

from __future__ import annotations

import contextlib
import posixpath
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.metadata import DAMAGE, LONGEST_TEXT, text_of
from defi_platform.data.sources.records import (
    Listing,
    Reading,
    RejectedRecord,
    Signals,
    Steps,
    VideoRecord,
    rejected_links,
    signal_matrix,
)
from defi_platform.data.sources.uri import parse, video_uri
from defi_platform.errors import CorpusError
from defi_platform.storage.parallel_read import side_by_side
from defi_platform.storage.range_file import RangeFile

TITLE = "HDF5"
SUFFIXES = (".hdf5", ".h5")
IMAGES = "observations/images"
PROPRIO = ("qpos", "state", "proprio")
"""Names under /observations that are taken for proprioception; the first that exists."""

MOST_LINKS = 8
"""Soft links that are followed on the way to a dataset."""

LARGEST_SIGNAL = 256 << 20
"""Bytes of an episode's actions or states."""


class UnsafeFile(ValueError):
    """An HDF5 file that points outside of itself, or in circles, or is not to be read."""


def detect(root: str, top: set[str]) -> bool:
    """True when there is an HDF5 file anywhere below `root`."""
    return any(entry.name.endswith(SUFFIXES) for entry in storage.walk(root))


@dataclass
class _Episode:
    cameras: dict[str, int]
    """Camera -> number of frames."""
    with_actions: bool
    """Whether they can be used is found out where they are read."""
    text: str


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per file and camera."""
    return (item for item in steps(root, fps) if not isinstance(item, Reading))


def steps(root: str, fps: float | None = None) -> Steps:
    """Yields one record per file and camera, and says before which file it is."""
    RangeFile.failures.clear()
    unreadable: list[storage.Unreadable] = []
    entries = (entry for entry in storage.walk(root, unreadable) if entry.name.endswith(SUFFIXES))
    # Reading the ends of the next files hides most of the waiting; HDF5 itself lets one thread in at a time.
    for entry, source in side_by_side(_opened, entries, storage.is_remote(root)):
        if fps is None:
            raise CorpusError(
                f"{root}: HDF5 files do not say their rate. Set data.corpora.NAME.fps (frames per second)."
            )
        name = posixpath.splitext(entry.name)[0]
        refusal = yield Reading(entry.uri)
        try:
            if isinstance(source, OSError):
                raise source
            with source:
                if refusal is not None:
                    if refusal.listed:
                        continue
                    raise UnsafeFile(refusal.message)  # it has ended the process that read it
                episode = _described(source)
        except (OSError, RuntimeError, *DAMAGE) as error:
            if RangeFile.failures:  # HDF5 reports whatever its source raises as damage
                raise RangeFile.failures.pop() from error
            yield RejectedRecord(
                video_id=name, uri=entry.uri, reason="bad_source",
                message=f"{type(error).__name__}: {error}", version=entry.version,
            )  # fmt: skip
            continue
        for camera, frames in episode.cameras.items():
            yield VideoRecord(
                video_id=f"{name}/{camera}",
                uri=video_uri(entry.uri, "hdf5", camera),
                text=episode.text,
                camera=camera,
                episode_id=name,
                bytes=entry.bytes,
                version=entry.version,
                num_frames=frames,
                fps=fps,
                num_actions=frames if episode.with_actions else 0,
                signals_uri=entry.uri if episode.with_actions else "",
            )
    yield from rejected_links(unreadable)


def _opened(entry: storage.Entry) -> IO[bytes] | OSError:
    """A file whose first and last blocks, where most of HDF5's own records lie, have been read already."""
    try:
        source = storage.open_seekable(entry.uri)
        if storage.is_remote(entry.uri):
            for offset in (max(0, entry.bytes - 1), 0):
                source.seek(offset)
                source.read(1)
            source.seek(0)
    except OSError as error:
        return error
    return source


def _described(source: IO[bytes]) -> _Episode:
    import h5py

    with h5py.File(source, "r") as file:
        images = own_object(file, IMAGES)
        if not isinstance(images, h5py.Group):
            raise KeyError(f"{IMAGES} is no group of cameras")
        cameras = {str(name): len(own_dataset(file, f"{IMAGES}/{name}")) for name in images}
        if not cameras:
            raise KeyError(f"{IMAGES} holds no camera")
        proprio = _proprio(file)
        for path in ("action",) if proprio is None else ("action", proprio):
            with contextlib.suppress(KeyError):
                own_dataset(file, path)
        return _Episode(cameras, _has(file, "action"), _text(file))


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads `/action` (n, A) and, where there is one, the proprioception (n, P). Raises: CorpusError."""
    import h5py

    path = parse(uri).path
    try:
        with storage.open_seekable(path) as source, h5py.File(source, "r") as file:
            signals = _signals(file)
        if signals is None:
            raise KeyError("it has no action")
    except (OSError, RuntimeError, *DAMAGE) as error:
        raise CorpusError(f"{path}: {error}. Restore it or run the ingest again.") from error
    return signals


def own_dataset(file: Any, path: str) -> Any:
    """The dataset at `path` of an open file, all of whose values lie in that file.

    Raises: UnsafeFile where they do not; KeyError where there is no such dataset.
    """
    import h5py

    found = own_object(file, path)
    if not isinstance(found, h5py.Dataset) or not found.shape:
        raise KeyError(f"{path} is no dataset of several values")
    _check_own(found, path)
    return found


def own_object(file: Any, path: str) -> Any:
    """The group or dataset at `path` of an open file, reached without leaving it. Raises: UnsafeFile, KeyError."""
    import h5py

    parts, here, links = [part for part in path.split("/") if part not in ("", ".")], file["/"], 0
    walked: list[str] = []
    while parts:
        part = parts.pop(0)
        link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
        if link is None:
            raise KeyError(f"{path} is not there")
        if isinstance(link, h5py.SoftLink):
            links += 1
            if links > MOST_LINKS:
                raise UnsafeFile(f"{path}: more than {MOST_LINKS} links on the way")
            target = [name for name in link.path.split("/") if name not in ("", ".")]
            start = [] if link.path.startswith("/") else walked
            parts, here, walked = [*start, *target, *parts], file["/"], []
            continue
        if not isinstance(link, h5py.HardLink):
            raise UnsafeFile(
                f"{path} is a link to another file ({getattr(link, 'filename', '?')}), not followed"
            )
        here = here[part]
        walked.append(part)
    return here


def _has(group: Any, name: str) -> bool:
    # `in` would open the file that a link leads to.
    return group.get(name, getlink=True) is not None


def _check_own(dataset: Any, path: str) -> None:
    if dataset.external:
        raise UnsafeFile(f"{path} is stored in another file ({dataset.external[0][0]}), which is not read")
    if dataset.is_virtual:
        raise UnsafeFile(f"{path} is a virtual dataset, made of others in whatever files, which is not read")


def _signals(file: Any) -> Signals | None:
    if not _has(file, "action"):
        return None
    actions, path = signal_matrix(_values(file, "action"), "action"), _proprio(file)
    return Signals(actions, None if path is None else signal_matrix(_values(file, path), path))


def _proprio(file: Any) -> str | None:
    """Path of the proprioception; None where there is none."""
    group = own_object(file, "observations")
    return next((f"observations/{name}" for name in PROPRIO if _has(group, name)), None)


def _values(file: Any, path: str) -> np.ndarray:
    dataset = own_dataset(file, path)
    if dataset.dtype.kind not in "biuf":
        raise ValueError(f"{path}: values of type {dataset.dtype} are no numbers")
    if dataset.nbytes > LARGEST_SIGNAL:
        raise ValueError(f"{path}: says that it has {dataset.nbytes:,} bytes")
    return np.asarray(dataset[()])


def _text(file: Any) -> str:
    """The first text in `/text`. Raises: ValueError for one that is too long."""
    import h5py

    if not _has(file, "text"):
        return ""
    dataset = own_object(file, "text")
    if not isinstance(dataset, h5py.Dataset):
        return ""
    _check_own(dataset, "text")
    if dataset.shape is None or 0 in dataset.shape:
        return ""
    if dataset.dtype.itemsize > LONGEST_TEXT:
        raise ValueError(f"text: says that it has {dataset.dtype.itemsize:,} bytes")
    value = dataset[(0,) * dataset.ndim]
    if isinstance(value, np.ndarray):  # of variable length
        value = bytes(value) if value.dtype.kind in "iu" else value.tolist()
    return text_of(value.item() if isinstance(value, np.generic) else value)
