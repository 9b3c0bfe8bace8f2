"""Kinds of video files: which combinations of codec, container, groups of pictures and times there are.

`Spec` names one kind of file; `barcodes.write` writes it. `all_specs` lists every legal combination, `covering` a
small selection in which every pair of values meets.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RATE = 25
"""Frames per second, of which MPEG-2 knows only a few."""
HIDDEN = 13
"""Pictures that an edit list hides, as after `ffmpeg -ss 0.52 -c copy`."""

ENCODERS = {
    "h264": "libx264",
    "hevc": "libx265",
    "mpeg4": "mpeg4",
    "mpeg2": "mpeg2video",
    "vp8": "libvpx",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
    "mjpeg": "mjpeg",
    "wmv2": "wmv2",
}
CONTAINERS = {
    "mp4": {"h264", "hevc", "mpeg4", "mpeg2", "vp9", "av1", "mjpeg"},
    "fmp4": {"h264", "hevc", "mpeg4", "mpeg2", "vp9", "av1", "mjpeg"},
    "mkv": {"h264", "hevc", "mpeg4", "mpeg2", "vp8", "vp9", "av1", "mjpeg"},
    "webm": {"vp8", "vp9", "av1"},
    "avi": {"h264", "mpeg4", "mpeg2", "vp8", "mjpeg", "wmv2"},
    "ts": {"h264", "hevc", "mpeg4", "mpeg2"},
    "mpg": {"h264", "mpeg2"},
    "flv": {"h264", "hevc", "vp9", "av1"},
    "wmv": {"wmv2"},
}
"""Container -> codecs that it may hold. `fmp4` is a fragmented mp4; `wmv`, an ASF, is where WMV2 lives."""
SUFFIX = {"fmp4": ".mp4", "faststart": ".mp4", "live": ".mkv"}
"""`faststart` and `live` are beside the matrix: an mp4 with its header in front, a Matroska without index or length."""
REORDERING = {"h264", "hevc", "mpeg4", "mpeg2", "av1"}
"""Codecs with B-frames, or with frames that are decoded and never shown; libvpx hides frames in a second pass only,
which PyAV does not offer."""

EDITS = {
    "end": [(0, 25)],
    "two": [(3, 10), (20, 10)],
    "swap": [(20, 10), (3, 10)],
    "gap": [(0, 10), (-1, 25), (20, 10)],
}
"""Edit list of an mp4: (first picture, pictures) of each part, -1 for a pause."""

FACTORS: dict[str, tuple[Any, ...]] = {
    "codec": tuple(ENCODERS),
    "container": tuple(CONTAINERS),
    "gop": (1, 2, 12, 250),
    "b_frames": (0, 2),
    "refresh": ("closed", "open", "intra"),
    "timing": ("constant", "mild", "jumps", "halves", "held"),
    "start": ("zero", "late", "trim"),
    "width": (64, 160, 640),
}
"""Field of a `Spec` -> its values in the matrix."""


@dataclass(frozen=True)
class Spec:
    """One kind of file."""

    codec: str = "h264"
    container: str = "mp4"
    gop: int = 12
    b_frames: int = 0
    """B-frames between two others; for AV1 not 0 means reordered frames, some of them never shown."""
    refresh: str = "closed"
    """closed | open: pictures before a key frame refer to pictures after it, and across it | intra: by columns, with no
    further key frame."""
    timing: str = "constant"
    """constant | mild: a tenth of a frame early or late | jumps: pauses of 3 s | halves: half at 25 and half at 17.5
    frames per second | held: the last picture stays for 4 s | twins: every two pictures have one time | fast: 240
    frames per second | slow: one in 20 s."""
    start: str = "zero"
    """zero | late: at 5 s | trim: an edit list hides the first 13 pictures | cut: the first 7 packets are missing, so
    that the file begins between two key frames | wrap: the 33 bits of MPEG's clock run over in the middle | again: the
    whole file is there twice | end, two, swap, gap: an mp4 with the parts of `EDITS`."""
    width: int = 160
    """Pixels of the picture as it is stored; three quarters as high."""
    frames: int = 40
    """Pictures encoded; an edit list hides some."""
    pixels: str = "yuv420p"
    matrix: tuple[int, int, int, int] = (1, 0, 0, 1)
    """a, b, c, d: the picture's point (x, y) is shown at (a x + c y, b x + d y), as in an mp4's track header."""
    cover: str = ""
    """first | last: which stream holds a picture of the file's cover; empty: none."""
    still: int = 1
    """Pictures in a row that look the same and carry the number of the first of them."""
    interlaced: bool = False
    """Encoded as fields."""
    sound: bool = False
    """There is a sound track, which begins with the picture and lasts 2 s longer."""

    @property
    def height(self) -> int:
        """Pixels of the picture as it is stored."""
        return self.width * 3 // 4

    @property
    def hidden(self) -> int:
        """Pictures that the container says are not shown."""
        return HIDDEN if self.start == "trim" else 0

    def number(self, picture: int) -> int:
        """What a picture of the file carries."""
        return picture // self.still * self.still

    @property
    def suffix(self) -> str:
        """Of the file's name."""
        return SUFFIX.get(self.container, f".{self.container}")

    def __str__(self) -> str:
        """What differs from an H.264 mp4 of constant rate, as a name of a file."""
        parts = [self.codec, self.container, f"g{self.gop}"]
        parts += [f"b{self.b_frames}"] if self.b_frames else []
        parts += [part for part in (self.refresh, self.timing, self.start) if part not in ORDINARY]
        parts += [f"w{self.width}", f"n{self.frames}"]
        parts += [self.pixels] if self.pixels != "yuv420p" else []
        parts += ["m" + "".join("-0+"[sign + 1] for sign in self.matrix)] if self.matrix != UPRIGHT else []
        parts += [f"cover-{self.cover}"] if self.cover else []
        parts += [f"still{self.still}"] if self.still > 1 else []
        return "_".join(parts + [name for name in ("interlaced", "sound") if getattr(self, name)])


