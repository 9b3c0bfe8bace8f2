"""Videos whose every picture carries its number, for every kind of file in `barcode_specs`.

A picture has a barcode in its centre square: four by four cells, of which ten hold the number in binary and six tell
which way up it is. It stays readable after lossy coding and scaling, and a picture that was decoded without its
references, turned or mirrored reads as -1.

`write` writes a file, `truth` says what FFmpeg gives for it from the first packet to the last.
"""

from __future__ import annotations

import functools
import itertools
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

# SVT-AV1 prints a page for every file; it reads this when it is loaded.
os.environ.setdefault("SVT_LOG", "1")

import av
import numpy as np
from av.stream import Disposition
from barcode_specs import EDITS, ENCODERS, RATE, UPRIGHT, Spec

CLOCK = 90_000
"""Ticks per second in which times are written."""
LATE_S = 5
CUT = 7
"""Packets that a file lacks at its start."""
COVER = 1000
"""Number in the picture of a cover."""
HELD_S = 4.0
JUMP_S = 3.0
FAST, SLOW_S = 240, 20.0
WRAP_S = (1 << 33) / CLOCK - 0.5
"""Where MPEG's clock is half a second before its end."""
FORMAT = {
    "mpg": "vob",
    "ts": "mpegts",
    "mkv": "matroska",
    "live": "matroska",
    "fmp4": "mp4",
    "faststart": "mp4",
    "wmv": "asf",
}
OPTIONS = {"faststart": {"movflags": "faststart"}, "live": {"live": "1"}}
SOUND_HZ, SOUND_LONGER_S = 44_100, 2.0


# --------------------------------------------------------------------------- pictures


CELLS = 4
MARKS = {(0, 0): 1, (0, 1): 1, (1, 0): 0, (0, 3): 0, (3, 0): 0, (3, 3): 0}
"""Cells that no turning or mirroring leaves as they are; the others hold bits."""
PLACES = [place for place in itertools.product(range(CELLS), repeat=2) if place not in MARKS]


