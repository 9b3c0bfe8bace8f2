"""Frames of LARYBench's rows: pairs of picture files, or numbered frames of a video."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, UnidentifiedImageError

from defi_platform import storage
from defi_platform.config import DecodeConfig
from defi_platform.data.decode.messages import DecodeJob, Probe, ProbeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.decode.resize import resize
from defi_platform.data.rejection import BadVideo
from defi_platform.errors import ConfigError
from defi_platform.larybench.layout import Row

PAIR = ("src_img", "tgt_img")
VIDEO = ("video_path", "sample_indices")
BELOW = ("", "images")
"""Folders below the given one that paths of pictures may be relative to: CALVIN's are in `images`."""


Frames = tuple[int, "np.ndarray | BadVideo"]
"""Place of a row among those given, and its frames uint8 (T, H, W, 3) or why there are none."""


def frames_of_pairs(rows: Sequence[Row], folder: str, size: tuple[int, int]) -> Iterator[Frames]:
    """Yields the two frames of each row.

    Args:
        rows: with `PAIR`.
        folder: that their paths are relative to.
        size: (H, W).
    """
    for place, row in enumerate(rows):
        try:
            yield place, np.stack([_picture(folder, row[name], size) for name in PAIR])
        except FileNotFoundError as error:
            yield place, BadVideo("missing", str(error))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            yield place, BadVideo("corrupt", f"{row[PAIR[0]]}, {row[PAIR[1]]}: {error}")


def _picture(folder: str, path: str, size: tuple[int, int]) -> np.ndarray:
    for below in BELOW:
        try:
            packed = storage.read_bytes(storage.join(folder, *filter(None, (below, path))))
        except FileNotFoundError:
            continue
        return resize(Image.open(io.BytesIO(packed)).convert("RGB"), size)
    raise FileNotFoundError(f"{path} is neither in {folder} nor in its folder {BELOW[-1]}")


def frames_of_videos(
    rows: Sequence[Row], folder: str, size: tuple[int, int], decode: DecodeConfig
) -> Iterator[Frames]:
    """Yields the numbered frames of each row; those of short videos last.

    A number after the video's last frame stands for the last one, as in LARYBench.

    Args:
        rows: with `VIDEO`.
        folder: that their paths are relative to.
        size: (H, W).
        decode: limits of the decoder processes.
    """
    jobs = {place: _job(row, folder, size) for place, row in enumerate(rows)}
    with DecoderPool(decode) as pool:
        short = []
        for (place, job), found in zip(jobs.items(), pool.run(jobs.values()), strict=True):
            if isinstance(found, BadVideo) and found.reason == "short":
                short.append((place, job))
            else:
                assert isinstance(found, np.ndarray | BadVideo)
                yield place, found
        cut: dict[int, DecodeJob] = {}
        probes = pool.run(ProbeJob(job.uri) for _, job in short)
        for (place, job), found in zip(short, probes, strict=True):
            if isinstance(found, BadVideo):
                yield place, found
            else:
                assert isinstance(found, Probe)
                last = found.num_frames - 1
                cut[place] = replace(job, indices=tuple(min(index, last) for index in job.indices))
        for place, found in zip(cut, pool.run(cut.values()), strict=True):
            assert isinstance(found, np.ndarray | BadVideo)
            yield place, found


def _job(row: Row, folder: str, size: tuple[int, int]) -> DecodeJob:
    path, numbers = (row[name] for name in VIDEO)
    try:
        indices = tuple(max(0, int(number)) for number in numbers.split(","))
    except ValueError as error:
        raise ConfigError(
            f"metadata: {VIDEO[1]} of {path} is {numbers!r}; it is frame numbers with commas between."
        ) from error
    if len(indices) < 2:
        raise ConfigError(f"metadata: {VIDEO[1]} of {path} is {numbers!r}; two frames are needed at least.")
    return DecodeJob(storage.join(folder, path), indices, *size)
