"""Encoding of frames to H.264 in memory, and joining of finished videos without decoding them.

It uses PyAV outside the decoder processes: it runs in simulator workers, and opens only what it wrote itself.
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


def encode_h264(frames: Sequence[NDArray[np.uint8]], fps: int) -> bytes:
    """Encodes uint8 (H, W, 3) frames, H and W even, as an mp4: H.264, yuv420p, key frames every GOP frames.

    Every call with one size and rate gives streams that `Mp4Joiner` can put one after the other.
    """
    height, width = frames[0].shape[:2]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = cast(Any, container.add_stream("libx264", rate=fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # simulators run side by side already
        # B-frames would make the order of packets differ from that of frames, and joining need it.
        stream.options = {"crf": str(CRF), "g": str(GOP), "bf": "0", "preset": "veryfast"}
        for image in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


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
                self._stream = self._container.add_stream_from_template(origin)
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
