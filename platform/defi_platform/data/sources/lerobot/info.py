"""Metadata of a LeRobot dataset: `meta/info.json` with path templates and cameras, and the texts of its tasks."""

from __future__ import annotations

import io
import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.sources.records import SignalNames
from defi_platform.errors import CorpusError

PLACES = frozenset({"video_key", "episode_chunk", "episode_index", "chunk_index", "file_index"})
"""What a path template may name."""

FORMAT_SPEC = re.compile(r"(0?\d)?d?")
"""Of a number in a path template: at most nine digits."""

IMAGES = "observation.images."

DAMAGE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""Raised by metadata that is not what it should be."""


@dataclass(frozen=True)
class Info:
    """The parts of `meta/info.json` that are used."""

    version: str
    fps: float
    cameras: dict[str, str]
    """Key of each video feature -> the camera's name."""
    features: dict[str, Any]
    video_path: str
    data_path: str
    chunk_size: int


def read_info(root: str, fps: float | None = None) -> Info:
    """Reads `meta/info.json`.

    Args:
        root: of the dataset.
        fps: frames per second that the user sets; then the file's own may be unusable.

    Raises: CorpusError when it is absent or damaged.
    """
    uri = storage.join(root, "meta", "info.json")
    try:
        raw = json.loads(storage.read_bytes(uri))
        features = {str(name): dict(feature) for name, feature in dict(raw["features"]).items()}
        own_fps = float(raw["fps"]) if fps is None else fps
        if not (math.isfinite(own_fps) and own_fps > 0):
            raise ValueError(f"fps is {own_fps}; set data.corpora.NAME.fps")
        chunk_size = int(raw.get("chunks_size") or 1000)
        if chunk_size < 1:
            raise ValueError(f"chunks_size is {chunk_size}")
        return Info(
            version=str(raw["codebase_version"]),
            fps=own_fps,
            cameras=camera_names([n for n, feature in features.items() if feature.get("dtype") == "video"]),
            features=features,
            video_path=_template(raw.get("video_path")),
            data_path=_template(raw.get("data_path")),
            chunk_size=chunk_size,
        )
    except FileNotFoundError as error:
        raise CorpusError(f"{root} has no meta/info.json, so it is not a LeRobot dataset.") from error
    except DAMAGE as error:
        raise CorpusError(
            f"{uri} cannot be used: {type(error).__name__}: {error}. Restore it from the dataset's source."
        ) from error


def version_of(root: str) -> str:
    """`codebase_version` of the dataset; "" where it cannot be read, which `read_info` then says."""
    try:
        return str(
            json.loads(storage.read_bytes(storage.join(root, "meta", "info.json")))["codebase_version"]
        )
    except (FileNotFoundError, *DAMAGE):
        return ""


def camera_names(keys: list[str]) -> dict[str, str]:
    """Key of each video feature -> the last part of it, or more where two would get the same name; sorted by key."""
    last = Counter(key.rsplit(".", 1)[-1] for key in keys)
    return {
        key: key.removeprefix(IMAGES) if last[key.rsplit(".", 1)[-1]] > 1 else key.rsplit(".", 1)[-1]
        for key in sorted(keys)
    }


def signal_names(root: str) -> SignalNames:
    """Names of the entries of `action` and `observation.state` by `meta/info.json`; () where it has none."""
    features = read_info(root, fps=1.0).features
    return SignalNames(*(_names(features.get(key)) for key in ("action", "observation.state")))


def _names(feature: Any) -> tuple[str, ...]:
    """The names of a feature: a list, or lists in a mapping or a list, as different recorders write them."""
    found = feature.get("names") if isinstance(feature, dict) else None
    while isinstance(found, dict) and len(found) == 1:
        found = next(iter(found.values()))
    if isinstance(found, dict) and all(isinstance(value, int) for value in found.values()):
        found = sorted(found, key=found.__getitem__)
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return ()
    return tuple(found)


def _template(value: Any) -> str:
    """A path template, checked: one of another shape could ask for gigabytes of digits."""
    template = str(value or "")
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is not None and (name not in PLACES or conversion or not FORMAT_SPEC.fullmatch(spec or "")):
            raise ValueError(f"'{template}' is no path template of a LeRobot dataset")
    return template


class Tasks:
    """Texts of a dataset's tasks by their index.

    Args:
        root: of the dataset.
    """

    def __init__(self, root: str) -> None:
        self._texts = dict(_task_table(root)) or dict(_task_lines(root))

    def text(self, found: Any) -> str | None:
        """The instruction, from the shapes seen in the wild; None where `found` says nothing, or names no known task.

        Args:
            found: a text, an index, a mapping with either, or a list of these, of which the first counts.
        """
        first = next(iter(found), None) if isinstance(found, list | tuple) else found
        if isinstance(first, dict):
            first = first.get("task", first.get("task_index"))
        if isinstance(first, float) and first.is_integer():
            first = int(first)
        if isinstance(first, int) and not isinstance(first, bool):
            return self._texts.get(first)
        return first if isinstance(first, str) and first else None


def _task_table(root: str) -> Iterator[tuple[int, str]]:
    """Tasks of version 3: a table whose texts are in its index."""
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(root, "meta", "tasks.parquet"))))
    except FileNotFoundError:
        return
    except (pa.ArrowException, OSError) as error:
        print(
            f"ingest: {root}/meta/tasks.parquet cannot be read ({error}); texts come from elsewhere",
            flush=True,
        )
        return
    # pandas calls an index without a name __index_level_0__.
    names = [n for n in ("task", "__index_level_0__", "tasks") if n in table.column_names]
    if "task_index" not in table.column_names or not names:
        return
    for index, text in zip(*(table.column(n).to_pylist() for n in ("task_index", names[0])), strict=True):
        if isinstance(index, int) and isinstance(text, str):
            yield index, text


def _task_lines(root: str) -> Iterator[tuple[int, str]]:
    for line in json_lines(root, "tasks.jsonl"):
        try:
            task = json.loads(line)
            yield int(task["task_index"]), str(task["task"])
        except DAMAGE:
            continue  # an episode usually carries its text itself; one that does not counts as without


def json_lines(root: str, name: str) -> Iterator[bytes]:
    """Yields the lines of `meta/<name>`, empty ones too; none where the file is absent."""
    try:
        content = storage.read_bytes(storage.join(root, "meta", name))
    except FileNotFoundError:
        return
    # Not `splitlines`: U+2028 within a text ends no line.
    yield from content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
