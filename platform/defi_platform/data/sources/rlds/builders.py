"""Open X-Embodiment RLDS (tfds) datasets: TFRecords of episodes with encoded frames, read without TensorFlow.

Source of the layout: docs/formats.md, "Open X-Embodiment RLDS".
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Container, Iterator
from typing import IO, Any

import numpy as np

from defi_platform import storage
from defi_platform.data.sources.metadata import DAMAGE, LONGEST_TEXT, MAX_FOLDERS, first_folders, read_json
from defi_platform.data.sources.records import (
    Listing,
    Note,
    RejectedRecord,
    Signals,
    VideoRecord,
    files_below,
    signal_matrix,
)
from defi_platform.data.sources.rlds.tfrecord import (
    DamagedRecord,
    Value,
    parse_example,
    read_features,
    read_record,
    record_spans,
)
from defi_platform.data.sources.splits import named_split, own_splits
from defi_platform.data.sources.uri import parse, video_uri
from defi_platform.errors import CorpusError
from defi_platform.storage.parallel_read import side_by_side

TITLE = "RLDS"

RATES = {"bridge": 5.0, "fractal": 3.0}
"""Control rates in Hz of datasets by the start of their name; the files do not hold them."""


TEXT = re.compile(
    r"(?P<place>steps/observation/|steps/|episode_metadata/|)(?P<name>(natural_)?language(_instruction|_text|_annotation|_goal)?"
    r"|(task_|nl_|text_)?(instruction|description|annotation|caption|prompt)|text|task(_name|_label)?)s?(_(?P<number>\d+))?"
)
"""Names of features that hold an instruction, wherever builders put them: per step or per episode."""
PLACES = ("steps/", "steps/observation/", "episode_metadata/", "")
COUNTS = ("steps/is_first", "steps/is_last", "steps/reward")
"""Features with a value per step; the first that exists."""
ACTION = re.compile(r"steps/actions?(/.+)?")
"""One array, or the parts of a mapping, which are joined in the order of their names."""
PROPRIO = ("steps/observation/state", "steps/observation/proprio")

LARGEST_FEATURE = 64 << 20
"""Bytes of a feature that a listing reads, which frames are not."""
LARGEST_RECORD = 1 << 30
"""Bytes of a record that is read as a whole."""


class _Features:
    """Names of features, for `in`."""

    def __init__(self, *patterns: re.Pattern[str], names: tuple[str, ...] = ()) -> None:
        self._patterns, self._names = patterns, frozenset(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names or any(pattern.fullmatch(str(name)) for pattern in self._patterns)


FEATURES_TO_LIST = _Features(TEXT, ACTION, names=COUNTS)
"""Everything that a listing has to know; they stand between the frames."""
SIGNALS = _Features(ACTION, names=(*PROPRIO, *COUNTS))

SPARSE_FROM = 8 << 20
"""Bytes of a remote record from which stepping over its frames is faster than reading it in one request."""


def detect(root: str, top: set[str]) -> bool:
    """True when there is a `features.json` at the top, or one or two folders down."""
    return bool(_versions(root, top))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per episode and camera; of every TFRecord all but its frames is read."""
    for folder, older in _versions(root, set(storage.names(root))):
        newest = posixpath.basename(folder)
        for version in older:
            yield Note(
                kind="skipped", item=storage.join(posixpath.dirname(folder), version)[len(root) :].strip("/"),
                uri=storage.join(posixpath.dirname(folder), version),
                message=f"an earlier version of the dataset; {newest} is read",
            )  # fmt: skip
        yield from _version(folder, root, fps)


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads the actions and `steps/observation/state` (or `proprio`) of one episode. Raises: CorpusError."""
    where = parse(uri)
    try:
        with storage.open_seekable(where.path) as file:
            features = _features(file, where.path, *where.span, SIGNALS)
        steps = _steps(features)
        actions = _actions(features, steps)
        proprio = next((_matrix(features[name], name, steps) for name in PROPRIO if name in features), None)
    except (FileNotFoundError, ValueError, DamagedRecord) as error:
        raise CorpusError(f"{where.path}: {error}. Restore it or run the ingest again.") from error
    if actions is None:
        raise CorpusError(f"{uri}: episode {episode_id} has no numeric steps/action.")
    return Signals(actions, proprio)


def _versions(root: str, top: set[str]) -> list[tuple[str, list[str]]]:
    """(folder of the newest version, names of the earlier ones) of every dataset up to three folders down."""
    if "features.json" in top:
        return [(root, [])]
    found: list[tuple[str, list[str]]] = []
    level, listed = [(root, top)], 0
    for _ in range(4):
        below: list[tuple[str, set[str]]] = []
        for folder, inside in level:
            versions = [name for name in inside if re.fullmatch(r"\d+\.\d+\.\d+", name)]
            versions.sort(key=lambda version: [int(number) for number in version.split(".")])
            usable = [v for v in versions if storage.exists(storage.join(folder, v, "features.json"))]
            if "features.json" in inside or usable:
                path = folder if "features.json" in inside else storage.join(folder, usable[-1])
                found.append((path, usable[:-1]))
            elif "dataset_info.json" not in inside and listed < MAX_FOLDERS:
                # A tree of videos may have any number of folders.
                names = first_folders(folder)[: MAX_FOLDERS - listed]
                listed += len(names)
                paths = [storage.join(folder, name) for name in names]
                below += [(path, set(storage.names(path))) for path in paths]
        level = below
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
    splits = {shard: _split(shard) for shard in shards}
    has_own = own_splits(splits.values())
    episodes = side_by_side(
        lambda shard: list(_shard(files[shard], posixpath.join(prefix, shard), cameras, rate)),
        shards,
        storage.is_remote(folder),
    )
    for shard, found in episodes:
        for item in found:
            if has_own and isinstance(item, VideoRecord):
                item = item._replace(split=splits[shard])
            yield item


def _split(shard: str) -> str:
    """The split that the name of a shard says, as in `bridge_dataset-val.tfrecord-00000-of-00128`; "" for none."""
    return named_split([posixpath.basename(shard).partition(".tfrecord")[0].rpartition("-")[2].lower()])


_Listed = Iterator[VideoRecord | RejectedRecord | Note]


def _camera(feature: str) -> str:
    """Name of the camera that an image feature is of."""
    return feature.removeprefix("steps/")


def _shard(entry: storage.Entry, key: str, cameras: list[str], rate: float) -> _Listed:
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
) -> _Listed:
    path, offset, length = span
    try:
        features = _features(file, path, offset, length, FEATURES_TO_LIST)
    except DamagedRecord as error:
        yield RejectedRecord(video_id=key, uri=path, reason="corrupt", message=str(error), version=version)
        return
    steps = _steps(features)
    text, changes = _text(features)
    if changes:
        message = f"its text changes at step {changes}; the first one is used"
        yield Note(kind="changing_text", item=key, uri=path, message=message)
    # Whether they can be used is found out where they are read.
    with_actions = any(ACTION.fullmatch(name) for name in features)
    for feature in cameras:
        # `episode_metadata/has_<camera>` is not asked: files in the wild say 0 for cameras with real frames.
        # A camera that was not there has blank ones, which the probe notices.
        yield VideoRecord(
            video_id=f"{key}/{_camera(feature)}",
            uri=video_uri(path, "rlds", offset, length, feature),
            text=text,
            camera=_camera(feature),
            episode_id=key,
            bytes=length,
            version=version,
            num_frames=steps,
            fps=rate,
            num_actions=steps if with_actions else 0,
            signals_uri=video_uri(path, "rlds", offset, length) if with_actions else "",
        )


def _features(
    file: IO[bytes], path: str, offset: int, length: int, wanted: Container[str]
) -> dict[str, Value]:
    """Those features of a record that are `wanted`, or all. Its checksum, and its frames, are left to the probe."""
    if storage.is_remote(path) and length < SPARSE_FROM:
        record = read_record(file, offset, length, verify=False)
        features = read_features(io.BytesIO(record), 0, length, wanted, LARGEST_FEATURE)
    else:
        features = read_features(file, offset, length, wanted, LARGEST_FEATURE)
    if not any(name in features for name in COUNTS):  # then the longest list gives the number of steps
        if length > LARGEST_RECORD:
            raise DamagedRecord(f"a record of {length:,} bytes that does not say how many steps it has")
        return parse_example(read_record(file, offset, length, verify=False))
    return features


def _described(folder: str) -> tuple[list[str], str]:
    """(cameras, name of the dataset) by `features.json` and `dataset_info.json`."""
    uri = storage.join(folder, "features.json")
    try:
        features = read_json(uri)
        cameras = sorted(path.removeprefix("steps/observation/") for path in _images(features, ""))
    except DAMAGE as error:
        raise CorpusError(f"{uri} cannot be used: {type(error).__name__}: {error}. Restore it.") from error
    try:
        name = str(read_json(storage.join(folder, "dataset_info.json"))["name"])
    except (FileNotFoundError, *DAMAGE):
        name = posixpath.basename(posixpath.dirname(folder))
    if not cameras:
        raise CorpusError(
            f"{uri} names no image among the features of steps, so there is no video in {folder}."
        )
    return cameras, name


def _images(node: dict[str, Any], path: str) -> Iterator[str]:
    """Paths of the image features of a features.json."""
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            yield from _images(child, f"{path}/{name}" if path else name)
    elif "sequence" in node:
        yield from _images(node["sequence"]["feature"], path)
    elif "image" in node and path.startswith("steps/") and "depth" not in path.lower():
        yield path


def _absent_shards(folder: str, shards: list[str]) -> Listing:
    """Shards that the others' names promise (`-00003-of-00010`) or a split of dataset_info.json."""
    promised = set[str]()
    try:
        for shard in shards:
            match = re.fullmatch(r"(.*\.tfrecord)-(\d{5})-of-(\d{5})", shard)
            if match:
                promised |= {f"{match[1]}-{n:05d}-of-{match[3]}" for n in range(int(match[3]))}
        info = read_json(storage.join(folder, "dataset_info.json"))
        for split in info["splits"]:
            count = len(split["shardLengths"])
            promised |= {
                f"{info['name']}-{split['name']}.tfrecord-{n:05d}-of-{count:05d}" for n in range(count)
            }
    except (FileNotFoundError, *DAMAGE):
        pass  # not needed: most of it follows from the names of the shards
    for name in sorted(promised - set(shards)):
        yield RejectedRecord(
            video_id=name,
            uri=storage.join(folder, name),
            reason="missing",
            message=f"the dataset promises {name}",
        )


