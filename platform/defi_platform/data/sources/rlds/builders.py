"""Open X-Embodiment RLDS (tfds) datasets: TFRecords of episodes with encoded frames, read without TensorFlow.

Source of the layout: docs/formats.md, "Open X-Embodiment RLDS".
"""

from __future__ import annotations

import io
import json
import posixpath
import re
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.metadata import first_folders
from defi_platform.data.sources.records import Listing, RejectedRecord, Signals, VideoRecord, files_below
from defi_platform.data.sources.rlds.tfrecord import (
    DamagedRecord,
    Value,
    parse_example,
    read_features,
    read_record,
    record_spans,
)
from defi_platform.data.sources.uri import parse, video_uri
from defi_platform.errors import CorpusError
from defi_platform.storage.parallel_read import side_by_side

TITLE = "RLDS"

RATES = {"bridge": 5.0, "fractal": 3.0}
"""Control rates in Hz of datasets by the start of their name; the files do not hold them."""


TEXTS = tuple(
    f"steps/{name}"
    for name in (
        "language_instruction",
        "observation/natural_language_instruction",
        "natural_language_instruction",
    )
)
COUNTS = ("steps/is_first", "steps/is_last", "steps/reward")
"""Features with a value per step; the first that exists."""
FEATURES_TO_LIST = frozenset([*TEXTS, *COUNTS, "steps/action"])
"""Everything that a listing has to know; they stand between the frames."""

SPARSE_FROM = 8 << 20
"""Bytes of a remote record from which stepping over its frames is faster than reading it in one request."""


def detect(root: str, top: set[str]) -> bool:
    """True when there is a `features.json` at the top, or one or two folders down."""
    return bool(_versions(root, top))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per episode and camera; of every TFRecord all but its frames is read."""
    for folder in _versions(root, set(storage.names(root))):
        yield from _version(folder, root, fps)


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads `steps/action` and `steps/observation/state` (or `proprio`) of one episode. Raises: CorpusError."""
    where = parse(uri)
    try:
        with storage.open_seekable(where.path) as file:
            features = parse_example(read_record(file, *where.span, verify=False))
    except (FileNotFoundError, DamagedRecord) as error:
        raise CorpusError(f"{where.path}: {error}. Restore it or run the ingest again.") from error
    steps = _steps(features)
    actions = _signal(features, "action", steps)
    if actions is None:
        raise CorpusError(f"{uri}: episode {episode_id} has no numeric steps/action.")
    proprio = _signal(features, "observation/state", steps)
    return Signals(actions, _signal(features, "observation/proprio", steps) if proprio is None else proprio)


def _versions(root: str, top: set[str]) -> list[str]:
    if "features.json" in top:
        return [root]
    found = []
    for name in first_folders(root):
        inside = set(storage.names(storage.join(root, name)))
        if "features.json" in inside:
            found.append(storage.join(root, name))
        elif "dataset_info.json" not in inside:
            found += [
                storage.join(root, name, version)
                for version in sorted(inside)
                if re.fullmatch(r"\d+\.\d+\.\d+", version)
                and storage.exists(storage.join(root, name, version, "features.json"))
            ]
    return found


def _version(folder: str, root: str, fps: float | None) -> Listing:
    cameras, name = _described(folder)
    rate = fps or next((rate for start, rate in RATES.items() if name.startswith(start)), None)
    if rate is None:
        raise CorpusError(
            f"{folder}: RLDS files do not say their rate. Set data.corpora.NAME.fps (frames per second)."
        )
    files = yield from files_below(folder)
    shards = sorted(n for n in files if ".tfrecord" in n)
    yield from _absent_shards(folder, shards)
    prefix = folder[len(root) :].strip("/")
    episodes = side_by_side(
        lambda shard: list(_shard(files[shard], posixpath.join(prefix, shard), cameras, rate)),
        shards,
        storage.is_remote(folder),
    )
    for _, found in episodes:
        yield from found


def _shard(entry: storage.Entry, key: str, cameras: list[str], rate: float) -> Listing:
    number = -1
    try:
        with storage.open_seekable(entry.uri) as file:
            for number, (offset, length) in enumerate(record_spans(file, entry.bytes)):
                span = (entry.uri, offset, length)
                yield from _episode(file, f"{key}/{number:05d}", span, cameras, rate, entry.version)
    except DamagedRecord as error:
        yield RejectedRecord(
            video_id=f"{key}/{number + 1:05d}",
            uri=entry.uri,
            reason="corrupt",
            message=f"{error}; what follows in this file is lost",
            version=entry.version,
        )


