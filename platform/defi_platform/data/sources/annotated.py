"""Annotated video folders (the VPP / GFDM layout): `annotation/<split>/<id>.json` next to the videos.

Source of the layout: docs/formats.md, "Annotated video folder".
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.lerobot.signals import matrix
from defi_platform.data.sources.records import (
    Listing,
    RejectedRecord,
    Signals,
    VideoRecord,
    files_below,
    record_or_missing,
)
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
    annotations = (
        entry
        for entry in files.entries()
        if entry.name.startswith("annotation/") and entry.name.endswith(".json")
    )
    contents = side_by_side(lambda entry: storage.read_bytes(entry.uri), annotations, storage.is_remote(root))
    for entry, content in contents:
        name = entry.name
        episode = name.removeprefix("annotation/").removesuffix(".json")
        try:
            annotation = json.loads(content)
            videos = [str(video["video_path"]) for video in annotation["videos"]]
            texts = annotation.get("texts") or [""]
            text = str(texts[0])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            yield RejectedRecord(
                video_id=episode,
                uri=entry.uri,
                reason="bad_source",
                message=f"annotation: {type(error).__name__}: {error}",
                version=entry.version,
            )
            continue
        for camera, video in enumerate(videos):
            record = VideoRecord(
                video_id=f"{episode}/{camera}",
                uri="",
                text=text,
                camera=str(camera),
                episode_id=episode,
                min_frames=_min_frames(annotation),
                fps=fps,
                num_actions=_actions(annotation),
                signals_uri=entry.uri if _actions(annotation) else "",
            )
            yield record_or_missing(files, video.lstrip("./"), root, record)


def _min_frames(annotation: dict[str, Any]) -> int | None:
    length = annotation.get("video_length")
    if isinstance(length, int):
        return length
    counts = [len(annotation[key]) for key in FRAME_LISTS if isinstance(annotation.get(key), list)]
    return max(counts) if counts else None


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads the annotation's `action(s)` and `state(s)`. Raises: CorpusError."""
    try:
        annotation = json.loads(storage.read_bytes(uri))
        actions = matrix(_first(annotation, ("action", "actions")))
        state = _first(annotation, ("state", "states"))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise CorpusError(f"{uri}: {error}. Restore it or run the ingest again.") from error
    proprio = None if state is None else matrix(state)
    if proprio is not None and len(proprio) == len(actions) + 1:
        # n states have n - 1 actions between them: the last state has none.
        proprio = np.ascontiguousarray(proprio[:-1])
    return Signals(actions, proprio)


def _first(annotation: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((annotation[key] for key in keys if isinstance(annotation.get(key), list)), None)


def _actions(annotation: dict[str, Any]) -> int:
    return len(_first(annotation, ("action", "actions")) or ())