@functools.lru_cache(maxsize=4096)
def picture(number: int, height: int, width: int) -> np.ndarray:
    """The picture that carries `number`, uint8 (height, width, 3), the right way up."""
    cells = np.zeros((CELLS, CELLS), np.uint8)
    for place, mark in MARKS.items():
        cells[place] = mark
    for bit, place in enumerate(PLACES):
        cells[place] = number >> bit & 1
    side = min(height, width)
    edges = np.arange(side) * CELLS // side
    grey = np.full((height, width), 128, np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    grey[top : top + side, left : left + side] = np.where(cells[edges][:, edges], 220, 30)
    return np.repeat(grey[:, :, None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    """The number in a picture (H, W, 3), or -1 where it is not one or not upright."""
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frame[top : top + side, left : left + side]
    size = side / CELLS
    cells = {}
    for row, column in itertools.product(range(CELLS), repeat=2):
        # The middle of the cell: its edges are blurred by scaling.
        y, x = (round((k + 0.3) * size) for k in (row, column))
        cells[row, column] = float(
            square[y : y + max(1, int(size * 0.4)), x : x + max(1, int(size * 0.4))].mean()
        )
    if any(90 < grey < 160 for grey in cells.values()):
        return -1
    if any((cells[place] > 128) != mark for place, mark in MARKS.items()):
        return -1
    return sum(int(cells[place] > 128) << bit for bit, place in enumerate(PLACES))


def shown(stored: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A stored picture (H, W, 3) as a display matrix says it is to be shown."""
    a, b, c, d = matrix
    image, across, down = (stored, a, d) if a else (stored.swapaxes(0, 1), c, b)
    return image[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1]


def _stored(upright: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The inverse of `shown`."""
    a, b, c, d = matrix
    # A turn and its inverse are each other's transposes.
    return np.ascontiguousarray(shown(upright, (a, c, b, d)))


# --------------------------------------------------------------------------- writing


def times_of(spec: Spec) -> list[float]:
    """Seconds at which the pictures are shown, hidden ones too, the first at 0."""
    frames = np.arange(spec.frames)
    times = frames / RATE
    if spec.timing == "mild":
        times = times + 0.1 / RATE * np.array([(k * 7919) % 3 - 1 for k in frames]) * (frames > 0)
    elif spec.timing == "jumps":
        times = times + JUMP_S * (frames * 3 // spec.frames)
    elif spec.timing == "twins":
        times = frames // 2 * 2 / RATE
    elif spec.timing in ("fast", "slow"):
        times = frames / FAST if spec.timing == "fast" else frames * SLOW_S
    elif spec.timing == "halves":
        times = np.maximum(times, times + (times - times[spec.frames // 2]) * (RATE / 17.5 - 1))
    return list(map(float, times))


def write(spec: Spec, path: Path) -> None:
    """Writes one file of a kind; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only a header that is written after the first fragment knows that it begins late.
    fragments = "frag_keyframe+" + ("empty_moov" if spec.start == "zero" else "delay_moov")
    options = {"movflags": fragments} if spec.container == "fmp4" else OPTIONS.get(spec.container, {})
    with av.open(str(path), "w", format=FORMAT.get(spec.container, spec.container), options=options) as file:
        cover = _cover_stream(file) if spec.cover == "first" else None
        stream = _stream(file, spec)
        cover = _cover_stream(file) if spec.cover == "last" else cover
        sound = (
            file.add_stream("mp2" if spec.container in ("avi", "ts") else "aac", rate=SOUND_HZ)
            if spec.sound
            else None
        )
        packets = _encoded(stream, spec)
        if cover is not None:
            file.mux(_cover_packets(cover))
        if sound is not None:
            packets = _interleaved(packets, _sound_packets(sound, spec))
        for packet in packets:
            file.mux(packet)
    if spec.start in EDITS:
        path.write_bytes(_edited(path.read_bytes(), EDITS[spec.start]))
    elif spec.start == "again":
        path.write_bytes(path.read_bytes() * 2)


def _edited(mp4: bytes, parts: Sequence[tuple[int, int]]) -> bytes:
    """An mp4 with another edit list; its header has to be at its end, so that nothing else moves."""
    clock = int.from_bytes(_after(mp4, b"mdhd", 12, 4))
    movie_clock = int.from_bytes(_after(mp4, b"mvhd", 12, 4))
    begins = int.from_bytes(_after(mp4, b"elst", 12, 4))
    entries = [
        struct.pack(
            ">IiI", count * movie_clock // RATE, begins + first * clock // RATE if first >= 0 else -1, 1 << 16
        )
        for first, count in parts
    ]
    box = struct.pack(">I4sII", 16 + 12 * len(parts), b"elst", 0, len(parts)) + b"".join(entries)
    start = mp4.index(b"elst") - 4
    length = int.from_bytes(mp4[start : start + 4])
    edited = bytearray(mp4[:start] + box + mp4[start + length :])
    for outer in (b"moov", b"trak", b"edts"):
        at = mp4.index(outer) - 4
        edited[at : at + 4] = (int.from_bytes(mp4[at : at + 4]) + len(box) - length).to_bytes(4)
    return bytes(edited)


def _after(mp4: bytes, box: bytes, offset: int, count: int) -> bytes:
    """`count` bytes of the first box of a kind, `offset` after its name."""
    start = mp4.index(box) + 4 + offset
    return mp4[start : start + count]


def _stream(file: Any, spec: Spec) -> Any:
    stream = file.add_stream(ENCODERS[spec.codec], rate=RATE)
    stream.width, stream.height = spec.width, spec.height
    stream.pix_fmt = "yuvj420p" if (spec.codec, spec.pixels) == ("mjpeg", "yuv420p") else spec.pixels
    stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
    stream.codec_context.thread_count = 1
    stream.gop_size = spec.gop
    stream.options = _encoder_options(spec)
    if spec.codec in ("mpeg4", "mpeg2"):
        stream.max_b_frames = spec.b_frames
    if spec.matrix != UPRIGHT:
        a, b, c, d = (sign << 16 for sign in spec.matrix)
        stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
    return stream


def _encoder_options(spec: Spec) -> dict[str, str]:
    key, b_frames, open_gop = str(spec.gop), str(spec.b_frames), int(spec.refresh == "open")
    intra = int(spec.refresh == "intra")
    common = f"keyint={key}:min-keyint={key}:scenecut=0:bframes={b_frames}:open-gop={open_gop}:intra-refresh={intra}"
    if spec.codec == "h264":
        return {
            "preset": "veryfast",
            "crf": "18",
            "x264-params": f"{common}:threads=1:tff={int(spec.interlaced)}",
        }
    if spec.codec == "hevc":
        alone = "pools=none:frame-threads=1:log-level=none"
        return {"preset": "ultrafast", "crf": "18", "x265-params": f"{common}:{alone}"}
    if spec.codec in ("vp8", "vp9"):
        return {"deadline": "good", "cpu-used": "5", "crf": "15", "b": "4M", "g": key, "lag-in-frames": "0"}
    if spec.codec == "av1":
        structure = 2 if spec.b_frames else 1
        return {
            "preset": "9",
            "crf": "12",
            "svtav1-params": f"lp=1:pred-struct={structure}:keyint={key}:scd=0",
        }
    if spec.codec == "mjpeg":
        return {"qmin": "1", "qmax": "4"}
    flags = "" if spec.refresh == "open" else "+cgop"
    flags += "+ildct+ilme" if spec.interlaced else ""
    return {"b": "8M", "qmin": "1", "qmax": "4", "sc_threshold": "1000000000"} | (
        {"flags": flags} if flags else {}
    )


def _encoded(stream: Any, spec: Spec) -> list[Any]:
    """Packets of the whole file, in order of decoding, with the times that the spec asks for."""
    turned = not spec.matrix[0]
    shape = (spec.width, spec.height) if turned else (spec.height, spec.width)
    packets = []
    for number in range(spec.frames):
        image = _stored(picture(spec.number(number), *shape), spec.matrix)
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts = number
        frame.time_base = Fraction(1, RATE)
        packets += stream.encode(frame)
    packets += stream.encode()
    packets = [packet for packet in packets if packet.size][CUT if spec.start == "cut" else 0 :]
    times = times_of(spec)
    first = min(_count(packet, packet.pts) for packet in packets) if spec.start == "cut" else spec.hidden
    origin = times[first] - {"late": LATE_S, "wrap": WRAP_S}.get(spec.start, 0)

    def ticks(count: int) -> int:
        """When picture `count` is shown; decoding begins before the first, and ends after no later than the last."""
        at = times[count] if 0 <= count < len(times) else times[0] + count * (times[1] - times[0] or 1 / RATE)
        return round((at - origin) * CLOCK)

    if spec.container != "avi" or spec.start != "zero":
        last = max(packet.pts for packet in packets)
        for packet in packets:
            count = _count(packet, packet.pts)
            packet_time = Fraction(1, CLOCK)
            end = ticks(count + 1) if count + 1 < len(times) else ticks(count) + CLOCK // RATE
            held = spec.timing == "held" and (packet is packets[-1] or packet.pts == last)
            decoded = None if packet.dts is None else ticks(_count(packet, packet.dts))
            packet.pts, packet.dts = ticks(count), decoded
            packet.duration = round(HELD_S * CLOCK) if held else end - packet.pts
            packet.time_base = packet_time
    return packets


def _sound_packets(stream: Any, spec: Spec) -> list[Any]:
    stream.layout = "mono"
    begins = LATE_S if spec.start == "late" else 0
    times = times_of(spec)
    blocks = int((times[-1] - times[spec.hidden] + SOUND_LONGER_S) * SOUND_HZ / 1152)
    packets = []
    for block in range(blocks):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16", layout="mono")
        frame.sample_rate = SOUND_HZ
        frame.pts, frame.time_base = block * 1152 + begins * SOUND_HZ, Fraction(1, SOUND_HZ)
        packets += stream.encode(frame)
    return [*packets, *stream.encode()]


def _interleaved(*tracks: list[Any]) -> list[Any]:
    """Packets of all tracks in the order of their times."""
    return sorted(itertools.chain(*tracks), key=lambda packet: float(packet.dts * packet.time_base))


def _count(packet: Any, time: int) -> int:
    return round(time * packet.time_base * RATE)


def _cover_stream(file: Any) -> Any:
    stream = file.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = 96, 96, "yuvj420p"
    stream.disposition = Disposition.attached_pic
    return stream


def _cover_packets(stream: Any) -> list[Any]:
    frame = av.VideoFrame.from_ndarray(picture(COVER, 96, 96), format="rgb24")
    frame.pts, frame.time_base = 0, Fraction(1)
    return [*stream.encode(frame), *stream.encode()]


# --------------------------------------------------------------------------- truth


@dataclass(frozen=True)
class Truth:
    """What a sequential decode by FFmpeg gives for a file."""

    numbers: list[int]
    """Of the pictures in the order in which they are shown; -1 for one that a cut has left without references."""
    times: list[float]
    """Seconds from the first of them; empty where a cut has left some without number."""
    shape: tuple[int, int]
    """Height and width as shown."""


def truth(spec: Spec, path: Path) -> Truth:
    """Decodes a file from its first packet to its last, with FFmpeg as it comes.

    The times are those that were written, of the pictures that came: AVI has none of its own, and how finely the others
    keep them differs. An MPEG program stream has a time per block of small pictures, and parts of an edit list have
    other times than were written; there they are FFmpeg's. A file that begins again has times twice: none here.
    """
    numbers, found = [], []
    with av.open(str(path)) as file:
        stream = next(s for s in file.streams.video if not s.disposition & Disposition.attached_pic)
        stream.codec_context.thread_count = 1
        for frame in file.decode(stream):
            image = shown(frame.to_ndarray(format="rgb24"), spec.matrix)
            numbers.append(number_of(image))
            found.append(frame.time)
    if spec.start == "again":
        times = []
    elif spec.container == "mpg" or spec.start in EDITS:
        times = [] if None in found else found
    else:
        # Whatever is not shown is at the start.
        times = times_of(spec)[-len(numbers) :] if min(numbers) >= 0 else []
    return Truth(numbers, [time - times[0] for time in times], image.shape[:2])