def _episode(
    file: IO[bytes], key: str, span: tuple[str, int, int], cameras: list[str], rate: float, version: str
) -> Listing:
    path, offset, length = span
    try:
        features = _features(file, path, offset, length)
    except DamagedRecord as error:
        yield RejectedRecord(video_id=key, uri=path, reason="corrupt", message=str(error), version=version)
        return
    steps = _steps(features)
    has_actions = _signal(features, "action", steps) is not None
    for camera in cameras:
        # `episode_metadata/has_<camera>` is not asked: files in the wild say 0 for cameras with real frames.
        # A camera that was not there has blank ones, which the probe notices.
        yield VideoRecord(
            video_id=f"{key}/{camera}",
            uri=video_uri(path, "rlds", offset, length, camera),
            text=_text(features),
            camera=camera,
            episode_id=key,
            bytes=length,
            version=version,
            num_frames=steps,
            fps=rate,
            num_actions=steps if has_actions else 0,
            signals_uri=video_uri(path, "rlds", offset, length) if has_actions else "",
        )


def _features(file: IO[bytes], path: str, offset: int, length: int) -> dict[str, Value]:
    """Features of a record that a listing has to know. Its checksum, and its frames, are left to the probe."""
    if storage.is_remote(path) and length < SPARSE_FROM:
        record = read_record(file, offset, length, verify=False)
        features = read_features(io.BytesIO(record), 0, length, FEATURES_TO_LIST)
    else:
        features = read_features(file, offset, length, FEATURES_TO_LIST)
    if not any(name in features for name in COUNTS):  # then the longest list gives the number of steps
        return parse_example(read_record(file, offset, length, verify=False))
    return features


def _described(folder: str) -> tuple[list[str], str]:
    """(cameras, name of the dataset) by `features.json` and `dataset_info.json`."""
    uri = storage.join(folder, "features.json")
    try:
        features = json.loads(storage.read_bytes(uri))
        cameras = sorted(path.removeprefix("steps/observation/") for path in _images(features, ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{uri} cannot be used: {type(error).__name__}: {error}. Restore it.") from error
    try:
        name = str(json.loads(storage.read_bytes(storage.join(folder, "dataset_info.json")))["name"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        name = posixpath.basename(posixpath.dirname(folder))
    return [camera for camera in cameras if not camera.startswith("steps/")], name


def _images(node: dict[str, Any], path: str) -> Iterator[str]:
    """Paths of the image features of a features.json."""
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            yield from _images(child, f"{path}/{name}" if path else name)
    elif "sequence" in node:
        yield from _images(node["sequence"]["feature"], path)
    elif "image" in node and "depth" not in path.lower():
        yield path


def _absent_shards(folder: str, shards: list[str]) -> Listing:
    """Shards that the others' names promise (`-00003-of-00010`) or a split of dataset_info.json."""
    promised = set()
    for shard in shards:
        match = re.fullmatch(r"(.*\.tfrecord)-(\d{5})-of-(\d{5})", shard)
        if match:
            promised |= {f"{match[1]}-{n:05d}-of-{match[3]}" for n in range(int(match[3]))}
    try:
        info = json.loads(storage.read_bytes(storage.join(folder, "dataset_info.json")))
        for split in info["splits"]:
            count = len(split["shardLengths"])
            promised |= {
                f"{info['name']}-{split['name']}.tfrecord-{n:05d}-of-{count:05d}" for n in range(count)
            }
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # not needed: most of it follows from the names of the shards
    for name in sorted(promised - set(shards)):
        yield RejectedRecord(
            video_id=name,
            uri=storage.join(folder, name),
            reason="missing",
            message=f"the dataset promises {name}",
        )


def _text(features: dict[str, Value]) -> str:
    for name in TEXTS:
        values = features.get(name)
        if isinstance(values, list) and values:
            return bytes(values[0]).decode("utf-8", "replace")
    return ""


def _steps(features: dict[str, Value]) -> int:
    for name in COUNTS:
        if name in features:
            return len(features[name])
    return max(
        (len(v) for n, v in features.items() if n.startswith("steps/") and isinstance(v, list)), default=0
    )


def _signal(features: dict[str, Value], name: str, steps: int) -> np.ndarray | None:
    values = features.get(f"steps/{name}")
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or not steps or len(values) % steps:
        return None
    return values.reshape(steps, -1)
