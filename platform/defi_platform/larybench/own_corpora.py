"""Rows of LARYBench's tasks from labelled corpora of one's own: consecutive pairs with actions, or videos with texts."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from defi_platform.config import DataConfig
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.loader.sample_decoder import decode_job
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import BadVideo
from defi_platform.larybench.layout import REGRESSION, Layout, Row

FRAMES = 9
"""Of a video, for classification: as many as LARYBench takes."""


@dataclass(frozen=True)
class Video:
    """A video's rows and what a latent action is inferred from."""

    rows: list[Row]
    """Without `la_path`: of each pair, or one of the whole video."""
    frames: np.ndarray
    """uint8 (T, H, W, 3)."""
    text: str
    """Instruction, where it is not the label; else ""."""


def videos_of(manifest: Manifest, data: DataConfig, split: str, layout: Layout) -> Iterator[Video | BadVideo]:
    """Yields the videos of a split, and writes pictures and actions of the pairs of a regression.

    Videos of less than a pair and, for a regression, without actions are left out, as the manifest says of them.

    Args:
        manifest: of the corpora in `data`.
        data: size of the frames, limits of the decoders, cameras.
        split: train | validation.
        layout: of the export.
    """
    rows = [row for row in range(len(manifest)) if _wanted(manifest.row(row), data, split, layout)]
    frames = [_numbers(manifest.row(row)["num_frames"], layout) for row in rows]
    reader = SignalReader()
    with DecoderPool(data.decode) as pool:
        jobs = (decode_job(manifest, data, row, of) for row, of in zip(rows, frames, strict=True))
        for row, numbers, found in zip(rows, frames, pool.run(jobs), strict=True):
            if isinstance(found, BadVideo):
                yield found
                continue
            assert isinstance(found, np.ndarray)
            video = manifest.row(row)
            if layout.task == REGRESSION:
                actions = reader.of_row(manifest, row).actions
                yield Video(_pairs(layout, video, numbers, found, actions), found, video["text"] or "")
            else:
                # Of the file, which may hold more than this video.
                indices = ",".join(str(video["first_frame"] + number) for number in numbers)
                yield Video(
                    [{"video_path": video["uri"], "sample_indices": indices, "action": video["text"]}],
                    found,
                    "",
                )


def _wanted(video: Row, data: DataConfig, split: str, layout: Layout) -> bool:
    cameras = data.corpora[video["corpus"]].cameras
    if video["split"] != split or (cameras and not cameras.get(video["camera"], 0)):
        return False
    if layout.task == REGRESSION:
        return bool(int(video["num_actions"]) > layout.stride and int(video["num_frames"]) > layout.stride)
    return bool(video["text"]) and int(video["num_frames"]) >= FRAMES


def _numbers(num_frames: int, layout: Layout) -> list[int]:
    if layout.task == REGRESSION:
        return list(range(0, num_frames, layout.stride))
    return [int(number) for number in np.rint(np.linspace(0, num_frames - 1, FRAMES))]


def _pairs(
    layout: Layout, video: Row, numbers: list[int], frames: np.ndarray, actions: np.ndarray
) -> list[Row]:
    """Rows of consecutive frames of a video; their pictures and actions are written."""
    folder = f"{layout.task}/{layout.dataset}"
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in video["video_id"])
    # Corpora share ids, and ids that differ may be written alike.
    apart = hashlib.sha256(f"{video['corpus']}\0{video['video_id']}".encode()).hexdigest()[:8]
    name = f"{layout.split}/{plain}-{apart}"
    pictures = [f"{folder}/images/{name}/frame_{number:06d}.png" for number in numbers]
    for path, frame in zip(pictures, frames, strict=True):
        layout.write_picture(path, frame)
    rows: list[Row] = []
    for place, (first, last) in enumerate(itertools.pairwise(numbers)):
        taken = np.asarray(actions[first:last], np.float32)
        if len(taken) < layout.stride:
            break
        path = f"{folder}/actions/{name}/action_{first:06d}to{last - 1:06d}.npy"
        layout.write_array(path, taken)
        rows.append({"src_img": pictures[place], "tgt_img": pictures[place + 1], "action": path})
    return rows
