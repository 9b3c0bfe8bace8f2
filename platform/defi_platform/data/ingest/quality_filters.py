"""Filters that reject videos or windows by scores of their frames; every threshold is configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defi_platform.config import FilterConfig
from defi_platform.data.decode.frame_scores import FrameScores
from defi_platform.data.rejection import BadVideo

SIGNATURE_POSITIONS = (0.25, 0.5, 0.75)
"""Shares of a video after which the pictures are taken by which it is compared with others."""


@dataclass(frozen=True)
class Scores:
    """Scores of one video or window."""

    luma: float
    """Mean grey level, 0 to 255."""
    motion: float | None
    """Mean change of grey level from one half second to the next; None for a single sample."""
    sharpness: float
    """Mean variance of the Laplacian."""
    signature: tuple[int, ...]
    """Hashes of three pictures, 64 bits each."""


def needs_scores(config: FilterConfig) -> bool:
    """Returns whether frames have to be scored for these filters."""
    values = (config.static, config.black, config.blurred, config.duplicate_bits)
    return config.scores or any(value is not None for value in values)


def scores_of(screening: FrameScores, first: int, stop: int) -> Scores:
    """Averages the scores of the frames `first` to `stop` - 1.

    Args:
        screening: of the whole file.
        first: number of a frame in the file.
        stop: the one after the last.
    """
    low, high = np.searchsorted(screening.sampled, [first, stop])
    if low == high:  # a window between two samples is like the one before it
        low, high = max(0, low - 1), max(1, low)
    inside = slice(int(low), int(high))
    # The first sample's motion is against one before the window.
    motion = screening.motion[inside][1:]
    positions = [low + int((high - low) * share) for share in SIGNATURE_POSITIONS]
    return Scores(
        luma=float(screening.luma[inside].mean()),
        motion=float(motion.mean()) if len(motion) else None,
        sharpness=float(screening.sharpness[inside].mean()),
        signature=tuple(int(screening.hashes[position]) for position in positions),
    )


def rejected_by_filters(config: FilterConfig, scores: Scores | None, seconds: float) -> BadVideo | None:
    """Holds a video or window against the thresholds; duplicates are found where the whole corpus is known.

    Args:
        config: the thresholds.
        scores: None where nobody asked for them.
        seconds: its length.

    Returns: why it is rejected, or None.
    """
    if config.too_short_s is not None and seconds < config.too_short_s:
        return BadVideo("too_short", f"{seconds:.2f} s, filters.too_short_s={config.too_short_s:g}")
    if scores is None:
        return None
    for reason, name, score, least in (
        ("black", "mean grey level", scores.luma, config.black),
        ("static", "mean change of grey level", scores.motion, config.static),
        ("blurred", "variance of the Laplacian", scores.sharpness, config.blurred),
    ):
        if least is not None and score is not None and score < least:
            return BadVideo(reason, f"{name} {score:.2f}, filters.{reason}={least:g}")
    return None
