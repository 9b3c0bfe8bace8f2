"""One stream of a plan: the videos of a corpus, or of one camera of it, in an order that is drawn anew every epoch.

Every frame, second or video of it is one sample of an epoch, see `SamplingConfig.unit`. N samples, V cameras, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defi_platform.data.sampling.samplers import FRAMES, SECONDS, ChunkRule, Rule
from defi_platform.data.sampling.shuffle import permuted
from defi_platform.data.tables.mmap_table import MappedTable

GROUP = 16
"""Videos of which only the summed length is kept in memory; those of single ones are read from the manifest."""

BLOCK_ROWS = 1 << 17
"""Rows that are looked at at once, since temporaries of all rows would outweigh the plan; a multiple of GROUP."""

_EPOCH = np.uint64(0xD1342543DE82EF95)


@dataclass(frozen=True)
class Located:
    """The places of samples of a stream."""

    rows: np.ndarray
    """int32 (N, V), of the manifest"""
    indices: np.ndarray
    """int64 (N, T), frame numbers at a steady rate"""
    num_frames: np.ndarray
    """int (N,), frames of each video that samples are cut out of"""
    draw: np.ndarray
    """float64 (N,), uniform in [0, 1): what positions the sample in its video"""


class Stream:
    """Videos of one corpus, or of one camera of it, that are drawn from alike.

    Args:
        corpus: its name.
        weight: share of the mixture, relative to the other streams.
        rule: how a sample is cut out of a video.
        key: of the order.
        rows: int32 (videos, V), numbered within the corpus.
        first_row: number of the corpus's first row in the manifest.
        videos: the corpus's rows.
    """

    def __init__(
        self,
        corpus: str,
        weight: float,
        rule: Rule,
        key: int,
        rows: np.ndarray,
        first_row: int,
        videos: MappedTable,
    ) -> None:
        self.corpus, self.weight, self.rule = corpus, weight, rule
        self.rows = rows + np.int32(first_row)
        self._key, self._first_row = np.uint64(key), first_row
        self._num_frames, self._fps = videos.numbers("num_frames"), videos.numbers("fps")
        self._num_actions = videos.numbers("num_actions")
        self._ends: np.ndarray | None = None
        """float64 (groups,): cumulated lengths; None where each video is one sample."""
        self.size, self._scale = len(rows), 1.0
        """Samples per epoch, and the length of one."""
        if len(rows) and not rule.draws_videos:
            self._ends = np.cumsum(np.concatenate([self._sums(n) for n in range(0, len(rows), BLOCK_ROWS)]))
            total = float(self._ends[-1])
            self.size = max(1, round(total))
            self._scale = total / self.size

    def locate(self, drawn: np.ndarray, attempts: np.ndarray, jitter: np.ndarray) -> Located:
        """Finds samples of the stream.

        Args:
            drawn: int64 (N,), how many samples of the stream come before.
            attempts: int64 (N,), 0, or the number of the stand-in: of another video each.
            jitter: (N,), uniform in [0, 1).
        """
        video, draw = np.empty(len(drawn), np.int64), jitter.copy()
        by_video = np.full(len(drawn), self._ends is None) | (attempts > 0)
        video[by_video] = self._shuffled((drawn + attempts)[by_video], len(self.rows))
        if not by_video.all():
            by_length = ~by_video
            sample = self._shuffled(drawn[by_length], self.size)
            # Frames are drawn themselves; seconds at some moment of theirs.
            offset = 0.5 if self.rule.unit == FRAMES else jitter[by_length]
            video[by_length], draw[by_length] = self._at((sample + offset) * self._scale)
        rows = self.rows[video]
        num_frames = self._usable_frames(rows)
        fps = self._fps[rows[:, 0] - self._first_row]
        return Located(rows, self.rule.indices(num_frames, fps, draw), num_frames, draw)

    def _shuffled(self, positions: np.ndarray, size: int) -> np.ndarray:
        """Another order of range(size) for every round through it; int64 (N,)."""
        epoch, position = np.divmod(positions, size)
        with np.errstate(over="ignore"):
            keys = self._key + epoch.astype(np.uint64) * _EPOCH
        return permuted(position, size, keys)

    def _at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (video, draw within it) of places in all videos laid end to end."""
        assert self._ends is not None
        group = np.minimum(np.searchsorted(self._ends, places, side="right"), len(self._ends) - 1)
        start = np.where(group > 0, self._ends[group - 1], 0.0)
        members = group[:, None] * GROUP + np.arange(GROUP)
        last = len(self.rows) - 1
        lengths = np.where(members <= last, self._lengths(self.rows[np.minimum(members, last)]), 0.0)
        ends = start[:, None] + np.cumsum(lengths, axis=1)
        inside = (ends <= places[:, None]).sum(axis=1)
        inside = np.minimum(inside, np.minimum(GROUP, len(self.rows) - group * GROUP) - 1)
        each = np.arange(len(places))
        length = lengths[each, inside]
        draw = (places - ends[each, inside]) / length + 1.0
        return members[each, inside], np.clip(draw, 0.0, np.nextafter(1.0, 0.0))

    def _sums(self, first: int) -> np.ndarray:
        """Length of each group of a block of videos."""
        lengths = self._lengths(self.rows[first : first + BLOCK_ROWS])
        return np.add.reduceat(lengths, np.arange(0, len(lengths), GROUP))

    def _lengths(self, rows: np.ndarray) -> np.ndarray:
        """Frames that samples can start at, or the seconds they last, of each video; float64 (...) for rows (..., V)."""
        first = rows[..., 0] - self._first_row
        fps = self._fps[first]
        starts = self.rule.starts(self._usable_frames(rows).ravel(), fps.ravel()).reshape(first.shape)
        if self.rule.unit == SECONDS:
            return np.asarray(starts / np.where(fps > 0, fps, 1.0), np.float64)
        return starts.astype(np.float64)

    def _usable_frames(self, rows: np.ndarray) -> np.ndarray:
        """Frames of each video; for chunks those that all cameras have, and an action; int (...) for rows (..., V)."""
        rows = rows - self._first_row
        if not isinstance(self.rule, ChunkRule):
            return np.asarray(self._num_frames[rows[..., 0]])
        return np.asarray(np.minimum(self._num_frames[rows], self._num_actions[rows]).min(axis=-1))
