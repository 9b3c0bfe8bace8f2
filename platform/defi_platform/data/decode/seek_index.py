"""Seek index of a video file: places from which decoding was proven to give the right frames.

A frame is known by its number alone: the i-th picture that a decoder puts out when it decodes the file from its
start. A seek point says which number comes first after a seek, and how that picture is recognised.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

NO_PTS: Final = -(1 << 63)
"""Stands for a timestamp that the container does not give."""

BY: Final = ("dts", "pts", "pos")
"""What a seek goes to: decode or display time of the key packet in the stream's time base, or its byte."""

HEADER: Final = struct.Struct("<IIBBBI")
"""Height and width, orientation, kind of target, length of the container's name, number of points."""


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
    until: int
    """First later frame that decoding from here does not give; 0: it gives all. Only in damaged and odd files."""
    crc: int
    """`video_readers.luma_crc` of that frame."""


@dataclass(frozen=True, eq=False)
class SeekIndex:
    """Seek points of a file, with its container and the orientation of its pictures."""

    container: str
    """FFmpeg's name of the container; "": find out."""
    shape: tuple[int, int]
    """Height and width of the first frame as it is stored, in pixels; (0, 0): find out. Others are scaled to it."""
    orientation: int
    """See `video_readers.orientation`; counts where the shape is known."""
    by: str
    """One of `BY`."""
    points: np.ndarray
    """int64 (n, 6): `SeekPoint`s in order of their frames."""

    def before(self, frame: int) -> int:
        """Returns how many points lie at or before a frame."""
        return int(np.searchsorted(self.points[:, 0], frame, side="right"))

    def point(self, number: int) -> SeekPoint:
        """Returns one of the points."""
        return SeekPoint(*self.points[number].tolist())

    def part(self, first: int, count: int) -> SeekIndex:
        """The points for the frames `first` to `first + count - 1`: the last two before them, and those within."""
        points = self.points[max(0, self.before(first) - 2) : self.before(first + count - 1)]
        return replace(self, points=points)

    def to_bytes(self) -> bytes:
        """Packs the index: regular distances take next to nothing, each point's checksum four bytes."""
        columns = self.points.T.copy()
        columns[2] = np.where(columns[2] == NO_PTS, NO_PTS, columns[2] - columns[1])
        steps = np.diff(columns[:5], axis=1, prepend=0)  # wraps around at NO_PTS, as its inverse does
        name = self.container.encode()
        head = HEADER.pack(*self.shape, self.orientation, BY.index(self.by), len(name), len(self.points))
        checksums = columns[5].astype("<u4").tobytes()
        return b"".join([head, name, checksums, zlib.compress(steps.astype("<i8").tobytes(), 9)])

    @classmethod
    def from_bytes(cls, packed: bytes) -> SeekIndex:
        """The inverse of `to_bytes`."""
        height, width, orientation, by, length, count = HEADER.unpack_from(packed)
        at = HEADER.size + length
        container = packed[HEADER.size : at].decode()
        checksums = np.frombuffer(packed, "<u4", count, at)
        steps = np.frombuffer(zlib.decompress(packed[at + 4 * count :]), "<i8").reshape(5, count)
        columns = np.cumsum(steps, axis=1, dtype=np.int64)
        columns[2] = np.where(columns[2] == NO_PTS, NO_PTS, columns[2] + columns[1])
        points = np.concatenate([columns, checksums[None].astype(np.int64)]).T
        return cls(container, (height, width), orientation, BY[by], points)


UNINDEXED: Final = SeekIndex("", (0, 0), 0, "dts", np.empty((0, 6), np.int64))
"""Of a file that no probe has seen: it is decoded from its start."""


def table_of(points: list[SeekPoint]) -> np.ndarray:
    """Makes `SeekIndex.points`. Args: points: in any order; of several with one frame the first is taken."""
    ordered = {point.frame: point for point in reversed(points)}
    return np.array([ordered[frame] for frame in sorted(ordered)], np.int64).reshape(-1, 6)
