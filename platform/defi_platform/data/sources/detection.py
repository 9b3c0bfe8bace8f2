"""Folders that are searched when a corpus's format is detected."""

from __future__ import annotations

from defi_platform import storage

MAX_FOLDERS = 200
"""A corpus of videos may have a million; those of shards and datasets have few."""


def first_folders(root: str) -> list[str]:
    """Names of the folders right below `root`, the first `MAX_FOLDERS` in their order."""
    return storage.folders(root)[:MAX_FOLDERS]
