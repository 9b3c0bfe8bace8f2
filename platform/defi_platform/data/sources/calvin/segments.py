"""CALVIN on disk: one npz file per frame, language segments in a pickled dict.

Source of the layout: docs/formats.md, "CALVIN". `validation/` is the unseen scene of ABC-D and stays validation.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import numpy as np

from defi_platform import storage
from defi_platform.data.manifest.split import TRAIN, VALIDATION
from defi_platform.data.sources.calvin.signals import frame_name, read_signals, signal_names
from defi_platform.data.sources.records import Files, Listing, RejectedRecord, VideoRecord, files_below
from defi_platform.data.sources.uri import video_uri
from defi_platform.errors import CorpusError

__all__ = ["TITLE", "detect", "listing", "read_signals", "signal_names"]

TITLE = "CALVIN"
FPS = 30.0
CAMERAS = {"rgb_static": "static", "rgb_gripper": "gripper"}
SPLITS = {"training": TRAIN, "validation": VALIDATION}
"""Folder -> the split that it is where there are both."""
ANNOTATIONS = "lang_annotations/auto_lang_ann.npy"
RECORDINGS = "ep_start_end_ids.npy"

SAFE_GLOBALS = {
    (module, name)
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("ndarray", "dtype", "_reconstruct", "scalar")
}
"""Everything that a pickled dict of texts, numbers and arrays needs; anything else could run code."""

Segment = tuple[int, int, str]
"""First frame, last one (inclusive), text."""


def detect(root: str, top: set[str]) -> bool:
    """True when `training/` or `validation/` holds language annotations."""
    return any(f in top and storage.exists(storage.join(root, f, ANNOTATIONS)) for f in SPLITS)


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per language segment and camera."""
    annotated = [f for f in SPLITS if storage.exists(storage.join(root, f, ANNOTATIONS))]
    for folder in annotated:
        path = storage.join(root, folder)
        segments, damaged = _segments(storage.join(path, ANNOTATIONS))
        for number, message in damaged:
            yield _rejected(f"{folder}/{ANNOTATIONS}[{number}]", path, "bad_source", message)
        files = yield from files_below(path)
        starts = _recording_starts(path)
        groups = _connected(segments, starts)
        wordings: dict[tuple[int, int], int] = {}
        for first, last, text in segments:
            # The same frames under another text are another episode.
            wording = wordings[first, last] = wordings.get((first, last), 0) + 1
            episode = f"{folder}/{first:07d}-{last:07d}" + (f".{wording}" if wording > 1 else "")
            present = _frames(files, first, last)
            absent = last - first + 1 - len(present)
            if absent:
                message = f"{absent} of the {last - first + 1} frames {first} to {last} are not there"
                yield _rejected(episode, path, "missing", message)
                continue
            inside = starts[(starts > first) & (starts <= last)]
            if len(inside):
                message = f"frames {first} to {last} go on into the recording that starts at {inside[0]}, by {RECORDINGS}"
                yield _rejected(episode, path, "bad_source", message)
                continue
            version = hashlib.sha256("".join(f.version for f in present).encode()).hexdigest()[:16]
            for key, camera in CAMERAS.items():
                yield VideoRecord(
                    video_id=f"{episode}/{camera}",
                    uri=video_uri(path, "calvin", first, last, key),
                    text=text,
                    camera=camera,
                    episode_id=episode,
                    bytes=sum(frame.bytes for frame in present),
                    version=version,
                    num_frames=len(present),
                    fps=fps or FPS,
                    num_actions=len(present),
                    signals_uri=video_uri(path, "calvin", first, last),
                    split=SPLITS[folder] if len(annotated) > 1 else "",
                    group=f"{folder}/{groups[first, last]:07d}",
                )


def _rejected(video_id: str, uri: str, reason: str, message: str) -> RejectedRecord:
    return RejectedRecord(video_id=video_id, uri=uri, reason=reason, message=message)


def _frames(files: Files, first: int, last: int) -> list[storage.Entry]:
    """Files of the frames that are there; none where the segment is longer than the whole folder."""
    if last - first >= len(files):
        return []
    found = (files.get(frame_name(number)) for number in range(first, last + 1))
    return [entry for entry in found if entry is not None]


def _recording_starts(path: str) -> np.ndarray:
    """First frames of the recordings, int64 ascending; empty where the corpus does not say."""
    try:
        spans = np.load(io.BytesIO(storage.read_bytes(storage.join(path, RECORDINGS))), allow_pickle=False)
        return np.unique(np.asarray(spans, np.int64).reshape(-1, 2)[:, 0])
    except (FileNotFoundError, ValueError, TypeError, EOFError):
        return np.empty(0, np.int64)


def _connected(segments: list[Segment], starts: np.ndarray) -> dict[tuple[int, int], int]:
    """(first, last) of each segment -> first frame of the run that it belongs to.

    Segments that share frames are one run, also those that follow each other without a gap in one recording: their
    pictures are the same, or nearly so.
    """
    runs: dict[tuple[int, int], int] = {}
    begin, end = 0, -2
    for first, last, _ in sorted(segments):
        follows = first == end + 1 and first not in starts
        if not (first <= end or follows):
            begin = first
        end = max(end, last) if first <= end or follows else last
        runs[first, last] = begin
    return runs


def _segments(uri: str) -> tuple[list[Segment], list[tuple[int, str]]]:
    """Segments in the order of the file, and (number, why) of those that cannot be used. Raises: CorpusError."""
    try:
        annotations = _pickled_dict(storage.read_bytes(uri))
        spans, texts = list(annotations["info"]["indx"]), list(annotations["language"]["ann"])
        if len(spans) != len(texts):
            raise ValueError(f"{len(spans)} segments in info.indx, {len(texts)} texts in language.ann")
    # A flipped byte may say that a text is as long as all memory.
    except (
        pickle.UnpicklingError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        AttributeError,
        MemoryError,
    ) as error:
        raise CorpusError(f"{uri} cannot be used: {type(error).__name__}: {error}. Restore it.") from error
    segments: dict[Segment, None] = {}
    damaged = []
    for number, (span, text) in enumerate(zip(spans, texts, strict=True)):
        try:
            segment = (int(span[0]), int(span[1]), str(text))
            first, last, _ = segment
            if len(span) != 2 or not 0 <= first <= last:
                raise ValueError(f"info.indx says frames {list(span)}")
            if segment in segments:
                raise ValueError(f"frames {first} to {last} are listed before, as '{text}' too")
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            damaged.append((number, f"{type(error).__name__}: {error}"))
            continue
        segments[segment] = None
    return list(segments), damaged


def _pickled_dict(content: bytes) -> dict[str, Any]:
    """The object in an npy file of one pickled dict, without running code that it may carry."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    read_header(file)
    array = _RestrictedUnpickler(file).load()
    found: dict[str, Any] = array.item()
    return found


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in annotations")
        return super().find_class(module, name)
