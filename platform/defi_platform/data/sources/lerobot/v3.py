"""LeRobot datasets v3.0: episodes share video and parquet files; the meta files say where each one lies.

Source of the layout: docs/formats.md, "LeRobot v3.0".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from defi_platform import storage
from defi_platform.data.sources.lerobot.data_files import DataFiles, open_parquet
from defi_platform.data.sources.lerobot.info import DAMAGE, Info, Tasks, read_info, signal_names, version_of
from defi_platform.data.sources.lerobot.recorded import initial_states
from defi_platform.data.sources.lerobot.signals import ACTION, read_signals
from defi_platform.data.sources.lerobot.spans import CameraSpans, camera_spans
from defi_platform.data.sources.records import (
    Files,
    Listing,
    RejectedRecord,
    VideoRecord,
    files_below,
    record_or_missing,
)
from defi_platform.data.tables.parquet_io import ROWS_PER_PART
from defi_platform.errors import CorpusError

__all__ = ["TITLE", "detect", "is_v3", "listing", "read_signals", "signal_names"]

TITLE = "LeRobot v3.0"


def detect(root: str, top: set[str]) -> bool:
    """True when `root` is a LeRobot dataset of version 3."""
    return "meta" in top and storage.exists(storage.join(root, "meta", "info.json")) and is_v3(root)


def is_v3(root: str) -> bool:
    """True when episodes share files, which is what version 3 changed."""
    return storage.exists(storage.join(root, "meta", "episodes")) or version_of(root).startswith("v3")


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per episode and camera, with its timestamps; the probe of its file says which frames these are."""
    info = read_info(root, fps)
    files = yield from files_below(root)
    tables = _Episodes(root, files)
    if not tables.names:
        raise CorpusError(f"{root} has no meta/episodes/, which says where its episodes lie. Restore it.")
    cameras = {key: camera_spans(iter(tables), key, info.fps) for key in info.cameras}
    first_of = _first_rows(tables)
    described = _Described(root, info, files, declared=info.fps if fps is None else None)
    row = 0
    for name, table in tables.named():
        for batch in table.to_batches(max_chunksize=ROWS_PER_PART):
            for episode in batch.to_pylist():
                where = f"{name} row {row}"
                try:
                    again = first_of.get(row)
                    if again is not None:
                        raise ValueError(
                            f"episode_index {episode['episode_index']} is in row {again} already"
                        )
                    yield from described.records(episode, row, cameras)
                except DAMAGE as error:
                    yield RejectedRecord(
                        video_id=where,
                        uri=storage.join(root, name),
                        reason="bad_source",
                        message=f"{type(error).__name__}: {error}",
                    )
                row += 1


class _Episodes:
    """The tables of `meta/episodes`, read anew each time: without statistics, but for those of `task_index`."""

    def __init__(self, root: str, files: Files) -> None:
        self._root = root
        self.names = sorted(n for n in files if n.startswith("meta/episodes/") and n.endswith(".parquet"))

    def named(self) -> Iterator[tuple[str, pa.Table]]:
        """Yields (name of the file, its rows). Raises: CorpusError for a damaged file."""
        for name in self.names:
            uri = storage.join(self._root, name)
            try:
                with open_parquet(uri) as file:
                    columns = [
                        c
                        for c in file.schema_arrow.names
                        if not c.startswith("stats/") or c in ("stats/task_index/min", "stats/task_index/max")
                    ]
                    yield name, file.read(columns=columns)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise CorpusError(
                    f"{uri} cannot be read: {error}. Restore it from the dataset's source."
                ) from error

    def __iter__(self) -> Iterator[pa.Table]:
        return (table for _, table in self.named())


def _first_rows(tables: _Episodes) -> dict[int, int]:
    """Row of an episode that is listed again -> the row that lists it first."""
    parts = []
    for table in tables:
        if "episode_index" not in table.column_names:
            parts.append(np.full(table.num_rows, -1, np.int64))
            continue
        try:
            column = table.column("episode_index").cast(pa.int64(), safe=False).fill_null(-1)
            parts.append(np.asarray(column.to_numpy(), np.int64))
        except (pa.ArrowException, ValueError):
            parts.append(np.full(table.num_rows, -1, np.int64))
    index = np.concatenate(parts)
    _, first, inverse = np.unique(index, return_index=True, return_inverse=True)
    first_of = first[inverse.reshape(-1)]
    again = np.flatnonzero((first_of != np.arange(len(index))) & (index >= 0))
    return dict(zip(again.tolist(), first_of[again].tolist(), strict=True))


class _Described:
    """Makes the records of an episode.

    Args:
        root: of the dataset.
        info: of the dataset.
        files: below `root`.
        declared: the dataset's own rate; None where the user sets another.
    """

    def __init__(self, root: str, info: Info, files: Files, declared: float | None) -> None:
        self._root, self._info, self._files, self._declared = root, info, files, declared
        self._data = DataFiles(root, files)
        self._with_actions = ACTION in info.features
        self._states = initial_states(root, files)

    @functools.cached_property
    def _tasks(self) -> Tasks:
        return Tasks(self._root)

    def records(
        self, episode: dict[str, Any], row: int, cameras: dict[str, CameraSpans]
    ) -> Iterator[VideoRecord | RejectedRecord]:
        """Yields the videos of a row of `meta/episodes`.

        Args:
            episode: the row.
            row: its number.
            cameras: key of each camera -> its spans.

        Raises: one of `DAMAGE` where the row is of no use to any camera.
        """
        index, length = _whole(episode["episode_index"], "episode_index"), _whole(episode["length"], "length")
        data = self._data_file(episode, index)
        text = self._text(episode, index, data)
        signals = self._files.get(data) if self._with_actions and data else None
        for key, camera in self._info.cameras.items():
            video_id = f"episode_{index:06d}/{key}"
            try:
                name = self._video_file(episode, key)
                start, stop = self._times(episode, key, length)
                other = int(cameras[key].overlaps[row])
                if other >= 0:
                    raise ValueError(
                        f"from_timestamp {start:.6g} to to_timestamp {stop:.6g} of {name} overlap the span that "
                        f"row {other} of meta/episodes has there"
                    )
            except DAMAGE as error:
                yield RejectedRecord(
                    video_id=video_id,
                    uri=storage.join(self._root, "meta", "episodes"),
                    reason="bad_source",
                    message=f"{key}: {type(error).__name__}: {error}",
                )
                continue
            record = VideoRecord(
                video_id=video_id,
                uri="",
                text=text,
                camera=camera,
                episode_id=f"episode_{index:06d}",
                first_frame=max(0, round(start * self._info.fps)),
                num_frames=length,
                fps=self._info.fps,
                declared_fps=self._declared,
                from_s=start,
                to_s=stop,
                steady=int(cameras[key].steady[row]),
                frames_before=int(cameras[key].before[row]),
                frames_in_file=int(cameras[key].in_file[row]),
                counted=int(cameras[key].counted[row]),
                num_actions=length if self._with_actions else 0,
                signals_uri=storage.join(self._root, data) if self._with_actions and data else "",
                signals_version=signals.version if signals else "",
                group=self._states.get(index, ""),
            )
            yield record_or_missing(self._files, name, self._root, record)

    def _video_file(self, episode: dict[str, Any], key: str) -> str:
        numbers = {
            name: _whole(episode.get(f"videos/{key}/{name}"), f"videos/{key}/{name}")
            for name in ("chunk_index", "file_index")
        }
        return self._info.video_path.format(video_key=key, **numbers)

    def _times(self, episode: dict[str, Any], key: str, length: int) -> tuple[float, float]:
        start, stop = (episode.get(f"videos/{key}/{name}_timestamp") for name in ("from", "to"))
        if start is None:
            raise ValueError(f"videos/{key}/from_timestamp is absent")
        start = float(start)
        stop = start + length / self._info.fps if stop is None else float(stop)
        if not (math.isfinite(start) and math.isfinite(stop)):
            raise ValueError(f"from_timestamp is {start}, to_timestamp is {stop}")
        if start < -0.5 / self._info.fps:
            raise ValueError(f"from_timestamp is {start:.6g}, before the start of the file")
        if stop <= start and length:
            raise ValueError(f"to_timestamp {stop:.6g} is not after from_timestamp {start:.6g}")
        return start, stop

    def _data_file(self, episode: dict[str, Any], index: int) -> str | None:
        """The file with the rows of an episode; where the index has a wrong one, it is looked up by the episode."""
        numbers = [episode.get(f"data/{name}") for name in ("chunk_index", "file_index")]
        named = None
        if all(isinstance(number, int) and number >= 0 for number in numbers):
            named = self._info.data_path.format(chunk_index=numbers[0], file_index=numbers[1])
        return self._data.holding(named, index) if self._with_actions else named

    def _text(self, episode: dict[str, Any], index: int, data: str | None) -> str:
        for found in (
            episode.get("tasks"),
            episode.get("task"),
            episode.get("task_index"),
            _only_task(episode),
        ):
            text = self._tasks.text(found)
            if text is not None:
                return text
        held = self._data.holding(data, index)
        if held is None or held not in self._files:
            return ""
        return self._tasks.text(self._data.tasks(held).get(index)) or ""


def _only_task(episode: dict[str, Any]) -> Any:
    """The task that all rows of an episode have, by its statistics."""
    low, high = (episode.get(f"stats/task_index/{name}") for name in ("min", "max"))
    return low if low is not None and low == high else None


def _whole(value: Any, name: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value}; a whole number from 0 on is expected")
    return value
