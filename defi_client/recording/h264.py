"""Encoding of frames to H.264 in memory, and joining of finished videos without decoding them.

It uses PyAV outside the platform's decoder processes: it runs on robots and in simulator workers, and opens only what
it wrote itself.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray

GOP = 2
"""Frames from one key frame to the next: training reads single frames out of the middle of files."""
CRF = 12
"""x264's quality; at 64 x 64 pixels a coarser one smears the gripper away."""


class Encoder:
    """Encodes uint8 (H, W, 3) frames, H and W even, as an mp4 in memory: H.264, yuv420p, key frames every GOP frames."""

    def __init__(self, height: int, width: int, fps: int) -> None:
        """Begins a video.

        Args:
            height: of the frames, even.
            width: of the frames, even.
            fps: frames per second.
        """
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4")
        self._stream = cast(Any, self._container.add_stream("libx264", rate=fps))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.codec_context.thread_count = 1  # simulators run side by side already
        # B-frames would make the order of packets differ from that of frames, and joining need it.
        self._stream.options = {"crf": str(CRF), "g": str(GOP), "bf": "0", "preset": "veryfast"}

    def add(self, image: NDArray[np.uint8]) -> None:
        """Appends a frame."""
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """Ends the video. Returns: the mp4."""
        self._container.mux(self._stream.encode())
        self._container.close()
        return self._buffer.getvalue()


def encode_h264(frames: Sequence[NDArray[np.uint8]], fps: int) -> bytes:
    """Encodes frames as an mp4, see `Encoder`.

    Every call with one size and rate gives streams that `Mp4Joiner` can put one after the other.
    """
    height, width = frames[0].shape[:2]
    encoder = Encoder(height, width, fps)
    for image in frames:
        encoder.add(image)
    return encoder.finish()


class Mp4Joiner:
    """Writes one mp4 out of many of the same size, rate and encoder, by copying packets.

    Frame n of the whole file is shown at n / fps exactly.
    """

    def __init__(self, path: Path, fps: int):
        self.path = path
        self.frames = 0
        self.bytes = 0
        self._fps = fps
        self._container = av.open(str(path), "w", format="mp4")
        self._stream: Any = None

    def add(self, video: bytes) -> None:
        """Appends all frames of an mp4 made by `encode_h264`."""
        with av.open(io.BytesIO(video), "r") as source:
            origin = source.streams.video[0]
            if self._stream is None:
                self._stream = _stream_like(self._container, origin)
                # A multiple of the rate, so that every frame's time is a whole number of ticks.
                self._stream.time_base = Fraction(1, self._fps * 128)
            for packet in source.demux(origin):
                if packet.size == 0:
                    continue
                packet.stream = self._stream
                packet.time_base = Fraction(1, self._fps)
                packet.pts = packet.dts = self.frames
                packet.duration = 1
                self._container.mux(packet)
                self.frames += 1
        self.bytes += len(video)

    def close(self) -> None:
        """Writes the index of the file and closes it."""
        self._container.close()


def _stream_like(container: Any, origin: Any) -> Any:
    """A stream of a container with the settings of another; PyAV before 14, for Python 3.8, has another name for it."""
    if hasattr(container, "add_stream_from_template"):
        return container.add_stream_from_template(origin)
    return container.add_stream(template=origin)
