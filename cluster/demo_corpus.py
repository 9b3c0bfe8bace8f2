"""The corpus of the demo, and the manifest of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

DIFFERENT_VIDEOS, FPS = 8, 30


def write_corpus(folder: Path, videos: int) -> None:
    """Writes videos of a square that moves over a gradient; several names share a file's content."""
    from defi_client.recording.h264 import encode_h264

    folder.mkdir(parents=True)
    height, width, count = 240, 320, 10 * FPS
    y, x = np.mgrid[0:height, 0:width]
    for number in range(DIFFERENT_VIDEOS):
        ground = np.stack([x * 255 // width, y * 255 // height, (x + y + 40 * number) % 256], -1) // 2
        frames = []
        for t in range(count):
            frame = ground.astype(np.uint8)
            left, top = (3 * t + 40 * number) % (width - 40), 60 + 10 * number
            frame[top : top + 40, left : left + 40] = (250, 200, 30 * number)
            frames.append(frame)
        (folder / f"video_{number:04d}.mp4").write_bytes(encode_h264(frames, FPS))
    for number in range(DIFFERENT_VIDEOS, videos):
        os.link(folder / f"video_{number % DIFFERENT_VIDEOS:04d}.mp4", folder / f"video_{number:04d}.mp4")


def rows_of_manifest(folder: Path) -> list[dict[str, Any]]:
    """All rows of a manifest, in its own order."""
    import pyarrow.parquet as pq

    (file,) = (folder / "corpora" / "videos").glob("videos-*.parquet")
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows
