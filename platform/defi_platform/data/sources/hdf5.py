"""HDF5 episodes (the xbot layout): `/observations/images/<camera>`, `/action`, `/observations/*`, `/text`.

Source of the layout: docs/formats.md, "HDF5 episodes".
"""

from __future__ import annotations

import posixpath
from typing import IO, Any

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.records import Listing, RejectedRecord, Signals, VideoRecord
from defi_platform.data.sources.uri import parse, video_uri
from defi_platform.errors import CorpusError
from defi_platform.storage.parallel_read import side_by_side
from defi_platform.storage.range_file import RangeFile

TITLE = "HDF5"
SUFFIXES = (".hdf5", ".h5")
PROPRIO = ("qpos", "state", "proprio")
"""Names under /observations that are taken for proprioception; the first that exists."""


def detect(root: str, top: set[str]) -> bool:
    """True when there is an HDF5 file anywhere below `root`."""
    return any(entry.name.endswith(SUFFIXES) for entry in storage.walk(root))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per file and camera."""
    import h5py

    RangeFile.failures.clear()
    entries = (entry for entry in storage.walk(root) if entry.name.endswith(SUFFIXES))
    # Reading the ends of the next files hides most of the waiting; HDF5 itself lets one thread in at a time.
    for entry, source in side_by_side(_opened, entries, storage.is_remote(root)):
        if fps is None:
            raise CorpusError(
                f"{root}: HDF5 files do not say their rate. Set data.corpora.NAME.fps (frames per second)."
            )
        episode = posixpath.splitext(entry.name)[0]
        try:
            if isinstance(source, OSError):
                raise source
            with source, h5py.File(source, "r") as file:
                cameras = {name: len(data) for name, data in file["observations/images"].items()}
                actions = len(file["action"]) if "action" in file else 0
                text = _text(file)
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            if RangeFile.failures:  # HDF5 reports whatever its source raises as damage
                raise RangeFile.failures.pop() from error
            yield RejectedRecord(
                video_id=episode, uri=entry.uri, reason="bad_source",
                message=f"{type(error).__name__}: {error}", version=entry.version,
            )  # fmt: skip
            continue
        for camera, frames in cameras.items():
            yield VideoRecord(
                video_id=f"{episode}/{camera}",
                uri=video_uri(entry.uri, "hdf5", camera),
                text=text,
                camera=camera,
                episode_id=episode,
                bytes=entry.bytes,
                version=entry.version,
                num_frames=frames,
                fps=fps,
                num_actions=actions,
                signals_uri=entry.uri if actions else "",
            )


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


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads `/action` (n, A) and, where there is one, the proprioception (n, P). Raises: CorpusError."""
    import h5py

    path = parse(uri).path
    try:
        with storage.open_seekable(path) as source, h5py.File(source, "r") as file:
            actions = np.asarray(file["action"], np.float32)
            name = next((n for n in PROPRIO if n in file["observations"]), None)
            proprio = None if name is None else np.asarray(file[f"observations/{name}"], np.float32)
    except (OSError, KeyError) as error:
        raise CorpusError(f"{path}: {error}. Restore it or run the ingest again.") from error
    return Signals(actions.reshape(len(actions), -1), proprio)


def _text(file: Any) -> str:
    if "text" not in file:
        return ""
    value = file["text"][()]
    while isinstance(value, np.ndarray | list) and len(value):
        value = value[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