def _text(features: dict[str, Value]) -> tuple[str, int]:
    """(the first text that is no blank, the step at which it changes or 0), of the likeliest feature that has one."""
    found = []
    for feature, values in features.items():
        match = TEXT.fullmatch(feature)
        if match is None or not isinstance(values, list):
            continue
        texts = [_decoded(value) for value in values]
        if any(texts):
            wordings = int(match["number"] or 0)
            order = (wordings, PLACES.index(match["place"]), "instruction" not in match["name"], feature)
            found.append((order, texts))
    if not found:
        return "", 0
    texts = min(found)[1]
    text = next(text for text in texts if text)
    return text, next((step for step, other in enumerate(texts) if other and other != text), 0)


def _decoded(value: memoryview) -> str:
    """The text in some bytes; "" where they are none."""
    if len(value) > 4 * LONGEST_TEXT:
        return ""
    try:
        return bytes(value).decode().strip()
    except UnicodeDecodeError:
        return ""


def _steps(features: dict[str, Value]) -> int:
    for name in COUNTS:
        if name in features:
            return len(features[name])
    return max(
        (len(v) for n, v in features.items() if n.startswith("steps/") and isinstance(v, list)), default=0
    )


def _actions(features: dict[str, Value], steps: int) -> np.ndarray | None:
    """(steps, A) float32; None where there are none. Raises: ValueError where they cannot be used."""
    names = sorted(name for name in features if ACTION.fullmatch(name))
    parts = [_matrix(features[name], name, steps) for name in names if not isinstance(features[name], list)]
    return np.concatenate(parts, axis=1) if parts and steps else None


def _matrix(values: Value, name: str, steps: int) -> np.ndarray:
    if not steps or not len(values) or len(values) % steps:
        raise ValueError(f"{name}: {len(values)} values in {steps} steps")
    return signal_matrix(np.asarray(values).reshape(steps, -1), name)
