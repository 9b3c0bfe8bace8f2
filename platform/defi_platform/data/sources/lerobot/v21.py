"""LeRobot datasets v2.1: one episode per video and parquet file, episodes and tasks as JSON lines.

Source of the layout: docs/formats.md, "LeRobot v2.1".
"""

from __future__ import annotations

import json
from typing import Any

from defi_platform import storage
from defi_platform.data.sources.lerobot.data_files import DataFiles
from defi_platform.data.sources.lerobot.info import DAMAGE, Tasks, json_lines, read_info, signal_names
from defi_platform.data.sources.lerobot.signals import ACTION, read_signals
from defi_platform.data.sources.lerobot.v3 import is_v3
from defi_platform.data.sources.records import (
    Listing,
    RejectedRecord,
    VideoRecord,
    files_below,
    record_or_missing,
)

__all__ = ["TITLE", "detect", "listing", "read_signals", "signal_names"]

TITLE = "LeRobot v2.1"


def detect(root: str, top: set[str]) -> bool:
    """True when `root` is a LeRobot dataset of version 2."""
    return "meta" in top and storage.exists(storage.join(root, "meta", "info.json")) and not is_v3(root)


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields one record per episode and camera that `meta/episodes.jsonl` names, whether its file exists or not."""
    info = read_info(root, fps)
    files = yield from files_below(root)
    tasks, data_files = Tasks(root), DataFiles(root, files)
    with_actions = ACTION in info.features
    seen: set[int] = set()
    for number, line in enumerate(json_lines(root, "episodes.jsonl"), start=1):
        if not line.strip():
            continue
        try:
            episode = json.loads(line)
            index, length = int(episode["episode_index"]), int(episode["length"])
            if index < 0 or length < 0:
                raise ValueError(f"episode_index is {index}, length is {length}")
            if index in seen:
                raise ValueError(f"episode_index {index} is listed before")
        except DAMAGE as error:
            yield RejectedRecord(
                video_id=f"meta/episodes.jsonl line {number}",
                uri=storage.join(root, "meta", "episodes.jsonl"),
                reason="bad_source",
                message=f"{type(error).__name__}: {error}",
            )
            continue
        seen.add(index)
        numbers = {"episode_chunk": index // info.chunk_size, "episode_index": index}
        data = _filled(info.data_path, numbers)
        signals = files.get(data) if with_actions else None
        text = _text(episode, tasks, data_files, data if data in files else None, index)
        for key, camera in info.cameras.items():
            record = VideoRecord(
                video_id=f"episode_{index:06d}/{key}",
                uri="",
                text=text,
                camera=camera,
                episode_id=f"episode_{index:06d}",
                num_frames=length,
                fps=info.fps,
                declared_fps=info.fps if fps is None else None,
                num_actions=length if with_actions else 0,
                signals_uri=storage.join(root, data) if with_actions else "",
                signals_version=signals.version if signals else "",
            )
            yield record_or_missing(
                files, _filled(info.video_path, numbers | {"video_key": key}), root, record
            )


def _filled(template: str, values: dict[str, Any]) -> str:
    # A template of version 3 in a dataset of version 2 names what there is not: then its file is missing.
    return template.format(**{"chunk_index": 0, "file_index": 0, "video_key": ""} | values)


def _text(episode: dict[str, Any], tasks: Tasks, data: DataFiles, file: str | None, index: int) -> str:
    for found in (episode.get("tasks"), episode.get("task"), episode.get("task_index")):
        text = tasks.text(found)
        if text is not None:
            return text
    return (tasks.text(data.tasks(file).get(index)) if file else None) or ""
