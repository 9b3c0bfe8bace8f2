"""A plain folder of videos: every video file below it, with no instruction (or with a table of texts)."""

from __future__ import annotations

import posixpath

from defi_platform import storage
from defi_platform.data.sources.rows import Claim, Listing

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"]
)


def is_video(name: str) -> bool:
    """Whether a file's name ends like a video's."""
    return posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES


def detect(root: str, top: set[str]) -> bool:
    """Whether there is a video anywhere below `root`."""
    return any(is_video(entry.name) for entry in storage.walk(root))


def listing(root: str) -> Listing:
    """Every video file; the text is empty."""
    for entry in storage.walk(root):
        if is_video(entry.name):
            yield Claim(
                video_id=posixpath.splitext(entry.name)[0] + posixpath.splitext(entry.name)[1].lower(),
                uri=entry.uri,
                text="",
                bytes=entry.bytes,
                version=entry.version,
            )
