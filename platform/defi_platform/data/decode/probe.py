"""Probing a local video file: opened once, checked against what its container promises, described.

It runs inside decoder processes that may be killed at any moment, so it imports neither Ray nor torch.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from defi_platform.data.decode.frame_scores import FrameScorer
from defi_platform.data.decode.messages import Probe
from defi_platform.data.decode.video_readers import (
    SCALING_THREADS,
    DecordReader,
    check_memory,
    first_line,
    open_container,
    packet_times,
)
from defi_platform.data.rejection import BadVideo

SMALL_PIXELS = 128 * 128
"""Frames up to this size are left to PyAV: decord's seeks cost it 2 ms each there, six times the decoding."""

END_TOLERANCE_S = 1.0
"""How much earlier than its container the picture may end before the file counts as cut short."""


def probe(path: str, thorough: bool, memory_bytes: int, score_frames: bool = False) -> Probe:
    """Opens, checks and describes one local file.

    Args:
        path: of the file.
        thorough: decodes every frame; otherwise the first one and the last group of pictures.
        memory_bytes: that decoding may use.
        score_frames: scores the frames on the way; only where it is thorough.

    Raises: BadVideo with the reason why the file cannot be used.
    """
    size = os.path.getsize(path)
    _check_content(path, size)
    container, stream = open_container(path)
    with container:
        width, height = stream.width, stream.height
        check_memory(width, height, memory_bytes)
        pts, keys = packet_times(container, stream)
        _check_count(container, stream, pts)
        seconds = [float((t - pts[0]) * stream.time_base) for t in pts]
        fps = (len(pts) - 1) / seconds[-1] if seconds[-1] > 0 else 0.0
        scorer = FrameScorer(len(pts), fps, height, width) if score_frames and thorough else None
        decoded, rotation = _decode_through(path, thorough, keys, pts, scorer)
        if decoded < len(pts):
            raise BadVideo("short", f"{len(pts)} frames listed, {decoded} decode")
        codec = stream.codec_context.codec.canonical_name
    if len(pts) < 2:
        raise BadVideo("too_short", f"{len(pts)} frame")
    turned = rotation % 180 != 0
    variable = _is_variable(seconds)
    return Probe(
        num_frames=len(pts),
        fps=fps,
        width=height if turned else width,
        height=width if turned else height,
        codec=codec,
        bytes=size,
        rotation=rotation,
        decoder=_choose_decoder(path, len(pts), (width, height) if turned else (height, width)),
        variable_rate=variable,
        times=tuple(seconds) if variable else (),
        frame_scores=None if scorer is None else scorer.result(),
    )


def _check_content(path: str, size: int) -> None:
    if size == 0:
        raise BadVideo("empty", "0 bytes")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise BadVideo("lfs_pointer", f"{size} bytes of Git LFS pointer")
    if all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        raise BadVideo("not_video", f"text: {head[:60].decode('ascii')!r}")


def _check_count(container: Any, stream: Any, pts: list[int]) -> None:
    """Compares what the container promises with what it holds, against silent loss."""
    if not pts:
        raise BadVideo("unreadable", "the container lists no frames")
    if stream.frames > len(pts):
        raise BadVideo("short", f"the container promises {stream.frames} frames and holds {len(pts)}")
    if stream.frames or container.streams.audio or not container.duration:
        # With a sound track the container's length may rightly be longer than the picture's.
        return
    step = (pts[-1] - pts[0]) / max(1, len(pts) - 1)
    start = container.start_time or 0
    ends = float((pts[-1] + step) * stream.time_base) - start / 1e6
    promised = container.duration / 1e6
    if promised - ends > END_TOLERANCE_S:
        raise BadVideo("short", f"the container promises {promised:.2f} s, its pictures end at {ends:.2f} s")


def _decode_through(
    path: str, thorough: bool, keys: list[int], pts: list[int], scorer: FrameScorer | None
) -> tuple[int, int]:
    """Decodes the file, or its first and last group of pictures: (frames that decode, rotation in degrees)."""
    import av

    count, rotation = 0, 0
    container, stream = open_container(path)
    try:
        with container:
            for frame in container.decode(stream):
                if not count:
                    rotation = frame.rotation % 360
                count += 1
                if scorer is not None:
                    scorer.add(functools.partial(_grey, frame))
                if not thorough:
                    break
            if thorough:
                return count, rotation
            container.seek(keys[-1], stream=stream, backward=True)
            tail = {frame.pts for frame in container.decode(stream)}
            last = sum(1 for t in pts if t >= keys[-1])
            return len(pts) - max(0, last - len(tail)), rotation
    except MemoryError as error:
        raise BadVideo("memory", "the decoder ran out of its memory") from error
    except av.FFmpegError as error:
        reason = "memory" if error.errno == 12 else "corrupt"
        raise BadVideo(reason, f"after {count} frames: {first_line(error)}") from error


def _grey(frame: Any, height: int, width: int) -> np.ndarray:
    """(height, width) uint8."""
    grey: np.ndarray = frame.to_ndarray(
        format="gray", height=height, width=width, interpolation="AREA", threads=SCALING_THREADS
    )
    return grey


def _is_variable(seconds: list[float]) -> bool:
    steps = np.diff(np.asarray(seconds))
    return bool(len(steps) and steps.max() > 1.5 * np.median(steps) + 1e-3)


def _choose_decoder(path: str, num_frames: int, shape: tuple[int, int]) -> str:
    """Chooses decord where it gives as many frames of the right shape as PyAV does, and is no slower; else PyAV."""
    if shape[0] * shape[1] <= SMALL_PIXELS:
        return "pyav"
    try:
        reader = DecordReader(path, None)
        if reader.num_frames == num_frames and reader.frames([0, num_frames - 1]).shape[1:3] == shape:
            return "decord"
    except BadVideo:
        # Which says nothing against the file: PyAV has just decoded it.
        return "pyav"
    return "pyav"
