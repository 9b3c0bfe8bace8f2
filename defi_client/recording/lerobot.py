"""Writes a corpus in LeRobot's v3.0 format: Parquet tables, H.264 video, statistics.

Episodes arrive encoded (`encode_h264`), so writing copies bytes and never decodes. Many episodes share a
file until it reaches the size that `meta/info.json` names.

Source of the layout: LeRobot's dataset format v3.0; see docs/formats.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from defi_client.recording.h264 import GOP, Mp4Joiner

FILES_PER_CHUNK = 1000
DATA_FILE_MB = 100
VIDEO_FILE_MB = 200
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

Stats = Dict[str, NDArray[Any]]
"""min, max, mean, std, count and q01 to q99 of one feature; (d,) each, for images (3, 1, 1), count (1,)."""


@dataclass(frozen=True)
class Camera:
    """One video feature; its key is `observation.images.<name>`."""

    name: str
    height: int
    width: int

    @property
    def key(self) -> str:
        """Its name among the features."""
        return f"observation.images.{self.name}"


@dataclass(frozen=True)
class Vector:
    """One float32 feature per frame, e.g. `action`."""

    key: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Episode:
    """One episode as the writer takes it; n frames."""

    text: str
    videos: dict[str, bytes]
    """mp4 per camera name, n frames each."""
    video_stats: dict[str, Stats]
    """`frame_stats` per camera name."""
    length: int
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """(n, d) per vector key."""


def frame_stats(frames: NDArray[np.uint8], max_frames: int = 32) -> Stats:
    """Computes statistics per colour channel of a sample of uint8 (n, H, W, 3) frames, as values in [0, 1]."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), max_frames)).astype(int))
    stride = max(1, int(np.sqrt(frames.shape[1] * frames.shape[2] / 128**2)))
    pixels = frames[chosen, ::stride, ::stride].reshape(-1, 3).astype(np.float64) / 255.0
    stats = {name: value.reshape(3, 1, 1) for name, value in vector_stats(pixels).items() if name != "count"}
    return {**stats, "count": np.array([len(chosen)])}


def vector_stats(values: NDArray[Any]) -> Stats:
    """Computes statistics over the rows of (n, d) values: (d,) each."""
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles)),
    }


