"""Probing a local video file: decoded once from start to end, checked against what its container promises, described.

What sequential decoding gives is what the video is: its frames are numbered by it, and seeks are proven against it. It
runs inside decoder processes that may be killed at any moment, so it imports neither Ray nor torch.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

from defi_platform.data.decode.frame_scores import FrameScorer
from defi_platform.data.decode.frame_times import frame_times, is_variable, mean_rate
from defi_platform.data.decode.messages import Probe
from defi_platform.data.decode.seek_proof import Key, Truth, prove
from defi_platform.data.decode.video_readers import (
    SCALING_THREADS,
    check_memory,
    content_hash,
    damage,
    decoded,
    open_container,
)
from defi_platform.data.rejection import BadVideo

MOST_BYTES = 1 << 50
"""A file that says it is longer says nothing."""

END_TOLERANCE_S = 1.0
"""How much earlier than its container says everything in it may end before the file counts as cut short."""

WITH_LENGTH = ("matroska", "avi", "flv", "asf", "mxf", "gxf", "rm", "wtv")
"""Containers that state their length in a header; in the others FFmpeg makes it out from what it finds."""

CUT_WITHIN = ("avi", "asf")
"""Containers of which `_lost_bytes` counts bytes of pictures alone, not of an index behind them."""

ASF_HEADER, ASF_DATA = (bytes.fromhex(part + "8e66cf11a6d900aa0062ce6c") for part in ("3026b275", "3626b275"))
EBML, MATROSKA_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
FLV_SIZE = b"\x00\x08filesize\x00"
"""Key of the file's length in the first record of an FLV file; a big-endian double follows."""

RAW_VIDEO = b"YUV4MPEG2 "
"""What begins like a text and is video."""

Report = Callable[[float], None]
"""Takes the declared length in seconds, again and again while a probe goes on."""


@dataclass
class _Packets:
    """Packets of a file as its container lists them, read without decoding."""

    keys: list[Key] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    """Display times, else decode times, of what is to be shown."""
    count: int = 0
    empty: int = 0
    """Those without content, which stand for a picture that stays; not in `count`."""
    cut: bool = False
    """Whether the file ends within one."""
    end_s: float = 0.0
    """Where the last one of any stream ends."""
    step_s: float = 0.0
    """Seconds per frame, on average; 0 where that is not known."""


def probe(path: str, memory_bytes: int, score_frames: bool, report: Report) -> Probe:
    """Opens, checks and describes one local file.

    Args:
        path: of the file.
        memory_bytes: that decoding may use.
        score_frames: scores the frames on the way.
        report: is called with every packet and frame.

    Raises: BadVideo with the reason why the file cannot be used.
    """
    import av

    size = os.path.getsize(path)
    _check_content(path, size)
    container, stream = open_container(path)
    with container:
        check_memory(stream.width, stream.height, memory_bytes)
        kind = container.format.name.split(",")[0]
        promised = len(stream.index_entries) if kind == "mov" else 0
        goes_on = functools.partial(report, max(0.0, (container.duration or 0) / 1e6))
        try:
            packets = _packets(container, stream, goes_on)
        except av.FFmpegError as error:
            raise BadVideo(*damage(error, "reading its packets")) from error
        lost = _lost_bytes(path, size)
        _check_length(
            container, max(promised, len(stream.index_entries)) if kind == "mov" else 0, packets, lost
        )
        unit, rate = stream.time_base, stream.average_rate or stream.guessed_rate
        codec = stream.codec_context.codec.canonical_name
        scorer = _scorer(packets, unit, stream.height, stream.width) if score_frames else None
    truth = _decode_through(path, kind, scorer, goes_on)
    if not len(truth):
        raise BadVideo("corrupt", f"none of {packets.count} packets decodes to a picture")
    if len(truth) < 2:
        raise BadVideo("too_short", f"{len(truth)} frame")
    truth.doubtful = truth.doubtful or _is_odd(truth, packets)
    seconds = frame_times(truth.pts, packets.times, unit, rate)
    variable = is_variable(seconds)
    height, width = truth.shape[::-1] if truth.orientation & 4 else truth.shape
    return Probe(
        num_frames=len(truth),
        fps=mean_rate(seconds),
        width=width,
        height=height,
        codec=codec,
        bytes=size,
        decoder="pyav",
        variable_rate=variable,
        times=tuple(seconds.tolist()) if variable else (),
        frame_scores=None if scorer is None else scorer.result(),
        seek_index=prove(path, truth, packets.keys, kind, goes_on).to_bytes(),
        content=content_hash(truth.crcs),
    )


def _is_odd(truth: Truth, packets: _Packets) -> bool:
    """Whether frames are repeated, lost or out of order, as in files that were put together or have parts missing."""
    known = [time for time in truth.pts if time is not None]
    in_order = all(time < later for time, later in pairwise(known))
    return not in_order or len(truth) not in (len(packets.times), packets.count)


def _check_content(path: str, size: int) -> None:
    if size == 0:
        raise BadVideo("empty", "0 bytes")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise BadVideo("lfs_pointer", f"{size} bytes of Git LFS pointer")
    if not head.startswith(RAW_VIDEO) and all(byte in b"\t\n\r\f" or 32 <= byte < 127 for byte in head):
        raise BadVideo("not_video", f"text: {head[:60].decode('ascii')!r}")


