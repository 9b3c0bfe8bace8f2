"""A plain folder of videos: every video file below it, with no instruction (or with a table of texts)."""

from __future__ import annotations

import posixpath

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.records import Listing, RejectedRecord, VideoRecord, files_below
from defi_platform.data.sources.texts import read_texts

TITLE = "plain videos"

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"]
)


def is_video(name: str) -> bool:
    """True when a file's name ends like a video's."""
    return posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES


def detect(root: str, top: set[str]) -> bool:
    """True when there is a video anywhere below `root`."""
    return any(is_video(entry.name) for entry in storage.walk(root))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields every video file, with its text where a table at the top of the folder names it."""
    files = yield from files_below(root)
    texts = read_texts(root, [name for name in files if "/" not in name])
    named = np.zeros(len(texts), bool)
    for entry in files.entries():
        name = entry.name
        if not is_video(name):
            continue
        found = (
            texts.find(name)
            or texts.find(posixpath.splitext(name)[0])
            or texts.find(posixpath.basename(name))
        )
        if found is not None:
            named[found[0]] = True
        yield VideoRecord(
            video_id=name,
            uri=entry.uri,
            text="" if found is None else found[2],
            bytes=entry.bytes,
            version=entry.version,
            fps=fps,
        )
    # Of a key that comes twice the last row is found, so that one decides.
    absent = {key for key, one in zip(texts.names(), named, strict=True) if not one}
    last = {key: row[0] for key in absent if (row := texts.find(key))}
    for key in sorted(key for key, number in last.items() if not named[number]):
        yield RejectedRecord(
            video_id=key, uri=storage.join(root, key), reason="missing", message="the table of texts names it"
        )
