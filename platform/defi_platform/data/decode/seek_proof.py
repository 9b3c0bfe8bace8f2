"""Proof of seek points: what a decoder gives after a seek, compared with what sequential decoding gave.

Every kind of container has its traps: a seek that lands one key frame late, pictures before an open key frame that
cannot be decoded, a refresh that takes many pictures, times that only the reading from the start gives right. So no
rule about a kind is relied on: seeks are tried on the file itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from defi_platform.data.decode.seek_index import BY, NO_PTS, SeekIndex, SeekPoint, table_of
from defi_platform.data.decode.video_readers import (
    decoded,
    luma_crc,
    open_container,
    orientation,
    picture_crc,
    seek,
)

RUN = 3
"""Pictures in a row that have to be right after a seek."""

LONG_RUN = 256
"""In some trials: all up to the next key frame or the end of the file, so many at most. A picture may refer to one before
the key frame, and a decoder gives up its last pictures one by one."""

FIRST_TRIED = 5
"""Of the first trials only the one at the end is long; after them every other one."""

MOST_ALIKE = 64
"""Frames that look like the one after a seek, beyond which none is chosen by its looks."""

MOST_DROPPED = 12
"""Wrong pictures that a decoder may put out after a seek before it is given up."""

SPACING = 4
"""Frames between two points at least: decoding so few costs no more than a seek."""

BY_DISPLAY_TIME = ("mov", "matroska")
"""Containers in which display times are tried first."""

LEAST_TRIED, TRIED_SHARE = 24, 0.2
"""Frames that trials may decode: so many, or this share of the file."""


@dataclass(frozen=True)
class Key:
    """A packet that the container calls a key frame."""

    dts: int | None
    pts: int | None
    pos: int | None
    number: int
    """Packets before it."""


@dataclass
class Truth:
    """Frames of a file as sequential decoding gave them."""

    pts: list[int | None] = field(default_factory=list)
    crcs: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    """Numbers of the frames that are key frames."""
    shape: tuple[int, int] = (0, 0)
    """Height and width of the first frame as it is stored."""
    orientation: int = 0
    """Of the first frame."""
    doubtful: bool = False
    """Whether the decoder made up a part of any frame, or frames are not as many and in the order that was meant."""

    def add(self, frame: Any) -> None:
        """Takes the next frame."""
        if not self.pts:
            self.shape, self.orientation = (frame.height, frame.width), orientation(frame)
        if frame.key_frame:
            self.keys.append(len(self.pts))
        self.doubtful = self.doubtful or frame.is_corrupt
        self.pts.append(frame.pts)
        self.crcs.append(luma_crc(frame))

    def __len__(self) -> int:
        return len(self.pts)


@dataclass(frozen=True)
class _Landing:
    point: SeekPoint
    shift: int | None
    """Frames from the one that the key packet seems to hold to the first right one; None: not known which."""
    timed: bool
    """Whether the frames had the same times as in sequential decoding."""


def prove(
    path: str, truth: Truth, keys: Sequence[Key], container: str, goes_on: Callable[[], None]
) -> SeekIndex:
    """Builds the seek index of a file.

    Args:
        path: of the file.
        truth: of it.
        keys: in decoding order.
        container: FFmpeg's name of its kind.
        goes_on: is called with every trial.
    """
    prover = _Prover(path, truth, keys, container, goes_on)
    # In these a seek to the decode time of a key frame ends one key frame early.
    kinds = sorted(BY, key=lambda by: (by == "pos", (by == "pts") != (container in BY_DISPLAY_TIME)))
    best: tuple[str, list[SeekPoint]] = (kinds[0], [])
    for by in kinds:
        points, complete = prover.points(by)
        if len(points) > len(best[1]):
            best = by, points
        if complete:
            break
    index = SeekIndex(container, truth.shape, truth.orientation, best[0], table_of(best[1]))
    return prover.with_limits(index) if truth.doubtful else index


class _Prover:
    def __init__(
        self, path: str, truth: Truth, keys: Sequence[Key], container: str, goes_on: Callable[[], None]
    ) -> None:
        self._goes_on = goes_on
        self._path, self._container, self._truth = path, container, truth
        self._at: dict[int, int] = {}
        """Display time -> number of the one frame that has it."""
        for number, pts in enumerate(truth.pts):
            if pts is not None:
                self._at[pts] = -1 if pts in self._at else number
        self._alike: dict[int, list[int]] = {}
        for number, crc in enumerate(truth.crcs):
            self._alike.setdefault(crc, []).append(number)
        self._holds = self._frames_of(keys)
        self._keys = list(self._spaced(keys))
        self._leads = {by for by in BY if by == "pos" or _ascending(keys, by)}
        """Kinds of targets of which each means one place."""
        ends = [self._holds.get(key, -1) for key in self._keys[1:]] + [len(truth)]
        self._length = {
            key: end - self._holds[key]
            for key, end in zip(self._keys, ends, strict=False)
            if key in self._holds and end >= 0
        }
        """Frames from a key frame to the next."""
        self._spent = self._tried = 0

    def _frames_of(self, keys: Sequence[Key]) -> dict[Key, int]:
        """The frame that each key packet holds, as far as it can be said without decoding it."""
        by_time = {key: self._at.get(key.pts, -1) for key in keys if key.pts is not None}
        found = {key: frame for key, frame in by_time.items() if frame >= 0}
        if len(keys) == len(self._truth.keys) and len(found) < len(keys):
            return dict(zip(keys, self._truth.keys, strict=True))
        return found

    def _spaced(self, keys: Sequence[Key]) -> Iterator[Key]:
        last = -SPACING
        for key in keys:
            frame = self._holds.get(key, key.number)
            if frame >= last + SPACING:
                last = frame
                yield key

    def points(self, by: str) -> tuple[list[SeekPoint], bool]:
        """Points for one kind of target, and whether they are all that there could be."""
        keys = [key for key in self._keys if getattr(key, by) is not None]
        if not keys or by not in self._leads:
            return [], False
        container, stream = open_container(self._path, self._container)
        with container:
            order = _order(keys)
            budget = max(LEAST_TRIED, int(TRIED_SHARE * len(self._truth)))
            landings = list(self._trials(container, stream, by, order, budget))
            proven = [landing for _, landing in landings if landing is not None]
            rule = {(landing.shift, landing.point.drop, landing.timed) for landing in proven}
            if len(proven) == len(landings) and len(rule) == 1 and None not in next(iter(rule)):
                shift, drop, timed = rule.pop()
                assert shift is not None
                return list(self._ruled(keys, by, shift, drop, timed)), shift >= 0
            # No rule: only what is tried counts, and more is tried.
            rest = order[len(landings) :]
            proven += [
                landing
                for _, landing in self._trials(container, stream, by, rest, len(self._truth))
                if landing is not None
            ]
        points = [landing.point for landing in proven]
        own = sum(landing.shift is not None and landing.shift >= 0 for landing in proven)
        return points, own >= 0.9 * len(keys)

    def with_limits(self, index: SeekIndex) -> SeekIndex:
        """The index of a damaged or otherwise odd file: how far each point leads.

        What a decoder makes up depends on what it decoded before, and parts that come twice look alike, so every point is tried to the end of the stretch
        after its own.
        """
        pictures = self._pictures()
        points = [index.point(number) for number in range(len(index.points))]
        ends = [point.frame for point in points[2:]] + [len(self._truth)] * 2
        container, stream = open_container(self._path, self._container)
        with container:
            limited = [
                point._replace(until=self._until(container, stream, index.by, point, pictures[:end]))
                for point, end in zip(points, ends, strict=False)
            ]
        kept = [point for point in limited if point.until > point.frame]
        return replace(index, points=table_of(kept))

    def _pictures(self) -> list[int]:
        """Checksums of all that sequential decoding gives: a part that a decoder makes up may be small."""
        container, stream = open_container(self._path, self._container)
        found = []
        with container:
            for frame in decoded(container, stream):
                self._goes_on()
                found.append(picture_crc(frame))
        return found

    def _until(self, container: Any, stream: Any, by: str, point: SeekPoint, pictures: Sequence[int]) -> int:
        import av

        self._goes_on()
        frames = seek(container, stream, by, point.target, [])
        number = point.frame - point.drop
        try:
            for number in range(point.frame - point.drop, len(pictures)):
                frame = next(frames, None)
                if frame is None or (number >= point.frame and picture_crc(frame) != pictures[number]):
                    return number
        except av.FFmpegError:
            return number
        return len(pictures)

    def _ruled(self, keys: Sequence[Key], by: str, shift: int, drop: int, timed: bool) -> Iterator[SeekPoint]:
        for key in keys:
            frame = self._holds.get(key, -1) + shift
            if key in self._holds and 0 <= frame < len(self._truth):
                pts = self._truth.pts[frame] if timed else None
                time = NO_PTS if pts is None else pts
                yield SeekPoint(frame, getattr(key, by), time, drop, 0, self._truth.crcs[frame])

    def _trials(
        self, container: Any, stream: Any, by: str, keys: Sequence[Key], budget: int
    ) -> Iterator[tuple[Key, _Landing | None]]:
        """Tries keys until so many frames are decoded."""
        self._spent = self._tried = 0
        for key in keys:
            if self._spent >= budget:
                return
            self._goes_on()
            yield key, self._trial(container, stream, by, key)

    def _trial(self, container: Any, stream: Any, by: str, key: Key) -> _Landing | None:
        import av

        pts: list[int | None] = []
        crcs: list[int] = []
        landing: list[Any] = []
        frames = seek(container, stream, by, getattr(key, by), landing)
        ended = False
        self._tried += 1
        long = self._tried == 1 or (self._tried > FIRST_TRIED and self._tried % 2)
        wanted = max(RUN, min(self._length.get(key, 0) + 1, LONG_RUN) if long else 0)
        try:
            for drop in range(MOST_DROPPED + 1):
                while len(crcs) < drop + wanted and not ended:
                    frame = next(frames, None)
                    if frame is None:
                        ended = True
                    else:
                        self._spent += 1
                        pts.append(frame.pts)
                        crcs.append(luma_crc(frame))
                if len(crcs) <= drop:
                    return None
                met = (
                    bool(landing)
                    and landing[0].pos == key.pos
                    and getattr(landing[0], by) == getattr(key, by)
                )
                found = self._located(key if met else None, pts[drop:], crcs[drop:], ended)
                if found is not None:
                    first, timed = found
                    held = self._holds.get(key)
                    time = pts[drop] if timed else None
                    time = NO_PTS if time is None else time
                    point = SeekPoint(first, getattr(key, by), time, drop, 0, crcs[drop])
                    return _Landing(point, None if held is None else first - held, timed)
        except av.FFmpegError:
            return None
        return None

    def _located(
        self, key: Key | None, pts: Sequence[int | None], crcs: Sequence[int], ended: bool
    ) -> tuple[int, bool] | None:
        """(number of the frame that a run of pictures begins with, whether its time is right too).

        Args:
            key: that the seek led to, for certain; None: elsewhere.
            pts: times of the pictures.
            crcs: of the pictures.
            ended: whether they are the last.
        """
        at = -1 if pts[0] is None else self._at.get(pts[0], -1)
        if at >= 0 and self._follows(at, crcs, ended):
            return at, True
        alike = self._alike.get(crcs[0], [])
        numbers = [n for n in alike if self._follows(n, crcs, ended)] if len(alike) <= MOST_ALIKE else []
        if len(numbers) != 1:
            # Still pictures look alike: the key frame itself is meant, if it is among them.
            held = -1 if key is None else self._holds.get(key, -1)
            numbers = [held] if held >= 0 and self._follows(held, crcs, ended) else []
        return (numbers[0], False) if numbers else None

    def _follows(self, number: int, crcs: Sequence[int], ended: bool) -> bool:
        truth = self._truth.crcs
        if ended and number + len(crcs) != len(truth):
            return False
        return list(crcs) == truth[number : number + len(crcs)]


def _ascending(keys: Sequence[Key], by: str) -> bool:
    """Whether no time comes twice: which of two places a seek leads to depends on what was read before it."""
    times = [time for key in keys if (time := getattr(key, by)) is not None]
    return all(time < later for time, later in pairwise(times))


def _order(keys: Sequence[Key]) -> list[Key]:
    """The order of trials: last, first, second, then at random, the same each time."""
    rest = list(keys[2:-1])
    random.Random(len(keys)).shuffle(rest)
    return list(dict.fromkeys([keys[-1], *keys[:2], *rest]))
