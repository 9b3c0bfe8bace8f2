"""Messages between a pool and its decoder processes: jobs, the progress and the result of a probe, and their way through a pipe."""

from __future__ import annotations

import os
import pickle
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from defi_platform.data.decode.frame_scores import FrameScores

if TYPE_CHECKING:
    from defi_platform.data.sources.records import Place, Refusal

HEADER = struct.Struct("<I")
"""Length of a message in bytes, written before it."""


Packed = bytes
"""Another name of the type, where a field is called `bytes`."""


@dataclass(frozen=True)
class DecodeJob:
    """Frames to take out of one file."""

    uri: str
    indices: tuple[int, ...]
    """Frame numbers within the file, in display order; may repeat."""
    height: int
    width: int
    source_height: int = 0
    source_width: int = 0
    """Displayed size, after rotation; 0 when not known."""
    seek_index: bytes | None = None
    """Packed `SeekIndex` of these frames' file; without one the file is decoded from its start."""
    version: str = ""
    """Of the file, as its listing gave it: frames of another one are refused. "": any."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the frames it yields: (T, H, W, 3)."""
        return (len(self.indices), self.height, self.width, 3)


@dataclass(frozen=True)
class ProbeJob:
    """A file to open once, and to check and describe."""

    uri: str
    score_frames: bool = False
    """Score the frames on the way."""


@dataclass(frozen=True)
class SignalsJob:
    """The actions and states of one episode, to be read and checked."""

    source: str
    """Name of the corpus's format."""
    uri: str
    episode_id: str


@dataclass(frozen=True)
class ListingJob:
    """The next page of a corpus's listing."""

    source: str
    """Name of the corpus's format."""
    root: str
    fps: float | None
    place: Place
    """That the listing has come to."""
    refusal: Refusal | None
    """Of the last file that it said to read next."""


@dataclass(frozen=True, slots=True)
class EpisodeSignals:
    """Actions and states of an episode that can be used: as many of both, of numbers that are finite."""

    actions: np.ndarray
    """(n, A) float32"""
    states: np.ndarray
    """(n, P) float32; P is 0 where the corpus has none."""


@dataclass(frozen=True, slots=True)
class ProbeProgress:
    """Says that a probe goes on; sent again and again."""

    declared_s: float
    """Length of the video as its container declares it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Size, rate, codec and length of a video that can be used."""

    num_frames: int
    fps: float
    width: int
    height: int
    """Displayed size, after rotation."""
    codec: str
    bytes: int
    decoder: str
    """pyav | store"""
    variable_rate: bool
    times: tuple[float, ...] = ()
    """Seconds of each frame from the first on; only where the rate is variable."""
    frame_scores: FrameScores | None = None
    """Where the job asked for them."""
    seek_index: Packed = b""
    """Packed `SeekIndex` of the whole file; empty for pictures that are stored one by one."""
    content: int = 0
    """Hash of all its pictures, which copies of it share; 0: nothing to tell it apart by."""


def read_message(fd: int) -> Any:
    """Reads one pickled message from a pipe; None at its end."""
    head = _read(fd, HEADER.size)
    if head is None:
        return None
    body = _read(fd, HEADER.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def write_message(fd: int, message: Any) -> None:
    """Writes one pickled message to a pipe."""
    body = pickle.dumps(message)
    view = memoryview(HEADER.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def _read(fd: int, count: int) -> bytes | None:
    parts = b""
    while len(parts) < count:
        part = os.read(fd, count - len(parts))
        if not part:
            return None
        parts += part
    return parts
