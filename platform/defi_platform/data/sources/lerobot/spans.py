"""Spans of a LeRobot v3.0 dataset's episodes in the files that they share, and what contradicts itself there.

One pass over `meta/episodes`, camera by camera, as columns of numbers: a million episodes take 14 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FILE_SHIFT = 32

OFF_GRID = 0.25
"""Frames by which a timestamp may miss the dataset's own rate before those of the whole file are not trusted."""


@dataclass(frozen=True)
class CameraSpans:
    """Facts of one camera's spans, an entry per row of `meta/episodes`."""

    before: np.ndarray
    """int32: frames of the episodes that come before it in its file, by their lengths."""
    in_file: np.ndarray
    """int32: frames of all episodes in its file; both are 0 where spans overlap."""
    counted: np.ndarray
    """bool: these are the numbers of frames, not only the least there can be."""
    overlaps: np.ndarray
    """int32: another row whose span it overlaps; -1: none."""
    steady: np.ndarray
    """bool: every timestamp of its file lies on the grid of the dataset's rate."""


def camera_spans(tables: Iterator[pa.Table], key: str, fps: float) -> CameraSpans:
    """Sets the spans of one camera in order, file by file.

    Args:
        tables: rows of `meta/episodes`.
        key: of the camera, such as "observation.images.front".
        fps: of the dataset.
    """
    names = [
        f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    ]
    columns = [[_numbers(table, name) for name in (*names, "length")] for table in tables]
    chunk, number, start, stop, length = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    stop = np.where(np.isnan(stop), start + length / fps, stop)
    known = np.isfinite(chunk) & np.isfinite(number) & np.isfinite(start) & np.isfinite(stop)
    known &= (length >= 0) & (length < 2**31) & (start >= -0.5 / fps) & (stop >= start)
    file = np.full(len(chunk), -1, np.int64)
    placed = np.isfinite(chunk) & np.isfinite(number)
    file[placed] = (chunk[placed].astype(np.int64) << FILE_SHIFT) + number[placed].astype(np.int64)
    numbers = (np.full(len(file), value, np.int32) for value in (0, 0, -1))
    before, in_file, overlaps = numbers
    spans = CameraSpans(before, in_file, np.zeros(len(file), bool), overlaps, np.zeros(len(file), bool))
    order = np.lexsort((stop, start, file))
    borders = np.flatnonzero(np.diff(file[order])) + 1
    for rows in np.split(order, borders):
        if len(rows) and file[rows[0]] >= 0:
            _one_file(spans, rows[known[rows]], len(rows), (start, stop, length), fps)
    return spans


def _one_file(
    spans: CameraSpans, rows: np.ndarray, count: int, columns: tuple[np.ndarray, ...], fps: float
) -> None:
    """Args: rows: usable ones of one file, by their start; count: of all its rows."""
    known = len(rows)
    # An empty episode covers nothing, wherever it is said to be.
    rows = rows[columns[2][rows] > 0]
    start, stop, length = (column[rows] for column in columns)
    if not len(rows):
        return
    grid = np.concatenate([start, stop]) * fps
    spans.steady[rows] = np.abs(grid - np.rint(grid)).max() <= OFF_GRID
    # A row whose span is not as long as it says itself is refused for that; those it reaches into are not.
    sound = np.abs((stop - start) * fps - length) <= 0.5
    _mark_overlaps(spans.overlaps, rows[sound], start[sound], stop[sound], 0.5 / fps)
    overlaps = spans.overlaps.copy()
    _mark_overlaps(overlaps, rows, start, stop, 0.5 / fps)
    spans.overlaps[rows[~sound]] = overlaps[rows[~sound]]
    # At least so many where a length is not to be believed.
    lengths = np.where(sound, length, np.minimum(length, np.floor((stop - start) * fps))).astype(np.int64)
    total = int(lengths.sum())
    if total < 2**31 and (spans.overlaps[rows] < 0).all():
        spans.before[rows] = np.cumsum(lengths) - lengths
        spans.in_file[rows] = total
        spans.counted[rows] = known == count and bool(sound.all())


def _mark_overlaps(
    overlaps: np.ndarray, rows: np.ndarray, start: np.ndarray, stop: np.ndarray, allowed: float
) -> None:
    """Sets `overlaps` of rows whose spans share more than `allowed` seconds. Args: rows: by their start."""
    if not len(rows):
        return
    # The latest end so far, and whose it is.
    latest = np.maximum.accumulate(stop)
    owner = np.maximum.accumulate(np.where(stop >= latest, np.arange(len(rows)), 0))
    into = np.flatnonzero(start[1:] < latest[:-1] - allowed) + 1
    overlaps[rows[into]] = rows[owner[into - 1]]
    overlaps[rows[owner[into - 1]]] = rows[into]


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float64; NaN where it is absent, null or no number."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    column = table.column(name)
    try:
        values = pc.fill_null(column.cast(pa.float64(), safe=False), float("nan"))
        return np.asarray(values.combine_chunks().to_numpy(zero_copy_only=False), np.float64).reshape(-1)
    except (pa.ArrowException, ValueError):
        return np.full(table.num_rows, np.nan)
