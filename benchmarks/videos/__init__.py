"""Synthetic corpora for the benchmarks: moving texture, encoded as cameras' video is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import av
import numpy as np

DISTINCT = 8
"""Encoded videos per corpus; the other files are copies of them under other names."""
FPS = 30


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (H, W, 3) noise on three scales: coarse shapes, edges and grain, as a camera sees."""
    total = np.zeros((height, width, 3), np.float32)
    for scale in (4, 16, 64):
        small = rng.random((height // scale + 1, width // scale + 1, 3), np.float32)
        total += np.repeat(np.repeat(small, scale, 0), scale, 1)[:height, :width]
    return (total / 3 * 255).astype(np.uint8)


def write_video(path: Path, seed: int, codec: str, frames: int, height: int, width: int) -> None:
    """A background that pans and a patch that moves across it, at x264's usual quality."""
    rng = np.random.default_rng(seed)
    background = texture(rng, height + height // 2, width + width // 2)
    patch = texture(rng, height // 5, width // 5)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast"} if codec == "libx264" else {"preset": "10", "crf": "40"}
        for t in range(frames):
            top, left = (int(side / 4 * (1 + np.sin(t / 40 + seed))) for side in (height, width))
            image = background[top : top + height, left : left + width].copy()
            top = int((height - len(patch)) * (0.5 + 0.5 * np.sin(t / 17)))
            left = int((width - patch.shape[1]) * (0.5 + 0.5 * np.cos(t / 23)))
            image[top : top + len(patch), left : left + patch.shape[1]] = patch
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def write_corpus(folder: Path, videos: int, codec: str, **shape: int) -> Path:
    """A folder of `videos` files."""
    folder.mkdir(parents=True)
    for number in range(videos):
        path = folder / f"{number:05d}.mp4"
        if number < DISTINCT:
            write_video(path, number, codec, **shape)
        else:
            shutil.copy(folder / f"{number % DISTINCT:05d}.mp4", path)
    return folder
