"""Annotated video folders (the VPP / GFDM layout): `annotation/<split>/<id>.json` next to the videos.

Source of the layout: docs/formats.md, "Annotated video folder".
"""

from __future__ import annotations

import posixpath
from typing import Any

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.file_index import FileIndex
from defi_platform.data.sources.metadata import DAMAGE, read_json, text_of
from defi_platform.data.sources.plain import is_video
from defi_platform.data.sources.records import (
    Listing,
    Note,
    RejectedRecord,
    Signals,
    VideoRecord,
    files_below,
    record_or_missing,
    signal_matrix,
)
from defi_platform.data.sources.splits import named_split, own_splits
from defi_platform.errors import CorpusError
from defi_platform.storage.parallel_read import side_by_side

TITLE = "annotated video folder"

FRAME_LISTS = ("state", "states", "action", "actions")
"""Per-frame lists, of n or n - 1 entries, that imply the length of the video."""


def detect(root: str, top: set[str]) -> bool:
    """True when `root`, whose top level holds the names `top`, is of this format."""
    return "annotation" in top


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields a record of every video that the annotations name. The first of `texts` is the instruction."""
    files = yield from files_below(root)
    named = FileIndex(values=0)
    has_own = own_splits(_split(entry.name) for entry in files.entries() if _is_annotation(entry.name))
    annotations = (entry for entry in files.entries() if _is_annotation(entry.name))
    contents = side_by_side(_annotation, annotations, storage.is_remote(root))
    for entry, annotation in contents:
        episode = entry.name.removeprefix("annotation/").removesuffix(".json")
        try:
            if isinstance(annotation, ValueError):
                raise annotation
            videos, text, length = (
                list(annotation["videos"]),
                text_of(annotation.get("texts")),
                _min_frames(annotation),
            )
        except DAMAGE as error:
            yield _rejected(episode, entry, error)
            continue
        # Whether they can be used is found out where they are read.
        count = len(_first(annotation, ("action", "actions")) or ())
        for camera, video in enumerate(videos):
            try:
                path = posixpath.normpath(video["video_path"])
            except DAMAGE as error:
                yield _rejected(f"{episode}/{camera}", entry, error)
                continue
            named.add(path)
            record = VideoRecord(
                video_id=f"{episode}/{camera}",
                uri="",
                text=text,
                camera=str(camera),
                episode_id=episode,
                min_frames=length,
                fps=fps,
                num_actions=count,
                signals_uri=entry.uri if count else "",
                signals_version=entry.version if count else "",
                split=_split(entry.name) if has_own else "",
            )
            yield record_or_missing(files, path, root, record)
    for entry in files.entries():
        if is_video(entry.name) and named.find(entry.name) is None:
            yield Note(kind="skipped", item=entry.name, uri=entry.uri, message="no annotation names it")


def _is_annotation(name: str) -> bool:
    return name.startswith("annotation/") and name.endswith(".json")


def _split(annotation: str) -> str:
    """The split that the folders of an annotation name."""
    return named_split(annotation.lower().split("/")[1:-1])


def _annotation(entry: storage.Entry) -> Any:
    """The content of an annotation, or what is wrong with it."""
    try:
        return read_json(entry.uri, entry.bytes)
    except ValueError as error:
        return error


def _rejected(video_id: str, entry: storage.Entry, error: Exception) -> RejectedRecord:
    message = f"annotation: {type(error).__name__}: {error}"
    return RejectedRecord(
        video_id=video_id, uri=entry.uri, reason="bad_source", message=message, version=entry.version
    )


def _min_frames(annotation: dict[str, Any]) -> int | None:
    length = annotation.get("video_length")
    if isinstance(length, int | float) and length > 0 and not isinstance(length, bool):
        return int(length)
    counts = [len(annotation[key]) for key in FRAME_LISTS if isinstance(annotation.get(key), list)]
    return max(counts) if counts else None


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads the annotation's `action(s)` and `state(s)`. Raises: CorpusError."""
    try:
        annotation = read_json(uri)
        actions = signal_matrix(_first(annotation, ("action", "actions")), "action")
        state = _first(annotation, ("state", "states"))
        proprio = None if state is None else signal_matrix(state, "state")
    except (FileNotFoundError, *DAMAGE) as error:
        raise CorpusError(f"{uri}: {error}. Restore it or run the ingest again.") from error
    if proprio is not None and len(proprio) == len(actions) + 1:
        # n states have n - 1 actions between them: the last state has none.
        proprio = np.ascontiguousarray(proprio[:-1])
    return Signals(actions, proprio)


def _first(annotation: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((annotation[key] for key in keys if isinstance(annotation.get(key), list)), None)