def pooled_stats(parts: list[Stats]) -> Stats:
    """Pools the statistics of parts into those of their union. Exact but for the quantiles, which are means weighted by count."""
    counts = np.array([float(part["count"][0]) for part in parts])
    weights = counts / counts.sum()

    def weighted(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        return np.tensordot(weights, np.stack(arrays), axes=1)

    mean = weighted([part["mean"] for part in parts])
    variance = weighted([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([int(counts.sum())]),
        **{name: weighted([part[name] for part in parts]) for name in QUANTILES},
    }


class LeRobotWriter:
    """Fills a folder with one dataset: `add` each episode in order, then `finish`.

    The folder is whole only after `finish`; callers give a folder of `storage.committed_folder`.
    """

    def __init__(
        self, folder: Path, fps: int, cameras: list[Camera], vectors: list[Vector], robot: str
    ) -> None:
        self._folder = folder
        self._fps = fps
        self._cameras = cameras
        self._vectors = vectors
        self._robot = robot
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._stats: list[dict[str, Stats]] = []
        self._vector_values: dict[str, list[NDArray[np.float32]]] = {vector.key: [] for vector in vectors}
        self._frames = 0
        self._rows: list[pa.Table] = []
        self._data_file = 0
        self._joiners: dict[str, tuple[int, Mp4Joiner]] = {}

    def add(self, episode: Episode) -> None:
        """Appends one episode. Raises: ValueError when a video or vector is not `length` frames long."""
        index, n = len(self._episodes), episode.length
        task = self._tasks.setdefault(episode.text, len(self._tasks))
        if sum(table.nbytes for table in self._rows) > DATA_FILE_MB << 20:
            self._write_rows()
        row: dict[str, Any] = {
            "episode_index": index,
            "tasks": [episode.text],
            "length": n,
            **_position("data", self._data_file),
            "dataset_from_index": self._frames,
            "dataset_to_index": self._frames + n,
        }
        for camera in self._cameras:
            row.update(self._add_video(camera, episode.videos[camera.name], n, index))

        columns: dict[str, NDArray[Any]] = {
            "timestamp": (np.arange(n) / self._fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, index),
            "index": np.arange(self._frames, self._frames + n),
            "task_index": np.full(n, task),
        }
        arrays: dict[str, pa.Array] = {}
        stats: dict[str, Stats] = {c.key: episode.video_stats[c.name] for c in self._cameras}
        for vector in self._vectors:
            values = episode.vectors[vector.key]
            if values.shape != (n, len(vector.names)):
                raise ValueError(f"{vector.key} is {values.shape}, not {(n, len(vector.names))}")
            flat = pa.array(np.ascontiguousarray(values, np.float32).reshape(-1))
            arrays[vector.key] = pa.FixedSizeListArray.from_arrays(flat, len(vector.names))
            stats[vector.key] = vector_stats(values.astype(np.float64))
            self._vector_values[vector.key].append(values)
        for name, column in columns.items():
            arrays[name] = pa.array(column)
            stats[name] = vector_stats(column.astype(np.float64)[:, None])
        self._rows.append(pa.table(arrays))
        self._episodes.append(row)
        self._stats.append(stats)
        self._frames += n

    def finish(self) -> None:
        """Writes what is pending and the metadata. Raises: ValueError when there is no episode."""
        if not self._episodes:
            raise ValueError("a dataset without episodes cannot be written")
        self._write_rows()
        for _, joiner in self._joiners.values():
            joiner.close()
        meta = self._folder / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        pq.write_table(_tasks_table(self._tasks), meta / "tasks.parquet")
        self._write_episodes(meta / "episodes" / "chunk-000" / "file-000.parquet")
        pooled = {key: pooled_stats([stats[key] for stats in self._stats]) for key in self._stats[0]}
        for key, values in self._vector_values.items():
            # Normalisation reads these: exact quantiles, also where a mean of the episodes' would mislead.
            pooled[key] = vector_stats(np.concatenate(values).astype(np.float64))
        (meta / "stats.json").write_text(
            json.dumps({k: {n: v.tolist() for n, v in s.items()} for k, s in pooled.items()}, indent=2)
        )
        (meta / "info.json").write_text(json.dumps(self._info(), indent=2))

    def _add_video(self, camera: Camera, video: bytes, length: int, episode: int) -> dict[str, Any]:
        number, joiner = self._joiners.get(camera.key, (-1, None))
        if joiner is None or joiner.bytes + len(video) > VIDEO_FILE_MB << 20:
            if joiner is not None:
                joiner.close()
            number += 1
            path = self._folder / _file_name(f"videos/{camera.key}", number, "mp4")
            path.parent.mkdir(parents=True, exist_ok=True)
            joiner = Mp4Joiner(path, self._fps)
            self._joiners[camera.key] = (number, joiner)
        start = joiner.frames
        joiner.add(video)
        if joiner.frames - start != length:
            raise ValueError(
                f"episode {episode}: {camera.key} has {joiner.frames - start} frames, not {length}"
            )
        return {
            **_position(f"videos/{camera.key}", number),
            f"videos/{camera.key}/from_timestamp": start / self._fps,
            f"videos/{camera.key}/to_timestamp": joiner.frames / self._fps,
        }

    def _write_rows(self) -> None:
        if not self._rows:
            return
        path = self._folder / _file_name("data", self._data_file, "parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(self._rows), path)
        self._rows = []
        self._data_file += 1

    def _write_episodes(self, path: Path) -> None:
        rows = []
        for row, stats in zip(self._episodes, self._stats):
            flat = {f"stats/{k}/{n}": v.tolist() for k, s in stats.items() for n, v in s.items()}
            rows.append({**row, **flat, **_position("meta/episodes", 0)})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)

    def _info(self) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for camera in self._cameras:
            features[camera.key] = {
                "dtype": "video",
                "shape": [camera.height, camera.width, 3],
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": camera.height,
                    "video.width": camera.width,
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False,
                    "video.fps": self._fps,
                    "video.channels": 3,
                    "video.g": GOP,
                    "has_audio": False,
                },
            }
        for vector in self._vectors:
            features[vector.key] = {
                "dtype": "float32",
                "shape": [len(vector.names)],
                "names": list(vector.names),
            }
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        for name in ("frame_index", "episode_index", "index", "task_index"):
            features[name] = {"dtype": "int64", "shape": [1], "names": None}
        return {
            "codebase_version": "v3.0",
            "robot_type": self._robot,
            "total_episodes": len(self._episodes),
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": DATA_FILE_MB,
            "video_files_size_in_mb": VIDEO_FILE_MB,
            "fps": self._fps,
            "splits": {"train": f"0:{len(self._episodes)}"},
            "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
            "features": features,
        }


def _tasks_table(tasks: dict[str, int]) -> pa.Table:
    """The texts and their numbers; LeRobot reads the texts as the index of a pandas table, so they are marked as such."""
    table = pa.table({"task_index": list(tasks.values()), "task": list(tasks)})
    columns = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    ]
    marks = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [{**column, "metadata": None} for column in columns],
        "pandas_version": "1.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(marks)})


def _position(prefix: str, number: int) -> dict[str, int]:
    chunk, file = divmod(number, FILES_PER_CHUNK)
    return {f"{prefix}/chunk_index": chunk, f"{prefix}/file_index": file}


def _file_name(prefix: str, number: int, suffix: str) -> str:
    chunk, file = divmod(number, FILES_PER_CHUNK)
    return f"{prefix}/chunk-{chunk:03d}/file-{file:03d}.{suffix}"
