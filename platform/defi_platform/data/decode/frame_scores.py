"""Scores of frames by which the ingest rejects videos, taken while the probe decodes them anyway.

Numpy alone: this runs in decoder processes. h, w: size of a picture in grey levels (0 to 255).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SMALL = (36, 64)
"""(h, w) in which pictures are compared."""

SHARP_HEIGHT = 240
"""Height in which sharpness is measured: it depends on the size, so taller pictures are scaled down to it."""

SAMPLES_PER_SECOND = 2.0
MIN_SAMPLES = 8

CHANGE_UNIT = 0.25
"""Grey levels per step of `FrameScores.changes`."""

Scaled = Callable[[int, int], np.ndarray]
"""(height, width) -> the picture in that size, uint8 (h, w)"""


@dataclass(frozen=True, eq=False)
class FrameScores:
    """Brightness, sharpness, motion and hashes of the frames of a file. n sampled frames, T frames."""

    sampled: np.ndarray
    """int32 (n,): frame numbers, two per second or more."""
    luma: np.ndarray
    """float32 (n,): mean grey level."""
    motion: np.ndarray
    """float32 (n,): mean change of grey level since the sample before; 0 for the first."""
    sharpness: np.ndarray
    """float32 (n,): variance of the Laplacian."""
    hashes: np.ndarray
    """uint64 (n,): difference hash, one bit per pair of neighbours in an 8 x 9 picture."""
    changes: bytes
    """T values 0 to 255: mean change of grey level since the frame before, in steps of `CHANGE_UNIT`."""


class FrameScorer:
    """Scores the frames of one file in their order.

    Args:
        num_frames: of the file.
        fps: of the file; 0 where it is not known.
        height: of its pictures, in pixels.
        width: of its pictures, in pixels.
    """

    def __init__(self, num_frames: int, fps: float, height: int, width: int) -> None:
        per_sample = round((fps or 10.0) / SAMPLES_PER_SECOND)
        self._step = max(1, min(per_sample, num_frames // MIN_SAMPLES))
        scale = min(1.0, SHARP_HEIGHT / max(1, height))
        self._sharp_size = max(3, round(height * scale)), max(3, round(width * scale))
        self._last: np.ndarray | None = None
        self._sample: np.ndarray | None = None
        self._count = 0
        self._rows: list[tuple[int, float, float, float, np.uint64]] = []
        self._changes = bytearray()

    def add(self, scaled: Scaled) -> None:
        """Scores the next frame."""
        small = scaled(*SMALL).astype(np.float32)
        change = 0.0 if self._last is None else _distance(small, self._last)
        self._changes.append(min(255, round(change / CHANGE_UNIT)))
        self._last = small
        if self._count % self._step == 0:
            motion = 0.0 if self._sample is None else _distance(small, self._sample)
            self._sample = small
            sharp = _laplacian_variance(scaled(*self._sharp_size))
            self._rows.append((self._count, float(small.mean()), motion, sharp, _hash(scaled(8, 9))))
        self._count += 1

    def result(self) -> FrameScores:
        """Returns the scores of the frames so far."""
        columns = list(zip(*self._rows, strict=True)) or [()] * 5
        return FrameScores(
            sampled=np.array(columns[0], np.int32),
            luma=np.array(columns[1], np.float32),
            motion=np.array(columns[2], np.float32),
            sharpness=np.array(columns[3], np.float32),
            hashes=np.array(columns[4], np.uint64),
            changes=bytes(self._changes),
        )


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def _laplacian_variance(grey: np.ndarray) -> float:
    g = grey.astype(np.float32)
    edges = g[:-2, 1:-1] + g[2:, 1:-1] + g[1:-1, :-2] + g[1:-1, 2:] - 4 * g[1:-1, 1:-1]
    return float(edges.var())


def _hash(grey: np.ndarray) -> np.uint64:
    brighter = grey[:, 1:] > grey[:, :-1]
    return np.uint64(int.from_bytes(np.packbits(brighter).tobytes(), "big"))
