"""A plain folder of videos: every video file below it, with no instruction (or with a table of texts)."""

from __future__ import annotations

import posixpath

from defi_platform import storage
from defi_platform.data.sources.rows import Claim, Listing, Refused, files_below
from defi_platform.data.sources.texts import read_texts

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"]
)


def is_video(name: str) -> bool:
    """Whether a file's name ends like a video's."""
    return posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES


def detect(root: str, top: set[str]) -> bool:
    """Whether there is a video anywhere below `root`."""
    return any(is_video(entry.name) for entry in storage.walk(root))


def listing(root: str, fps: float | None = None) -> Listing:
    """Every video file, with its text where a table at the top of the folder names it."""
    files = yield from files_below(root)
    texts = read_texts(root, [name for name in files if "/" not in name])
    found = set()
    for name, entry in files.items():
        if not is_video(name):
            continue
        key = next(
            (key for key in (name, posixpath.splitext(name)[0], posixpath.basename(name)) if key in texts), ""
        )
        found.add(key)
        yield Claim(
            video_id=name,
            uri=entry.uri,
            text=texts.get(key, ""),
            bytes=entry.bytes,
            version=entry.version,
            fps=fps,
        )
    for key in sorted(texts.keys() - found):
        yield Refused(
            video_id=key, uri=storage.join(root, key), reason="missing", message="the table of texts names it"
        )
