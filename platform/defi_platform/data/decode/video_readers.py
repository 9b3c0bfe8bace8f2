"""Readers of video files: frames out of them with decord or PyAV.

The probe opens files through this module; `writers/h264` is the only other one that imports PyAV. It runs inside decoder processes that may be killed at any moment, so it imports neither Ray nor torch.
Layout: T frames, H height, W width; frames are RGB uint8 (T, H, W, 3).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from defi_platform.data.rejection import BadVideo

BYTES_PER_PIXEL = 12
"""Working memory of a decoder per pixel: reference pictures, the picture itself and its RGB copy."""

SCALING_THREADS = 1
"""By default PyAV starts a thread per core for every single picture it scales: three times the work of scaling it."""


class Reader(Protocol):
    """One open file."""

    num_frames: int

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes frames, uint8 (T, H, W, 3). Raises: BadVideo."""
        ...

    def close(self) -> None:
        """Closes the file and frees the decoder's memory."""
        ...


def check_memory(width: int, height: int, memory_bytes: int) -> None:
    """Rejects frames whose decoding cannot fit: codecs report a failed allocation as any error, or crash.

    Args:
        width: of the frames, in pixels; 0 where it is not known.
        height: of the frames, in pixels.
        memory_bytes: that decoding may use.

    Raises: BadVideo(memory).
    """
    need = width * height * BYTES_PER_PIXEL
    if need > memory_bytes:
        raise BadVideo(
            "memory",
            f"frames of {width}x{height} need about {need >> 20} MB to decode, the limit is {memory_bytes >> 20} MB",
        )


# --------------------------------------------------------------------------- decord


class DecordReader:
    """Reader on decord, with one thread: a machine runs several decoders, whose threads would compete."""

    def __init__(self, path: Any, size: tuple[int, int] | None) -> None:
        import decord

        decord.logging.set_level(decord.logging.FATAL)
        options = {"height": size[0], "width": size[1]} if size else {}
        try:
            self._video = decord.VideoReader(path, num_threads=1, **options)
        except (RuntimeError, decord.DECORDError) as error:
            raise BadVideo("unreadable", f"decord: {first_line(error)}") from error
        self._errors = (RuntimeError, decord.DECORDError, IndexError)
        self.num_frames = len(self._video)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes frames, uint8 (T, H, W, 3). Raises: BadVideo."""
        if max(indices) >= self.num_frames:
            raise BadVideo("short", f"frame {max(indices)} asked, {self.num_frames} there")
        try:
            return np.asarray(self._video.get_batch(list(indices)).asnumpy())
        except self._errors as error:
            raise BadVideo("corrupt", f"decord: {first_line(error)}") from error

    def close(self) -> None:
        """Closes the file and frees the decoder's memory."""
        del self._video


# --------------------------------------------------------------------------- PyAV


class PyavReader:
    """Reader on PyAV: opens what decord cannot (AV1), reads remote files by range, rotates by the display matrix."""

    def __init__(self, file: Any, size: tuple[int, int] | None) -> None:
        import av

        self._av = av
        self._size = size
        self._container, self._stream = open_container(file)
        self._pts, self._keys = packet_times(self._container, self._stream)
        if not self._pts:
            raise BadVideo("unreadable", "the container lists no frames")
        self.num_frames = len(self._pts)
        self._decoded: Iterator[Any] | None = None
        self._position = -1
        """Index of the frame decoded last; -1 before the first."""

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Decodes frames, uint8 (T, H, W, 3). Raises: BadVideo."""
        if max(indices) >= self.num_frames:
            raise BadVideo("short", f"frame {max(indices)} asked, {self.num_frames} there")
        pictures: dict[int, np.ndarray] = {}
        try:
            for index in sorted(set(indices)):
                pictures[index] = self._picture(self._frame(index))
        except (self._av.FFmpegError, StopIteration) as error:
            self._decoded = None
            raise BadVideo("corrupt", f"PyAV: {first_line(error)}") from error
        return np.stack([pictures[index] for index in indices])

    def close(self) -> None:
        """Closes the file and frees the decoder's memory."""
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
    """Names PyAV and its version, as the quarantine does."""
    import av

    return f"pyav {av.__version__}"


def open_container(file: Any) -> tuple[Any, Any]:
    """Opens a file or path with PyAV.

    Returns: (container, video stream on one thread).

    Raises: BadVideo(unreadable | no_video_stream).
    """
    import av

    av.logging.set_level(av.logging.PANIC)
    try:
        container = av.open(file)
    except (av.FFmpegError, OSError) as error:
        raise BadVideo("unreadable", f"PyAV: {first_line(error)}") from error
    if not container.streams.video:
        raise BadVideo(
            "no_video_stream", f"streams: {', '.join(s.type for s in container.streams) or 'none'}"
        )
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return container, stream


def packet_times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Lists display times of all frames and of the key frames, sorted, in the stream's time base."""
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


def first_line(error: BaseException) -> str:
    """First line of an error of a codec library, or its type where it has no message."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
