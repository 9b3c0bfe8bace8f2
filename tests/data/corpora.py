"""Small real corpora, made with PyAV and pyarrow: what the data tests read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform.data.manifest.table import SCHEMA, Manifest
from defi_platform.data.tables.mmap_table import MappedTable

FPS = 10


def picture(number: int, size: int = 64) -> np.ndarray:
    """(size, size, 3) uint8: frame `number` (0 to 255) as eight upright stripes, its bits from left to right."""
    bits = [(number >> (7 - bit)) & 1 for bit in range(8)]
    row = np.repeat(np.array(bits, np.uint8) * 200 + 20, size // 8)
    return np.broadcast_to(row[None, :, None], (size, size, 3)).copy()


def numbers_of(frames: np.ndarray) -> list[int]:
    """The inverse of `picture` for (T, H, W, 3), at any size that eight divides."""
    stripes = frames.mean(axis=(1, 3)).reshape(len(frames), 8, -1).mean(axis=2) > 120
    return (stripes @ (1 << np.arange(7, -1, -1))).tolist()


def write_video(path: Path, numbers: Sequence[int], size: int = 64, codec: str = "libx264") -> None:
    """Encodes `picture(n)` for each n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        stream.options = {"g": "4", "crf": "10", "bf": "0"} if codec == "libx264" else {}
        for number in numbers:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, size), format="rgb24")))
        container.mux(stream.encode())


def spoil(path: Path) -> None:
    """Size and time stay, the content does not: whoever opened the file again would find it bad."""
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def manifest_of(rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> Manifest:
    """A manifest in memory, from rows with the columns of `SCHEMA` (absent ones are null)."""
    names = tuple(names or dict.fromkeys(row["corpus"] for row in rows))
    parts = [pa.Table.from_pylist([row for row in rows if row["corpus"] == n], schema=SCHEMA) for n in names]
    return Manifest([MappedTable(part) for part in parts], None, names)


def write_lerobot(
    root: Path, lengths: Sequence[int], cameras: Sequence[str] = ("front",), actions: bool = True
) -> Path:
    """A LeRobot v3.0 dataset whose episodes share one mp4 per camera and one parquet.

    Episode e starts at frame sum(lengths[:e]) of the file; `picture` numbers run on through the file. Action of
    step t in episode e is (e, t, 0, 1); the state is (t, e).
    """
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    keys = [f"observation.images.{camera}" for camera in cameras]
    features: dict[str, object] = {key: {"dtype": "video", "shape": [64, 64, 3]} for key in keys}
    rows: dict[str, list[object]] = {"episode_index": [], "frame_index": [], "index": [], "task_index": []}
    if actions:
        features |= {
            "action": {"dtype": "float32", "shape": [4]},
            "observation.state": {"dtype": "float32", "shape": [2]},
        }
        rows |= {"action": [], "observation.state": []}
    episodes: list[dict[str, object]] = []
    start = 0
    for episode, length in enumerate(lengths):
        entry: dict[str, object] = {
            "episode_index": episode,
            "tasks": [f"task {episode % 2}"],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": 0,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
        }
        for key in keys:
            entry[f"videos/{key}/chunk_index"] = 0
            entry[f"videos/{key}/file_index"] = 0
            entry[f"videos/{key}/from_timestamp"] = start / FPS
            entry[f"videos/{key}/to_timestamp"] = (start + length) / FPS
        episodes.append(entry)
        for t in range(length):
            rows["episode_index"].append(episode)
            rows["frame_index"].append(t)
            rows["index"].append(start + t)
            rows["task_index"].append(episode % 2)
            if actions:
                rows["action"].append([float(episode), float(t), 0.0, 1.0])
                rows["observation.state"].append([float(t), float(episode)])
        start += length
    for key in keys:
        write_video(root / "videos" / key / "chunk-000" / "file-000.mp4", range(start))
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))
    pq.write_table(
        pa.Table.from_pylist(episodes), root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    )
    (root / "data" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(rows), root / "data" / "chunk-000" / "file-000.parquet")
    return root
