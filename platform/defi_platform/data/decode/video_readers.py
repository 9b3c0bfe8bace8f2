"""Opening video files and taking frames out of them: the only module that knows decord and PyAV.

It runs inside decoder processes that may be killed at any moment, so it imports neither Ray nor torch.
Layout: T frames, H height, W width; frames are RGB uint8 (T, H, W, 3).
"""

from __future__ import annotations

import bisect
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from defi_platform.data.decode.frame_scores import Screener, Screening
from defi_platform.data.rejection import BadVideo

BYTES_PER_PIXEL = 12
"""Working memory of a decoder per pixel: reference pictures, the picture itself and its RGB copy."""

SMALL_PIXELS = 128 * 128
"""Frames up to this size are left to PyAV: decord's seeks cost it 2 ms each there, six times the decoding."""

SCALING_THREADS = 1
"""By default PyAV starts a thread per core for every single picture it scales: three times the work of scaling it."""

END_TOLERANCE_S = 1.0
"""How much earlier than its container the picture may end before the file counts as cut short."""


@dataclass(frozen=True)
class DecodeJob:
    """Frames to take out of one file."""

    uri: str
    indices: tuple[int, ...]
    """Frame numbers within the file, in display order; may repeat."""
    height: int
    width: int
    decoder: str = "decord"
    """decord | pyav; what the probe found to work."""
    source_height: int = 0
    source_width: int = 0
    """Displayed size, after rotation; 0 when not known."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the frames it yields: (T, H, W, 3)."""
        return (len(self.indices), self.height, self.width, 3)


@dataclass(frozen=True)
class ProbeJob:
    """A file to open once and judge."""

    uri: str
    thorough: bool = True
    """Decode every frame; otherwise only the first and the last."""
    screen: bool = False
    """Score the frames on the way; takes a thorough look."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a file is."""

    num_frames: int
    fps: float
    width: int
    height: int
    """Displayed size, after rotation."""
    codec: str
    bytes: int
    rotation: int
    decoder: str
    variable_rate: bool
    times: tuple[float, ...] = ()
    """Seconds of each frame from the first on; only where the rate is variable."""
    screening: Screening | None = None
    """Scores of the frames, where the job asked for them."""


class Reader(Protocol):
    """One open file."""

    num_frames: int

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """(T, H, W, 3) uint8. Raises: BadVideo."""
        ...

    def close(self) -> None:
        """Lets go of the file and of the decoder's memory."""
        ...


# --------------------------------------------------------------------------- geometry


def fitted(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) to scale `source` to, so that it covers `target` with its aspect kept."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


def centre_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """(T, h, w, 3) -> (T, height, width, 3), a view."""
    top = (frames.shape[1] - height) // 2
    left = (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]


def check_memory(width: int, height: int, memory_bytes: int) -> None:
    """Refuses frames whose decoding cannot fit. Codecs report a failed allocation as any error, or crash."""
    need = width * height * BYTES_PER_PIXEL
    if need > memory_bytes:
        raise BadVideo(
            "memory",
            f"frames of {width}x{height} need about {need >> 20} MB to decode, the limit is {memory_bytes >> 20} MB",
        )


# --------------------------------------------------------------------------- decord


class DecordReader:
    """decord on one thread: a machine runs several decoders, and threads of theirs would fight."""

    def __init__(self, path: Any, size: tuple[int, int] | None) -> None:
        import decord

        decord.logging.set_level(decord.logging.FATAL)
        options = {"height": size[0], "width": size[1]} if size else {}
        try:
            self._video = decord.VideoReader(path, num_threads=1, **options)
        except (RuntimeError, decord.DECORDError) as error:
            raise BadVideo("unreadable", f"decord: {_first_line(error)}") from error
        self._errors = (RuntimeError, decord.DECORDError, IndexError)
        self.num_frames = len(self._video)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        if max(indices) >= self.num_frames:
            raise BadVideo("short", f"frame {max(indices)} asked, {self.num_frames} there")
        try:
            return self._video.get_batch(list(indices)).asnumpy()
        except self._errors as error:
            raise BadVideo("corrupt", f"decord: {_first_line(error)}") from error

    def close(self) -> None:
        del self._video


# --------------------------------------------------------------------------- PyAV


