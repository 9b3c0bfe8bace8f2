"""The frames of a video within its file: what the source says of them, held against the frames that the file has.

Timestamps of a source may drift, miss pauses, or be those of another file. So both are asked, the count of frames that
come before and the times of the frames themselves; where they contradict each other, nothing is guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from defi_platform.data.decode.messages import Probe
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.records import VideoRecord

CLOSE = 0.25
"""Frames by which a timestamp may miss the frame that it means."""

OTHER_RATE = 0.05
"""Share by which the rate of a file may differ from the declared one."""


@dataclass(frozen=True)
class Placed:
    """Frames `first` to `first + count - 1` of a file, at `fps` where the source or the file says so."""

    first: int
    count: int
    fps: float | None


def place(record: VideoRecord, probe: Probe) -> Placed | BadVideo:
    """Finds the frames of a video in its file.

    Args:
        record: the video as its source lists it.
        probe: of its file.

    Returns: the frames, or why they cannot be known.
    """
    count = probe.num_frames - record.first_frame if record.num_frames is None else record.num_frames
    if record.num_frames is not None and count < 2:
        return BadVideo("too_short", f"{count} frame")
    fps, problem = _rate(record, probe)
    if problem is not None:
        return problem
    # Without timestamps, steps belong to frames by their number alone.
    by_number = record.declared_fps is not None and record.from_s is None
    if by_number and probe.variable_rate and count != probe.num_frames:
        return BadVideo(
            "bad_source", f"its length is {count} frames, its file has {probe.num_frames} at an uneven rate"
        )
    first: int | BadVideo = record.first_frame
    if record.from_s is not None and record.to_s is not None:
        first = _by_times(record, probe, record.from_s, record.to_s)
    if isinstance(first, BadVideo):
        return first
    if record.num_frames is not None and first + count > probe.num_frames:
        return BadVideo(
            "short",
            f"the source puts frames {first} to {first + count - 1} into a file of {probe.num_frames}",
        )
    if record.min_frames is not None and probe.num_frames < record.min_frames:
        return BadVideo(
            "short", f"the annotation has {record.min_frames} entries, the file {probe.num_frames} frames"
        )
    return Placed(first, count, fps)


def _rate(record: VideoRecord, probe: Probe) -> tuple[float | None, BadVideo | None]:
    """The rate of a video: the source's, unless the file and the video's own span agree on another one."""
    declared, usual = record.declared_fps, 1 / _step(probe) if _step(probe) > 0 else 0.0
    if declared is None or _agree(declared, usual) or _agree(declared, probe.fps):
        return record.fps, None
    by_span = 0.0
    if record.from_s is not None and record.to_s is not None and record.to_s > record.from_s:
        by_span = (record.num_frames or 0) / (record.to_s - record.from_s)
    if _agree(by_span, usual):
        return usual, None
    return None, BadVideo(
        "bad_source", f"the source says {declared:g} frames per second, the file has {usual:.4g}"
    )


def _agree(one: float, other: float) -> bool:
    return one > 0 and abs(other / one - 1) <= OTHER_RATE


def _by_times(record: VideoRecord, probe: Probe, start: float, stop: float) -> int | BadVideo:
    """First frame of a video that its source places by timestamps."""
    count, step = record.num_frames or 0, _step(probe)
    if step <= 0:
        return BadVideo(
            "bad_source", "its source has timestamps, but the frames of its file come at no times"
        )
    first, end, off = _between(probe, start, stop, step)
    filled = bool(record.counted) and record.frames_in_file == probe.num_frames
    ends_at = _time_of(probe, probe.num_frames - 1) + step
    if not filled and stop > ends_at + step / 2:
        return BadVideo(
            "short",
            f"the source puts frames {record.first_frame} to {record.first_frame + count - 1} into a file of "
            f"{probe.num_frames}, and seconds {start:.6g} to {stop:.6g} into its {ends_at:.6g}",
        )
    # Timestamps may be those of a clock that did not pause, or of the file's own.
    if end - first != count and abs((stop - start) / step - count) > 0.5:
        return BadVideo(
            "bad_source",
            f"its length is {count} frames, but the file has {end - first} from second {start:.6g} to {stop:.6g}",
        )
    if filled:
        return record.frames_before
    # The frames of the videos before and after it must have room.
    room = 0 <= first - record.frames_before <= max(0, probe.num_frames - record.frames_in_file)
    trusted = (probe.variable_rate or bool(record.steady)) and room
    if trusted and off <= CLOSE * step and end - first == count:
        return first
    others = f"{record.frames_before} of {record.frames_in_file} come before it by the source"
    return BadVideo(
        "bad_source",
        f"its first frame is not certain: second {start:.6g} is {off:.4g} s from the nearest frame, number {first} "
        f"of {probe.num_frames}; " + (others if record.frames_in_file else "spans of its file overlap"),
    )


def _between(probe: Probe, start: float, stop: float, step: float) -> tuple[int, int, float]:
    """(frame closest to second `start`, frame after the last before `stop`, seconds between `start` and the first)."""
    if probe.times:
        times, _ = _frame_times(probe.times)
        after = int(np.clip(np.searchsorted(times, start), 0, len(times) - 1))
        before = max(0, after - 1)
        first = before if start - times[before] < times[after] - start else after
        return first, int(np.searchsorted(times, stop - step / 2)), float(abs(times[first] - start))
    first = min(max(0, round(start / step)), probe.num_frames - 1)
    return first, min(round(stop / step), probe.num_frames), abs(first * step - start)


def _time_of(probe: Probe, frame: int) -> float:
    return probe.times[frame] if probe.times else frame * _step(probe)


def _step(probe: Probe) -> float:
    """Seconds from a frame to the next, usually; 0 where the file has no rate."""
    if probe.times:
        return _frame_times(probe.times)[1]
    return 1 / probe.fps if probe.fps > 0 else 0.0


_last: list[tuple[tuple[float, ...], np.ndarray, float]] = []


def _frame_times(times: tuple[float, ...]) -> tuple[np.ndarray, float]:
    """(times of the frames, usual step); those of the last file are kept, since hundreds of episodes may share one."""
    if not _last or _last[0][0] is not times:
        seconds = np.asarray(times, np.float64)
        steps = np.diff(seconds)
        _last[:] = [(times, seconds, float(np.median(steps)) if len(steps) else 0.0)]
    return _last[0][1:]
