"""Reader of video files: frames by their number, exactly as sequential decoding counts them.

The probe opens files through this module; `defi_client.recording.h264` is the only other one that imports PyAV. It runs inside decoder
processes that may be killed at any moment, so it imports neither Ray nor torch. H height, W width; pictures are RGB uint8.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from defi_platform.data.decode.seek_index import NO_PTS, UNINDEXED, SeekIndex, SeekPoint
from defi_platform.data.rejection import BadVideo

BYTES_PER_PIXEL = 16
"""Working memory of a decoder per pixel: reference pictures, the picture itself, its RGB and its scaling copy."""

SCALING_THREADS = 1
"""By default PyAV starts a thread per core for every single picture it converts: three times the work of it."""

CRC_ROWS = 3
"""Every so manieth row of a picture is taken into its checksum; an odd number, so that both fields of interlaced ones are."""

SEEKS = 3
"""Points that are tried before a file is decoded from its start."""

CODECS = ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mjpeg")
"""Codecs of robots' and the web's videos, by FFmpeg's names."""

EVER = 1 << 62
"""Beyond every frame; the position of a reader after a seek that led elsewhere."""

FORMATS = (
    "mov,matroska,avi,mpegts,mpegtsraw,mpeg,mpegvideo,flv,live_flv,asf,asf_o,ogg,ivf,obu,h264,hevc,vvc,m4v,h263,h261,"
    "mjpeg,mjpeg_2000,mxf,mxf_opatom,nut,rm,dv,wtv,gxf,yuv4mpegpipe,gif,apng,nsv,swf,vc1,cavsvideo,dirac,ty,"
    "dhav,kux,pva,nuv,cine,flic,roq,film_cpk,"
    "mp3,wav,flac,aac"
)
"""Containers that hold their pictures (or, to be named as such, sound) themselves. Playlists and the like, which name
other files, are not opened, whatever they are called."""


class Reader(Protocol):
    """One open file."""

    def picture(self, index: int) -> Any:
        """Reads one frame in its own size, upright: uint8 (H, W, 3) or a Pillow image of it. Raises: BadVideo."""
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


class VideoReader:
    """Reader of a video file on PyAV.

    A seek is trusted only where the picture after it is the one that the probe saw there; else the reader goes to an
    earlier point, and at last decodes from the start, which is right by definition.

    Args:
        file: path, or a seekable file object.
        index: of the file; without one it is decoded from its start.
    """

    def __init__(self, file: Any, index: SeekIndex = UNINDEXED) -> None:
        self._file = file
        self._index = index
        self._shape, self._orientation = index.shape, index.orientation
        self._useless: set[int] = set()
        """Frames of points that did not lead to them."""
        self._until = EVER
        """First frame that decoding on does not give for certain."""
        self._sought = False
        """Whether it stands where a seek led it."""
        self._container: Any = None
        self._frames: Iterator[Any] = iter(())
        self._frame: Any = None
        self._position = -1
        """Number of the frame decoded last."""
        self._to_rgb = _new_reformatter()
        self._start()

    def use(self, index: SeekIndex) -> None:
        """Takes another part of the file's index: episodes that share a file have one each."""
        self._index = index

    def picture(self, index: int) -> np.ndarray:
        """Decodes one frame in its own size, upright: uint8 (H, W, 3). Raises: BadVideo."""
        import av

        try:
            frame = self._frame_at(index)
            height, width = self._shape
            rgb = self._to_rgb.reformat(frame, width, height, "rgb24", threads=SCALING_THREADS).to_ndarray()
        except av.FFmpegError as error:
            raise BadVideo(*damage(error, f"frame {index}")) from error
        return upright(rgb, self._orientation)

    def close(self) -> None:
        """Closes the file and frees the decoder's memory."""
        # The decoding generator and its container refer to each other, so memory would wait for the collector.
        self._frames, self._frame = iter(()), None
        self._container.close()

    def jump(self, point: SeekPoint) -> bool:
        """Seeks to a point. Returns: whether the picture there is the right one."""
        landing: list[Any] = []
        frames = seek(self._container, self._stream, self._index.by, point.target, landing)
        try:
            for _ in range(point.drop):
                next(frames)
            frame = next(frames)
        except _ffmpeg_errors():
            return False
        if luma_crc(frame) != point.crc:
            return False
        if point.pts == NO_PTS:
            if getattr(landing[0], self._index.by) != point.target:
                return False
        elif frame.pts != point.pts:
            return False
        self._frames, self._frame, self._position = frames, frame, point.frame
        self._until, self._sought = point.until or EVER, True
        return True

    def _start(self) -> None:
        """Opens the file, anew where it is open."""
        if self._container is not None:
            self.close()
        if hasattr(self._file, "seek"):
            self._file.seek(0)
        self._container, self._stream = open_container(self._file, self._index.container)
        self._frames = decoded(self._container, self._stream)
        self._frame, self._position, self._until, self._sought = None, -1, EVER, False

    def _frame_at(self, index: int) -> Any:
        if index == self._position:
            return self._frame
        self._approach(index)
        sought = self._sought
        try:
            found = self._advance(index)
        except _ffmpeg_errors():
            if not sought:
                raise
            found = False
        if not found and sought:
            # What comes after a seek may end early where the container's clock begins anew.
            self._start()
            found = self._advance(index)
        if not found:
            there = self._position + 1
            self._start()
            raise BadVideo("short", f"frame {index} asked, {there} there")
        return self._frame

    def _advance(self, index: int) -> bool:
        """Decodes on to a frame. Returns: whether there is one."""
        while self._position < index:
            frame = next(self._frames, None)
            if frame is None:
                return False
            self._frame, self._position = frame, self._position + 1
            if self._position == 0:
                # Also where the index says another: it is of a file that has been replaced since.
                self._shape, self._orientation = (frame.height, frame.width), orientation(frame)
        return True

    def _approach(self, index: int) -> None:
        """Goes to the nearest place at or before a frame from where it can be decoded."""
        here = self._position <= index < self._until
        tried = 0
        for number in range(self._index.before(index) - 1, -1, -1):
            point = self._index.point(number)
            if here and (point.frame <= self._position or (point.frame == 0 and self._position < 0)):
                return
            if point.frame in self._useless or 0 < point.until <= index:
                continue
            if self.jump(point):
                return
            self._useless.add(point.frame)
            here, self._position = False, EVER
            tried += 1
            if tried == SEEKS:
                break
        if not here:
            self._start()


