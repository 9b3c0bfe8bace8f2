"""CALVIN on disk: one npz file per frame, language segments in a pickled dict.

Source of the layout: docs/formats.md, "CALVIN". `validation/` is the unseen scene of ABC-D and stays
validation; the others are split by hash.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import numpy as np

from defi_platform import storage
from defi_platform.data.manifest.split import VALIDATION
from defi_platform.data.sources.records import Listing, RejectedRecord, Signals, VideoRecord, files_below
from defi_platform.data.sources.uri import parse, video_uri
from defi_platform.errors import CorpusError

TITLE = "CALVIN"
FPS = 30.0
CAMERAS = {"rgb_static": "static", "rgb_gripper": "gripper"}
FOLDERS = ("training", "validation")
ANNOTATIONS = "lang_annotations/auto_lang_ann.npy"

SAFE_GLOBALS = {
    (module, name)
    for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("ndarray", "dtype", "_reconstruct", "scalar")
}
"""Everything that a pickled dict of texts, numbers and arrays needs; anything else could run code."""


def detect(root: str, top: set[str]) -> bool:
    """True when `training/` or `validation/` holds language annotations."""
    return any(f in top and storage.exists(storage.join(root, f, ANNOTATIONS)) for f in FOLDERS)


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per language segment and camera."""
    for folder in FOLDERS:
        annotations = storage.join(root, folder, ANNOTATIONS)
        if not storage.exists(annotations):
            continue
        files = yield from files_below(storage.join(root, folder))
        split = VALIDATION if folder == VALIDATION and storage.exists(storage.join(root, "training")) else ""
        for (first, last), text in _segments(annotations):
            episode = f"{folder}/{first:07d}-{last:07d}"
            frames = [files.get(f"episode_{n:07d}.npz") for n in range(first, last + 1)]
            absent = sum(frame is None for frame in frames)
            if absent:
                yield RejectedRecord(
                    video_id=episode,
                    uri=storage.join(root, folder),
                    reason="missing",
                    message=f"{absent} of the {len(frames)} frames {first} to {last} are not there",
                )
                continue
            present = [frame for frame in frames if frame is not None]
            path = storage.join(root, folder)
            for key, camera in CAMERAS.items():
                yield VideoRecord(
                    video_id=f"{episode}/{camera}",
                    uri=video_uri(path, "calvin", first, last, key),
                    text=text,
                    camera=camera,
                    episode_id=episode,
                    bytes=sum(frame.bytes for frame in present),
                    version=hashlib.sha256("".join(f.version for f in present).encode()).hexdigest()[:16],
                    num_frames=len(frames),
                    fps=fps or FPS,
                    num_actions=len(frames),
                    signals_uri=video_uri(path, "calvin", first, last),
                    split=split,
                )


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads `rel_actions` (n, 7) and `robot_obs` (n, 15). Raises: CorpusError."""
    where = parse(uri)
    first, last = where.span
    actions, proprio = [], []
    for number in range(first, last + 1):
        frame_uri = storage.join(where.path, f"episode_{number:07d}.npz")
        try:
            with np.load(io.BytesIO(storage.read_bytes(frame_uri)), allow_pickle=False) as frame:
                actions.append(frame["rel_actions"])
                proprio.append(frame["robot_obs"])
        except (FileNotFoundError, ValueError, KeyError, OSError) as error:
            raise CorpusError(f"{frame_uri}: {error}. Restore it or run the ingest again.") from error
    return Signals(np.asarray(actions, np.float32), np.asarray(proprio, np.float32))


def _segments(uri: str) -> list[tuple[tuple[int, int], str]]:
    try:
        annotations = _pickled_dict(storage.read_bytes(uri))
        spans = [(int(first), int(last)) for first, last in annotations["info"]["indx"]]
        return list(zip(spans, (str(text) for text in annotations["language"]["ann"]), strict=True))
    except (pickle.UnpicklingError, ValueError, KeyError, TypeError, EOFError) as error:
        raise CorpusError(f"{uri} cannot be used: {type(error).__name__}: {error}. Restore it.") from error


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
