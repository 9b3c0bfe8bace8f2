"""LeRobot datasets v3.0: episodes share video and parquet files; the meta files say where each one lies.

Source of the layout: docs/formats.md, "LeRobot v3.0".
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.sources.lerobot.signals import read_signals
from defi_platform.data.sources.records import (
    Listing,
    RejectedRecord,
    VideoRecord,
    files_below,
    record_or_missing,
)
from defi_platform.data.tables.parquet_io import ROWS_PER_PART
from defi_platform.errors import CorpusError

__all__ = ["TITLE", "Info", "detect", "episodes", "is_v3", "listing", "read_info", "read_signals"]


TITLE = "LeRobot v3.0"


@dataclass(frozen=True)
class Info:
    """The parts of `meta/info.json` that are used."""

    version: str
    fps: float
    cameras: tuple[str, ...]
    features: dict[str, Any]
    video_path: str
    data_path: str
    chunk_size: int
    total_episodes: int


def read_info(root: str) -> Info:
    """Reads `meta/info.json`. Raises: CorpusError when it is absent or damaged."""
    uri = storage.join(root, "meta", "info.json")
    try:
        raw = json.loads(storage.read_bytes(uri))
        features = dict(raw["features"])
        return Info(
            version=str(raw["codebase_version"]),
            fps=float(raw["fps"]),
            cameras=tuple(sorted(k for k, f in features.items() if f.get("dtype") == "video")),
            features=features,
            video_path=str(raw.get("video_path") or ""),
            data_path=str(raw.get("data_path") or ""),
            chunk_size=int(raw.get("chunks_size") or 1000),
            total_episodes=int(raw.get("total_episodes") or 0),
        )
    except FileNotFoundError as error:
        raise CorpusError(f"{root} has no meta/info.json, so it is not a LeRobot dataset.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(
            f"{uri} cannot be used: {type(error).__name__}: {error}. Restore it from the dataset's source."
        ) from error


def detect(root: str, top: set[str]) -> bool:
    """True when `root` is a LeRobot dataset of version 3."""
    return "meta" in top and storage.exists(storage.join(root, "meta", "info.json")) and is_v3(root)


def is_v3(root: str) -> bool:
    """True when episodes share files, which is what version 3 changed."""
    return storage.exists(storage.join(root, "meta", "episodes"))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per episode and camera, located by `from_timestamp` at the dataset's `fps`."""
    info = read_info(root)
    files = yield from files_below(root)
    with_actions = "action" in info.features
    for episode in episodes(root, files):
        index = int(episode["episode_index"])
        length = int(episode["length"])
        tasks = episode.get("tasks")
        text = str(tasks[0]) if tasks is not None and len(tasks) else ""
        data = _formatted(
            info.data_path, chunk_index=episode["data/chunk_index"], file_index=episode["data/file_index"]
        )
        has_data = with_actions and data in files
        if with_actions and not has_data:
            yield RejectedRecord(
                video_id=f"episode_{index:06d}/data",
                uri=storage.join(root, data),
                reason="missing",
                message=f"{data}, which should hold the episode's actions, is not there",
            )
        for camera in info.cameras:
            video_id = f"episode_{index:06d}/{camera}"
            key = f"videos/{camera}"
            if episode.get(f"{key}/chunk_index") is None:
                yield RejectedRecord(
                    video_id=video_id,
                    uri=root,
                    reason="bad_source",
                    message=f"meta/episodes has no {key}/chunk_index",
                )
                continue
            name = _formatted(
                info.video_path,
                video_key=camera,
                chunk_index=episode[f"{key}/chunk_index"],
                file_index=episode[f"{key}/file_index"],
            )
            record = VideoRecord(
                video_id=video_id,
                uri="",
                text=text,
                camera=camera.rsplit(".", 1)[-1],
                episode_id=f"episode_{index:06d}",
                first_frame=round(float(episode[f"{key}/from_timestamp"]) * info.fps),
                num_frames=length,
                fps=fps or info.fps,
                num_actions=length if has_data else 0,
                signals_uri=files[data].uri if has_data else "",
            )
            yield record_or_missing(files, name, root, record)


def episodes(root: str, files: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows of `meta/episodes`, without the statistics. Raises: CorpusError for a damaged file."""
    for name in sorted(n for n in files if n.startswith("meta/episodes/") and n.endswith(".parquet")):
        uri = storage.join(root, name)
        try:
            file = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
            columns = [c for c in file.schema_arrow.names if not c.startswith("stats/")]
            rows = file.read(columns=columns)
        except (OSError, ValueError) as error:
            raise CorpusError(
                f"{uri} cannot be read: {error}. Restore it from the dataset's source."
            ) from error
        for batch in rows.to_batches(max_chunksize=ROWS_PER_PART):
            yield from batch.to_pylist()


def _formatted(template: str, **values: Any) -> str:
    return template.format(**{k: int(v) if k.endswith("index") else v for k, v in values.items()})
