"""Seek index of a video file: places from which decoding was proven to give the right frames.

A frame is known by its number alone: the i-th picture that a decoder puts out when it decodes the file from its
start. A seek point says which number comes first after a seek, and how that picture is recognised.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

NO_PTS: Final = -(1 << 63)
"""Stands for a timestamp that the container does not give."""

BY: Final = ("dts", "pts", "pos")
"""What a seek goes to: decode or display time of the key packet in the stream's time base, or its byte."""

HEADER: Final = struct.Struct("<BBBH")
"""Orientation, kind of target, length of the container's name, number of points."""


class SeekPoint(NamedTuple):
    """One place to start decoding from."""

    frame: int
    """Number of the first right frame after the seek."""
    target: int
    """Where to seek to, as `SeekIndex.by` says."""
    pts: int
    """Of that frame, or `NO_PTS`."""
    drop: int
    """Pictures that the decoder puts out before it."""
    crc: int
    """`video_readers.luma_crc` of that frame."""


@dataclass(frozen=True, eq=False)
class SeekIndex:
    """Seek points of a file, with its container and the orientation of its pictures."""

    container: str
    """FFmpeg's name of the container; "": find out."""
    orientation: int
    """See `video_readers.orientation`; -1: that of the first frame."""
    by: str
    """One of `BY`."""
    points: np.ndarray
    """int64 (n, 5): `SeekPoint`s in order of their frames."""

    def before(self, frame: int) -> int:
        """Returns how many points lie at or before a frame."""
        return int(np.searchsorted(self.points[:, 0], frame, side="right"))

    def point(self, number: int) -> SeekPoint:
        """Returns one of the points."""
        return SeekPoint(*self.points[number].tolist())

    def part(self, first: int, count: int) -> SeekIndex:
        """The points for the frames `first` to `first + count - 1`: the last one before them, and those within."""
        points = self.points[max(0, self.before(first) - 1) : self.before(first + count - 1)]
        return SeekIndex(self.container, self.orientation, self.by, points)

    def to_bytes(self) -> bytes:
        """Packs the index: regular distances take next to nothing, each point's checksum four bytes."""
        columns = self.points.T.copy()
        columns[2] = np.where(columns[2] == NO_PTS, NO_PTS, columns[2] - columns[1])
        steps = np.diff(columns[:4], axis=1, prepend=0)  # wraps around at NO_PTS, as its inverse does
        name = self.container.encode()
        head = HEADER.pack(self.orientation + 1, BY.index(self.by), len(name), len(self.points))
        checksums = columns[4].astype("<u4").tobytes()
        return b"".join([head, name, checksums, zlib.compress(steps.astype("<i8").tobytes(), 9)])

    @classmethod
    def from_bytes(cls, packed: bytes) -> SeekIndex:
        """The inverse of `to_bytes`."""
        orientation, by, length, count = HEADER.unpack_from(packed)
        at = HEADER.size + length
        container = packed[HEADER.size : at].decode()
        checksums = np.frombuffer(packed, "<u4", count, at)
        steps = np.frombuffer(zlib.decompress(packed[at + 4 * count :]), "<i8").reshape(4, count)
        columns = np.cumsum(steps, axis=1, dtype=np.int64)
        columns[2] = np.where(columns[2] == NO_PTS, NO_PTS, columns[2] + columns[1])
        points = np.concatenate([columns, checksums[None].astype(np.int64)]).T
        return cls(container, orientation - 1, BY[by], points)


UNINDEXED: Final = SeekIndex("", -1, "dts", np.empty((0, 5), np.int64))
"""Of a file that no probe has seen: it is decoded from its start."""


def index_of(points: list[SeekPoint], container: str, orientation: int, by: str) -> SeekIndex:
    """Makes an index.

    Args:
        points: in any order; of several with one frame the first is taken.
        container: FFmpeg's name of it.
        orientation: of the pictures.
        by: what the points' targets are.
    """
    ordered = {point.frame: point for point in reversed(points)}
    table = np.array([ordered[frame] for frame in sorted(ordered)], np.int64).reshape(-1, 5)
    return SeekIndex(container, orientation, by, table)