def _packets(container: Any, video: Any, goes_on: Callable[[], None]) -> _Packets:
    found = _Packets()
    for packet in container.demux():
        goes_on()
        if not packet.size:
            # The last one, without a time, only says that there are no more.
            found.empty += packet.stream_index == video.index and packet.dts is not None
            continue
        when = packet.pts if packet.pts is not None else packet.dts
        if when is not None:
            found.end_s = max(found.end_s, float((when + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != video.index:
            continue
        if packet.is_keyframe:
            found.keys.append(Key(packet.dts, packet.pts, packet.pos, found.count))
        found.count += 1
        found.cut = packet.is_corrupt
        if when is not None and not packet.is_discard:
            found.times.append(when)
    if len(found.times) > 1:
        found.step_s = float((max(found.times) - min(found.times)) * video.time_base) / (len(found.times) - 1)
    return found


def _lost_bytes(path: str, size: int) -> int:
    """Bytes that a file says it has, or its pictures take, beyond its end; 0 where it says nothing of the kind."""
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[:4] == b"RIFF":
            end = _end_of_pictures(file, size)
        elif head[:16] == ASF_HEADER:
            file.seek(int.from_bytes(head[16:24], "little"))
            data = file.read(24)
            end = file.tell() - 24 + int.from_bytes(data[16:], "little") if data[:16] == ASF_DATA else 0
        elif head[:4] == EBML:
            at, length = _matroska_size(head, 4)
            at, length = (
                _matroska_size(head, at + length + 4)
                if head[at + length :][:4] == MATROSKA_SEGMENT
                else (0, 0)
            )
            end = at + length
        elif head[:3] == b"FLV" and FLV_SIZE in head:
            stated = head[head.index(FLV_SIZE) + len(FLV_SIZE) :][:8]
            value = struct.unpack(">d", stated)[0] if len(stated) == 8 else 0.0
            end = int(value) if 0 < value < float(MOST_BYTES) else 0
        else:
            end = 0
    return max(0, end - size) if end < MOST_BYTES else 0


def _end_of_pictures(file: Any, size: int) -> int:
    """End of the last list of pictures of an AVI file; 0 where its length was never filled in."""
    at, end = 0, 0
    while at + 12 <= size:
        file.seek(at)
        chunk = file.read(12)
        length = int.from_bytes(chunk[4:8], "little")
        if chunk[:4] == b"RIFF":
            at += 12
            continue
        if chunk[:4] == b"LIST" and chunk[8:] == b"movi":
            if length in (0, 0xFFFFFFFF):
                return 0
            end = at + 8 + length
        at += 8 + length + length % 2
        if at > size or not chunk[:4].strip(b"\x00"):
            break
    return end


def _matroska_size(head: bytes, at: int) -> tuple[int, int]:
    """(where the content begins, its length; 0 where that is left open) of an element whose size is at `at`."""
    first = head[at] if at < len(head) else 0
    width = 9 - first.bit_length()
    value = int.from_bytes(head[at : at + width]) & ((1 << 7 * width) - 1)
    return at + width, 0 if width > 8 or value == (1 << 7 * width) - 1 else value


def _check_length(container: Any, promised: int, packets: _Packets, lost: int) -> None:
    """Compares what the container promises with what it holds, against silent loss.

    Args:
        container: open.
        promised: packets that its table of contents lists; 0 where it has none.
        packets: that are there.
        lost: bytes that are missing at the end.
    """
    if not packets.count:
        raise BadVideo("unreadable", "the container lists no frames")
    kind = container.format.name.split(",")[0]
    if lost and kind in CUT_WITHIN:
        raise BadVideo("short", f"its pictures end {lost:,} bytes before the container says")
    whole = packets.count + packets.empty - packets.cut
    if promised:
        if promised > whole:
            raise BadVideo("short", f"the container promises {promised} frames and holds {whole}")
        return
    if kind not in WITH_LENGTH:
        return
    # Lengths are counted from 0 in some containers, from the first picture in others.
    start_s = (container.start_time or 0) / 1e6
    ends_s = packets.end_s - min(0.0, start_s)
    promised_s = (container.duration or 0) / 1e6
    # Good files may keep their length loosely, but where bytes are missing it says what was in them.
    tolerance = packets.step_s / 2 if lost and packets.step_s else END_TOLERANCE_S
    if promised_s - ends_s > tolerance:
        raise BadVideo(
            "short", f"the container promises {promised_s:.2f} s, what it holds ends at {ends_s:.2f} s"
        )


def _scorer(packets: _Packets, unit: Fraction, height: int, width: int) -> FrameScorer:
    fps = mean_rate(frame_times(packets.times, packets.times, unit, None))
    return FrameScorer(packets.count, fps, height, width)


def _decode_through(path: str, kind: str, scorer: FrameScorer | None, goes_on: Callable[[], None]) -> Truth:
    """Decodes the file from start to end."""
    import av

    truth = Truth()
    container, stream = open_container(path, kind)
    try:
        with container:
            for frame in decoded(container, stream):
                truth.add(frame)
                if scorer is not None:
                    scorer.add(functools.partial(_grey, frame))
                goes_on()
    except MemoryError as error:
        raise BadVideo("memory", "the decoder ran out of its memory") from error
    except av.FFmpegError as error:
        raise BadVideo(*damage(error, f"after {len(truth)} frames")) from error
    return truth


def _grey(frame: Any, height: int, width: int) -> np.ndarray:
    """(height, width) uint8."""
    grey: np.ndarray = frame.to_ndarray(
        format="gray", height=height, width=width, interpolation="AREA", threads=SCALING_THREADS
    )
    return grey