class PyavReader:
    """PyAV: opens what decord cannot (AV1), reads remote files by range, rotates by the display matrix."""

    def __init__(self, file: Any, size: tuple[int, int] | None) -> None:
        import av

        self._av = av
        self._size = size
        self._container, self._stream = open_container(file)
        self._pts, self._keys = _packet_times(self._container, self._stream)
        if not self._pts:
            raise BadVideo("unreadable", "the container lists no frames")
        self.num_frames = len(self._pts)
        self._decoded: Iterator[Any] | None = None
        self._position = -1
        """Index of the frame decoded last; -1 before the first."""

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        if max(indices) >= self.num_frames:
            raise BadVideo("short", f"frame {max(indices)} asked, {self.num_frames} there")
        pictures: dict[int, np.ndarray] = {}
        try:
            for index in sorted(set(indices)):
                pictures[index] = self._picture(self._frame(index))
        except (self._av.FFmpegError, StopIteration) as error:
            self._decoded = None
            raise BadVideo("corrupt", f"PyAV: {_first_line(error)}") from error
        return np.stack([pictures[index] for index in indices])

    def close(self) -> None:
        # The decoding generator and its container refer to each other, so memory would wait for the collector.
        self._decoded = None
        self._container.close()

    def _frame(self, index: int) -> Any:
        wanted = self._pts[index]
        key = bisect.bisect_right(self._keys, wanted) - 1
        start = self._keys[max(0, key)]
        ahead = self._decoded is not None and self._position < index
        if not ahead or self._pts[self._position] < start:
            self._container.seek(start, stream=self._stream, backward=True)
            self._decoded = self._container.decode(self._stream)
        assert self._decoded is not None
        for frame in self._decoded:
            if frame.pts is not None and frame.pts >= wanted:
                if frame.pts > wanted:
                    self._decoded = None
                    raise BadVideo("corrupt", f"frame {index} does not decode; the next one does")
                self._position = index
                return frame
        self._decoded = None
        raise BadVideo("short", f"frame {index} is listed but does not decode")

    def _picture(self, frame: Any) -> np.ndarray:
        turns = frame.rotation // 90 % 4
        height, width = self._size or (
            (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        )
        if turns % 2:
            height, width = width, height
        image = frame.to_ndarray(
            format="rgb24", height=height, width=width, interpolation="AREA", threads=SCALING_THREADS
        )
        return np.rot90(image, turns) if turns else image


def pyav_release() -> str:
    """PyAV as the quarantine names it."""
    import av

    return f"pyav {av.__version__}"


def open_container(file: Any) -> tuple[Any, Any]:
    """Opens a file or path with PyAV: (container, video stream on one thread).

    Raises: BadVideo(unreadable | no_video_stream).
    """
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        container = av.open(file)
    except (av.FFmpegError, OSError) as error:
        raise BadVideo("unreadable", f"PyAV: {_first_line(error)}") from error
    if not container.streams.video:
        raise BadVideo(
            "no_video_stream", f"streams: {', '.join(s.type for s in container.streams) or 'none'}"
        )
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def _packet_times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Display times of all frames and of the key frames, sorted, in the stream's time base."""
    times, keys = [], []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or packet.is_discard:
            continue
        times.append(time)
        if packet.is_keyframe:
            keys.append(time)
    times.sort()
    return times, sorted(keys) or times[:1]


# --------------------------------------------------------------------------- probing


def probe(path: str, thorough: bool, memory_bytes: int, screen: bool = False) -> Probe:
    """Judges one local file. Raises: BadVideo with the reason it cannot be used."""
    size = os.path.getsize(path)
    _check_content(path, size)
    container, stream = open_container(path)
    with container:
        width, height = stream.width, stream.height
        check_memory(width, height, memory_bytes)
        pts, keys = _packet_times(container, stream)
        _check_count(container, stream, pts)
        seconds = [float((t - pts[0]) * stream.time_base) for t in pts]
        fps = (len(pts) - 1) / seconds[-1] if seconds[-1] > 0 else 0.0
        screener = Screener(len(pts), fps, height, width) if screen and thorough else None
        decoded, rotation = _decode_through(path, thorough, keys, pts, screener)
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
        screening=None if screener is None else screener.result(),
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
    """The guard against silent loss: what the container promises against what it holds."""
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
    path: str, thorough: bool, keys: list[int], pts: list[int], screener: Screener | None
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
                if screener is not None:
                    screener.see(functools.partial(_grey, frame))
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
        raise BadVideo(reason, f"after {count} frames: {_first_line(error)}") from error


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
    """decord where it gives as many frames of the right shape as PyAV does, and is no slower; else PyAV."""
    if shape[0] * shape[1] <= SMALL_PIXELS:
        return "pyav"
    try:
        reader = DecordReader(path, None)
        if reader.num_frames == num_frames and reader.frames([0, num_frames - 1]).shape[1:3] == shape:
            return "decord"
    except BadVideo:
        # Not a verdict on the file: PyAV has just decoded it.
        return "pyav"
    return "pyav"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