ORDINARY = {"closed", "constant", "zero"}
UPRIGHT = (1, 0, 0, 1)


# --------------------------------------------------------------------------- which files there are


def is_legal(spec: Spec) -> bool:
    """Whether codec, container and encoder can make such a file."""
    codec, container = spec.codec, spec.container
    if codec not in CONTAINERS[container]:
        return False
    if spec.b_frames and (spec.gop == 1 or codec not in REORDERING):
        return False
    if codec == "mjpeg" and spec.gop != 1:
        return False
    if spec.refresh == "open" and (codec not in ("h264", "hevc", "mpeg2") or not spec.b_frames):
        return False
    if spec.refresh == "intra" and (codec not in ("h264", "hevc") or spec.b_frames or spec.gop < 12):
        return False
    if container == "avi" and (spec.timing != "constant" or spec.start == "late"):
        # It has no times, only a rate.
        return False
    if spec.timing == "held" and container not in ("mp4", "fmp4", "mkv", "webm"):
        return False
    return spec.start != "trim" or container == "mp4"


def all_specs() -> list[Spec]:
    """The whole matrix: every legal combination of `FACTORS`."""
    values = itertools.product(*FACTORS.values())
    specs = (Spec(**dict(zip(FACTORS, chosen, strict=True))) for chosen in values)
    return [_long_enough(spec) for spec in specs if is_legal(spec)]


def _long_enough(spec: Spec) -> Spec:
    """With 250 pictures between key frames a small video gets a second group."""
    return dataclasses.replace(spec, frames=290) if spec.gop == 250 and spec.width == 64 else spec


