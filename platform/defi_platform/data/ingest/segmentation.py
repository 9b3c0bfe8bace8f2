"""Cutting long videos into windows: by shots, or at a fixed stride."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from defi_platform.config import WindowConfig
from defi_platform.data.decode.frame_scores import CHANGE_UNIT

NEIGHBOURS = 2
"""Frames before and after a cut that it has to stand out from."""

STANDS_OUT = 3.0
"""A cut changes the picture so many times as much as its neighbours do: fast motion changes all of them."""

Span = tuple[int, int]
"""First frame, and the one after the last."""


def spans(config: WindowConfig, times: np.ndarray, changes: bytes) -> list[Span]:
    """Cuts a video into windows, in order; too short ones are among them.

    Args:
        config: the mode and its lengths.
        times: (T,) seconds of each frame, ascending.
        changes: (T,) as in `FrameScores.changes`; only looked at for shots.
    """
    if config.mode == "stride":
        return list(_strides(times, config.length_s, config.stride_s or config.length_s))
    if config.mode == "shots":
        borders = [0, *cuts(changes, config.shot_threshold), len(times)]
        return [part for shot in pairwise(borders) for part in _parts(times, shot, config.length_s)]
    return [(0, len(times))]


def cuts(changes: bytes, threshold: float) -> list[int]:
    """Finds frames that begin a new shot; hard cuts only, since a fade changes no frame by much.

    Args:
        changes: (T,) as in `FrameScores.changes`.
        threshold: grey levels by which the picture changes at least.
    """
    values = np.frombuffer(changes, np.uint8).astype(np.float32) * CHANGE_UNIT
    found: list[int] = []
    for frame in np.flatnonzero(values >= threshold).tolist():
        around = np.concatenate(
            [values[max(1, frame - NEIGHBOURS) : frame], values[frame + 1 : frame + 1 + NEIGHBOURS]]
        )
        usual = float(around.mean()) if len(around) else 0.0
        if values[frame] >= STANDS_OUT * usual:
            found.append(frame)
    return found


def _strides(times: np.ndarray, length_s: float, stride_s: float) -> Iterator[Span]:
    start = 0
    while start < len(times):
        stop = _frame_at(times, times[start] + length_s)
        yield start, stop
        if stop == len(times):
            return
        start = max(start + 1, _frame_at(times, times[start] + stride_s))


def _parts(times: np.ndarray, shot: Sequence[int], longest_s: float) -> Iterator[Span]:
    """A shot in as few equal parts as keep each below `longest_s`; longer pauses end a part."""
    first, stop = shot
    # Without pauses there are no more parts than frames, whatever times a file has.
    pauses = np.flatnonzero(np.diff(times[first:stop]) > longest_s) + first + 1
    for part in pairwise([first, *pauses.tolist(), stop]):
        borders = np.linspace(*part, max(1, int(np.ceil(seconds_of(times, part) / longest_s - 1e-6))) + 1)
        for start, end in pairwise(borders):
            yield round(start), round(end)


def seconds_of(times: np.ndarray, span: Span) -> float:
    """Length of a window; its last frame counts for as long as the one before."""
    first, stop = span
    if stop - first < 2:
        return 0.0
    return float((times[stop - 1] - times[first]) * (stop - first) / (stop - first - 1))


def _frame_at(times: np.ndarray, second: float) -> int:
    # The margin keeps rates such as 29.97 from losing a frame to rounding.
    return int(np.searchsorted(times, second - 1e-3))