def open_container(file: Any, container: str = "") -> tuple[Any, Any]:
    """Opens a file or path with PyAV.

    Args:
        file: path, or a seekable file object.
        container: FFmpeg's name of what it is; "": find out.

    Returns: (container, video stream on one thread).

    Raises: BadVideo(unreadable | no_video_stream).
    """
    import av

    av.logging.set_level(av.logging.PANIC)
    # A bare path with a colon would be taken for a protocol.
    source = f"file:{file}" if isinstance(file, str) else file
    try:
        opened = av.open(source, format=container or None, options={"format_whitelist": FORMATS})
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadVideo("unreadable", f"PyAV: {first_line(error)}") from error
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in opened.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(stream.type for stream in opened.streams) or "none"
        opened.close()
        raise BadVideo("no_video_stream", f"streams: {kinds}")
    stream = streams[0]
    if stream.codec_context is None:
        opened.close()
        raise BadVideo("unreadable", "PyAV has no decoder for its codec")
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return opened, stream


def decoded(container: Any, stream: Any, landing: list[Any] | None = None) -> Iterator[Any]:
    """Yields the frames from where the container stands on, in the order of their display.

    What cannot be decoded before the first frame is passed over, as FFmpeg does: a recording may begin between two
    key frames. Later damage is raised.

    Args:
        container: open.
        stream: of it.
        landing: takes the first packet.
    """
    import av

    begun = False
    for packet in container.demux(stream):
        if landing is not None and not landing:
            landing.append(packet)
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if begun:
                raise
            continue
        for frame in frames:
            begun = True
            yield frame


def seek(container: Any, stream: Any, by: str, target: int, landing: list[Any]) -> Iterator[Any]:
    """Seeks, and yields frames from there on.

    Args:
        container: open.
        stream: of it.
        by: one of `seek_index.BY`.
        target: as `by` says.
        landing: takes the first packet.
    """
    if by == "pos":
        container.seek(target, stream=stream, unsupported_byte_offset=True)
    else:
        container.seek(target, stream=stream, backward=True)
    yield from decoded(container, stream, landing)


def content_hash(checksums: Sequence[int]) -> int:
    """`Probe.content` of the checksums of all pictures of a video; 0 for a still one, as of a camera that is off."""
    if len(set(checksums)) < 2:
        return 0
    return int.from_bytes(hashlib.blake2b(array("Q", checksums).tobytes(), digest_size=8).digest(), "big")


def luma_crc(frame: Any) -> int:
    """Checksum by which a decoded frame is recognised: of every `CRC_ROWS`-th row of its first plane."""
    return _plane_crc(frame, frame.planes[0], CRC_ROWS, 0)


def picture_crc(frame: Any) -> int:
    """Checksum of all planes of a decoded frame."""
    crc = 0
    for plane in frame.planes:
        crc = _plane_crc(frame, plane, 1, crc)
    return crc


def _plane_crc(frame: Any, plane: Any, every: int, crc: int) -> int:
    form = frame.format
    bits = (
        (form.components[0].bits + 7) & ~7
        if form.is_planar or not form.components
        else form.padded_bits_per_pixel
    )
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height : every]
    # What lies behind a row's last pixel is padding.
    return zlib.crc32(rows[:, : min(plane.line_size, plane.width * bits // 8)].tobytes(), crc)


def orientation(frame: Any) -> int:
    """Turn of a frame for display: 4 (rows and columns swapped) + 2 (upside down) + 1 (left to right).

    The two flips follow the swap. Other angles than quarter turns are taken for the nearest one.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d = map(int, struct.unpack_from("=5i", bytes(matrix)))
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return 2 * int(d < 0) + int(a < 0)
    return 4 + 2 * int(b < 0) + int(c < 0)


def upright(picture: np.ndarray, turn: int) -> np.ndarray:
    """Turns a picture as `orientation` says. Returns: a view."""
    if turn & 4:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]


def pyav_release() -> str:
    """Names PyAV and its version, as the quarantine does."""
    import av

    return f"pyav {av.__version__}"


def missing_codecs() -> list[str]:
    """Those of `CODECS` that this PyAV cannot decode."""
    from av.codec.codec import Codec, UnknownCodecError

    def is_missing(name: str) -> bool:
        try:
            Codec(name, "r")
        except UnknownCodecError:
            return True
        return False

    return [name for name in CODECS if is_missing(name)]


def damage(error: Exception, where: str) -> tuple[str, str]:
    """(reason, message) of a codec library's error."""
    reason = "memory" if getattr(error, "errno", None) == 12 else "corrupt"
    return reason, f"{where}: PyAV: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """First line of an error of a codec library, or its type where it has no message."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _ffmpeg_errors() -> tuple[type[Exception], ...]:
    import av

    return (av.FFmpegError, StopIteration)


def _new_reformatter() -> Any:
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()
