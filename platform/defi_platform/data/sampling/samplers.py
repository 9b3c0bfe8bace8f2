"""Frame samplers, which cut a sample out of a video: clips for GFDM, pairs for GIDM, chunks for the policy.

Their fields and reprs are part of the fingerprint of a plan.

N samples, T frames. Frame numbers are relative to the video's own start.

A rule says how many frames of a video a sample can start at (`starts`), and which frames it has, twice: `indices` for
many videos of a steady rate at once, `at_times` for one video whose frames come at times of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from defi_platform.config import DataConfig, SamplingConfig
from defi_platform.config.data_checks import UNITS
from defi_platform.errors import ConfigError

FRAMES, SECONDS, VIDEOS = UNITS
"""What is drawn evenly: the frames that a sample can start at, the seconds they last, or the videos they are of."""


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Fields of every rule: which videos it is for, and how they are drawn."""

    unit: str = FRAMES
    """One of UNITS."""
    max_frames: int | None = None
    """Longer videos are left out."""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"sampling.unit is '{self.unit}'; choose one of {', '.join(UNITS)}.")
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"sampling.max_frames is {self.max_frames}; at least 1 is needed, or null.")

    @property
    def draws_videos(self) -> bool:
        """Whether each video is one sample of an epoch, instead of each frame or second."""
        return self.unit == VIDEOS

    def of_corpus(self, sampling: SamplingConfig) -> Self:
        """This rule with what the settings of a corpus change."""
        return replace(self, unit=sampling.unit, max_frames=sampling.max_frames)