def extra_specs() -> list[Spec]:
    """What is beside the matrix, such as orientations, formats of pixels, sound, files that were cut or joined."""
    signs = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [
        (0, b, c, 0) for b in (1, -1) for c in (1, -1)
    ]
    specs = [Spec(matrix=matrix, width=width) for matrix in signs if matrix != UPRIGHT for width in (64, 160)]
    specs += [Spec(codec="hevc", b_frames=2, matrix=(0, 1, -1, 0), gop=2)]
    specs += [Spec(cover=cover) for cover in ("first", "last")] + [Spec(cover="last", container="mkv")]
    cut = [("h264", c) for c in ("ts", "mkv", "avi", "flv")] + [
        ("hevc", "ts"),
        ("mpeg4", "mkv"),
        ("mpeg2", "mpg"),
    ]
    specs += [Spec(codec=codec, container=c, start="cut", b_frames=b) for codec, c in cut for b in (0, 2)]
    h264 = ("yuv420p10le", "yuv444p", "yuv422p", "gray", "yuvj420p", "yuvj444p")
    specs += [Spec(pixels=pixels, b_frames=2) for pixels in h264]
    specs += [
        Spec(codec="hevc", pixels=p, b_frames=2) for p in ("yuv420p10le", "yuv444p", "gray", "yuv444p12le")
    ]
    specs += [Spec(codec="av1", pixels="yuv420p10le"), Spec(codec="vp9", container="webm", pixels="yuv444p")]
    specs += [Spec(codec="mjpeg", container="avi", gop=1, pixels="yuvj422p")]
    others = [("h264", c) for c in ("mov", "3gp", "faststart", "live")] + [("hevc", "mov"), ("mpeg4", "3gp")]
    specs += [Spec(codec=codec, container=c, b_frames=2) for codec, c in others]
    twins = [("h264", "mkv"), ("mpeg4", "mkv"), ("vp9", "webm")]
    specs += [Spec(codec=codec, container=c, timing="twins") for codec, c in twins]
    calm = [
        ("mpeg4", "avi"),
        ("h264", "avi"),
        ("h264", "flv"),
        ("mpeg2", "mpg"),
        ("mpeg2", "ts"),
        ("hevc", "mp4"),
    ]
    specs += [Spec(codec=codec, container=c, b_frames=2, still=20, frames=70) for codec, c in calm]
    specs += [Spec(codec="wmv2", container="wmv", still=9), Spec(container="ts", b_frames=2, still=9)]
    specs += [Spec(container=c, timing=t, b_frames=2) for c in ("mp4", "mkv") for t in ("fast", "slow")]
    specs += [
        Spec(codec=codec, b_frames=2, refresh="open", start=e) for codec in ("h264", "hevc") for e in EDITS
    ]
    specs += [Spec(codec="mpeg2", container=c, b_frames=2, start="again") for c in ("ts", "mpg")]
    specs += [Spec(container="ts", b_frames=2, start="again")]
    specs += [Spec(codec=codec, container=c, start="wrap") for codec, c in (("h264", "ts"), ("mpeg2", "mpg"))]
    specs += [Spec(container=c, interlaced=True, b_frames=2) for c in ("mp4", "ts", "avi")]
    specs += [Spec(codec="mpeg2", container=c, interlaced=True, b_frames=2) for c in ("mpg", "ts")]
    specs += [Spec(container=c, sound=True, b_frames=2) for c in ("mp4", "mkv", "avi", "ts")]
    specs += [Spec(sound=True, start="trim", b_frames=2), Spec(container="mkv", sound=True, start="late")]
    return specs


def covering(specs: Sequence[Spec], dear: float = 2.0) -> list[Spec]:
    """A few of `specs`, in which every two values meet that meet in any of them.

    Args:
        specs: to choose from, such as `all_specs()`.
        dear: by how much a wide video counts as dearer than a narrow one.
    """
    pairs: dict[tuple[int, Any, int, Any], int] = {}
    names = list(FACTORS)
    columns = [
        [
            pairs.setdefault((i, getattr(spec, names[i]), j, getattr(spec, names[j])), len(pairs))
            for i, j in itertools.combinations(range(len(names)), 2)
        ]
        for spec in specs
    ]
    has = np.zeros((len(specs), len(pairs)), np.float32)
    for row, met in zip(has, columns, strict=True):
        row[met] = 1
    price = np.array([1 + dear * (spec.width == 640) + (spec.frames > 100) for spec in specs], np.float32)
    missing = np.ones(len(pairs), np.float32)
    chosen = []
    while missing.any():
        best = int(np.argmax(has @ missing / price))
        chosen.append(specs[best])
        missing[has[best] > 0] = 0
    return chosen
