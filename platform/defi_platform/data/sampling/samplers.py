"""Frame samplers, which cut a sample out of a video: clips for GFDM, pairs for GIDM, chunks for the policy.

Their fields and reprs are part of the fingerprint of a plan.

N samples, T frames. Frame numbers are relative to the video's own start.

Every rule answers twice: `indices` for many videos of a steady rate at once, `at_times` for one video whose frames
come at times of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defi_platform.config import DataConfig


@dataclass(frozen=True)
class ClipRule:
    """`frames` frames, spread evenly over the whole video or over `span_s` seconds of it."""

    frames: int
    span_s: float | None = None
    field: str = "data.clip_span_s"
    """Config key of `span_s`, for messages."""

    @classmethod
    def of(cls, data: DataConfig) -> ClipRule:
        """The rule that a data configuration asks for."""
        return cls(data.clip_frames, data.clip_span_s)

    def min_frames(self, fps: np.ndarray) -> np.ndarray:
        """Fewest frames that a video must have, int (N,); `fps`: (N,), of each video."""
        if self.span_s is None:
            return np.full(len(fps), 2)
        return np.maximum(2, np.rint(self.span_s * fps).astype(np.int64) + 1)

    def indices(self, num_frames: np.ndarray, fps: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Frame numbers of clips, int64 (N, T).

        Args:
            num_frames: int (N,), of each video.
            fps: (N,), of each video.
            draw: (N,), uniform in [0, 1); positions the span.
        """
        span = num_frames - 1 if self.span_s is None else self.min_frames(fps) - 1
        start = np.floor(draw * (num_frames - span)).astype(np.int64)
        steps = np.linspace(0.0, 1.0, self.frames)
        return np.asarray(start[:, None] + np.rint(steps[None, :] * span[:, None]).astype(np.int64))

    def at_times(self, times: np.ndarray, draw: float) -> np.ndarray:
        """Frame numbers of one clip, int (T,).

        Args:
            times: seconds of each frame of the video, from 0 on.
            draw: uniform in [0, 1); positions the span.
        """
        span = times[-1] if self.span_s is None else min(self.span_s, times[-1])
        start = draw * (times[-1] - span)
        return _nearest(times, start + np.linspace(0.0, 1.0, self.frames) * span)


@dataclass(frozen=True)
class PairRule:
    """Two frames `interval_s` seconds apart, whatever the rate."""

    interval_s: float = 1.0
    field: str = "data.pair_interval_s"
    """Config key of `interval_s`, for messages."""

    @classmethod
    def of(cls, data: DataConfig) -> PairRule:
        """The rule that a data configuration asks for."""
        return cls(data.pair_interval_s)

    def gap(self, fps: np.ndarray) -> np.ndarray:
        """Frames between the two, at least one, int (N,); `fps`: (N,), of each video."""
        return np.maximum(1, np.rint(self.interval_s * fps).astype(np.int64))

    def min_frames(self, fps: np.ndarray) -> np.ndarray:
        """Fewest frames that a video must have, int (N,); `fps`: (N,), of each video."""
        return self.gap(fps) + 1

    def indices(self, num_frames: np.ndarray, fps: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Frame numbers of pairs, int64 (N, 2).

        Args:
            num_frames: int (N,), of each video.
            fps: (N,), of each video.
            draw: (N,), uniform in [0, 1); positions the pair.
        """
        gap = self.gap(fps)
        start = np.floor(draw * (num_frames - gap)).astype(np.int64)
        return np.stack([start, start + gap], axis=1)

    def at_times(self, times: np.ndarray, draw: float) -> np.ndarray:
        """Frame numbers of one pair, int (2,).

        Drawn from the pairs whose distance is within half a usual frame of the interval; where a video has none,
        because it stands still for longer, from those that come closest.

        Args:
            times: seconds of each frame of the video, from 0 on.
            draw: uniform in [0, 1); chooses the pair.
        """
        second = np.maximum(
            _nearest(times, times + self.interval_s), np.minimum(np.arange(1, len(times) + 1), len(times) - 1)
        )
        error = np.abs(times[second] - times - self.interval_s)
        # The last frame has no successor to pair with.
        error[-1] = np.inf
        allowed = max(float(error.min()), float(np.median(np.diff(times))) / 2) + 1e-3
        first = np.flatnonzero(error <= allowed)
        chosen = int(first[int(draw * len(first))])
        return np.array([chosen, second[chosen]])


@dataclass(frozen=True)
class ChunkRule:
    """Frame t of every camera and the actions t to t + chunk - 1; past the episode's end they are masked."""

    chunk: int
    field: str = "model chunk"
    """Name of `chunk` in the configuration, for messages."""

    def min_frames(self, fps: np.ndarray) -> np.ndarray:
        """Fewest frames that a video must have, int (N,); `fps`: (N,), of each video."""
        return np.ones(len(fps), np.int64)

    def indices(self, num_frames: np.ndarray, fps: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Frame numbers t, int64 (N, 1).

        Args:
            num_frames: int (N,), of each video.
            fps: (N,), of each video.
            draw: (N,), uniform in [0, 1); chooses the frame.
        """
        return np.asarray(np.floor(draw * num_frames).astype(np.int64)[:, None])

    def at_times(self, times: np.ndarray, draw: float) -> np.ndarray:
        """Frame number t, int (1,): every frame is a sample, whenever it comes.

        Args:
            times: seconds of each frame of the video, from 0 on.
            draw: uniform in [0, 1); chooses the frame.
        """
        return np.array([int(draw * len(times))])


def _nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Frame closest to each of the `wanted` seconds."""
    after = np.clip(np.searchsorted(times, wanted), 1, len(times) - 1)
    return np.asarray(after - (wanted - times[after - 1] < times[after] - wanted))


Rule = ClipRule | PairRule | ChunkRule