@dataclass(frozen=True)
class ClipRule(_Drawing):
    """`frames` frames: spread evenly over the whole video or over `span_s` seconds of it, or every `stride`th one."""

    frames: int
    span_s: float | None = None
    field: str = "data.clip_span_s"
    """Config key of `span_s`, for messages."""
    stride: int | None = None
    """Frames from one to the next; then `span_s` says nothing."""
    start_every: int = 1
    """Frames from one start to the next that a clip may have."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames < 2:
            raise ConfigError(f"data.clip_frames is {self.frames}; a clip has at least 2 frames.")
        _check_seconds(self.field, self.span_s)
        for name, value in (("stride", self.stride), ("start_every", self.start_every)):
            if value is not None and value < 1:
                raise ConfigError(f"sampling.{name} is {value}; at least 1 frame is needed.")

    def __str__(self) -> str:
        if self.stride is not None:
            return f"a clip of {self.frames} frames, every {self.stride}th"
        reach = "the whole video" if self.span_s is None else f"{self.span_s:g} s"
        return f"a clip of {self.frames} frames over {reach}"

    @classmethod
    def of(cls, data: DataConfig) -> ClipRule:
        """The rule that a data configuration asks for."""
        return cls(data.clip_frames, data.clip_span_s)

    @property
    def is_whole(self) -> bool:
        """Whether a clip covers its whole video."""
        return self.span_s is None and self.stride is None

    @property
    def draws_videos(self) -> bool:
        """True also for clips of whole videos, which can only start at one frame."""
        return super().draws_videos or self.is_whole

    def of_corpus(self, sampling: SamplingConfig) -> ClipRule:
        """This rule with the span, stride or `whole` of a corpus, where it has one."""
        rule = replace(super().of_corpus(sampling), start_every=sampling.start_every)
        if sampling.whole:
            return replace(rule, span_s=None, stride=None)
        if sampling.stride is not None:
            return replace(rule, span_s=None, stride=sampling.stride, field="sampling.stride")
        if sampling.span_s is not None:
            return replace(rule, span_s=sampling.span_s, field="sampling.span_s")
        return rule

    def _span(self, fps: np.ndarray) -> np.ndarray:
        """Frames from the first of a clip to its last, where it does not cover the whole video; int (N,)."""
        if self.stride is not None:
            return np.full(len(fps), (self.frames - 1) * self.stride)
        assert self.span_s is not None
        return np.maximum(1, np.rint(self.span_s * fps).astype(np.int64))

    def min_frames(self, fps: np.ndarray) -> np.ndarray:
        """Fewest frames that a video must have, int (N,); `fps`: (N,), of each video."""
        return np.full(len(fps), 2) if self.is_whole else self._span(fps) + 1

    def starts(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Number of frames that a clip can start at, int64 (N,); `num_frames`, `fps`: (N,), of each video."""
        if self.is_whole:
            return np.ones(len(num_frames), np.int64)
        return np.asarray((num_frames - self._span(fps) - 1) // self.start_every + 1, np.int64)

    def indices(self, num_frames: np.ndarray, fps: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Frame numbers of clips, int64 (N, T).

        Args:
            num_frames: int (N,), of each video.
            fps: (N,), of each video.
            draw: (N,), uniform in [0, 1); positions the span.
        """
        span = num_frames - 1 if self.is_whole else self._span(fps)
        start = np.floor(draw * self.starts(num_frames, fps)).astype(np.int64) * self.start_every
        steps = np.linspace(0.0, 1.0, self.frames)
        return np.asarray(start[:, None] + np.rint(steps[None, :] * span[:, None]).astype(np.int64))

    def at_times(self, times: np.ndarray, draw: float) -> np.ndarray:
        """Frame numbers of one clip, int (T,).

        Args:
            times: seconds of each frame of the video, from 0 on.
            draw: uniform in [0, 1); positions the span.
        """
        if self.stride is not None:
            count = np.array([len(times)])
            return np.asarray(self.indices(count, np.ones(1), np.array([draw]))[0])
        span = times[-1] if self.span_s is None else min(self.span_s, times[-1])
        if self.unit == FRAMES:
            possible = times[:: self.start_every]
            possible = possible[: max(1, int(np.searchsorted(possible, times[-1] - span + 1e-6)))]
            start = float(possible[int(draw * len(possible))])
        else:
            start = draw * (times[-1] - span)
        return _nearest(times, start + np.linspace(0.0, 1.0, self.frames) * span)


@dataclass(frozen=True)
class PairRule(_Drawing):
    """Two frames `interval_s` seconds apart, whatever the rate."""

    interval_s: float = 1.0
    field: str = "data.pair_interval_s"
    """Config key of `interval_s`, for messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_seconds(self.field, self.interval_s)

    def __str__(self) -> str:
        return f"a pair of frames {self.interval_s:g} s apart"

    @classmethod
    def of(cls, data: DataConfig) -> PairRule:
        """The rule that a data configuration asks for."""
        return cls(data.pair_interval_s)

    def of_corpus(self, sampling: SamplingConfig) -> PairRule:
        """This rule with the interval of a corpus, where it has one."""
        rule = super().of_corpus(sampling)
        if sampling.pair_interval_s is None:
            return rule
        return replace(rule, interval_s=sampling.pair_interval_s, field="sampling.pair_interval_s")

    def gap(self, fps: np.ndarray) -> np.ndarray:
        """Frames between the two, at least one, int (N,); `fps`: (N,), of each video."""
        return np.maximum(1, np.rint(self.interval_s * fps).astype(np.int64))

    def min_frames(self, fps: np.ndarray) -> np.ndarray:
        """Fewest frames that a video must have, int (N,); `fps`: (N,), of each video."""
        return self.gap(fps) + 1

    def starts(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Number of frames that a pair can start at, int64 (N,); `num_frames`, `fps`: (N,), of each video."""
        return np.asarray(num_frames - self.gap(fps), np.int64)

    def indices(self, num_frames: np.ndarray, fps: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Frame numbers of pairs, int64 (N, 2).

        Args:
            num_frames: int (N,), of each video.
            fps: (N,), of each video.
            draw: (N,), uniform in [0, 1); positions the pair.
        """
        start = np.floor(draw * self.starts(num_frames, fps)).astype(np.int64)
        return np.stack([start, start + self.gap(fps)], axis=1)

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
class ChunkRule(_Drawing):
    """Frame t of every camera and the actions t to t + chunk - 1; past the episode's end they are masked."""

    chunk: int
    field: str = "model chunk"
    """Name of `chunk` in the configuration, for messages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 1:
            raise ConfigError(f"{self.field} is {self.chunk}; at least 1 action is needed.")

    def __str__(self) -> str:
        return f"a chunk of {self.chunk} actions"

    def min_frames(self, fps: np.ndarray) -> np.ndarray:
        """Fewest frames that a video must have, int (N,); `fps`: (N,), of each video."""
        return np.ones(len(fps), np.int64)

    def starts(self, num_frames: np.ndarray, fps: np.ndarray) -> np.ndarray:
        """Number of frames t, int64 (N,): all that have an action; `num_frames`, `fps`: (N,), of each video."""
        return np.asarray(num_frames, np.int64)

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


def _check_seconds(key: str, value: float | None) -> None:
    if value is not None and not (0 < value < math.inf):
        raise ConfigError(f"{key} is {value}; a number of seconds above 0 is needed.")


Rule = ClipRule | PairRule | ChunkRule
