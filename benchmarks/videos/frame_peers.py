"""Other readers of video, asked for numbered frames: `python frame_peers.py decord|lerobot`, a line in, a line out.

A line in is JSON: `path`, `jobs` (lists of frame numbers) and `times` (seconds of every frame from the first on). A
line out is a list with an answer per job: the numbers read from the frames, or the error as a text. Runs under the
Python that has the reader, which needs PyAV too, and is a process of its own because readers crash.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[2] / "tests" / "data"))
from barcode_specs import RATE
from barcodes import number_of

Take = Callable[[Sequence[int]], Any]
"""Frames (T, H, W, 3) uint8 of some frame numbers."""


def by_decord(path: str, times: Sequence[float]) -> Take:
    """A reader per file; frames by number."""
    import decord

    decord.logging.set_level(decord.logging.FATAL)
    reader = decord.VideoReader(path, num_threads=1)
    return lambda indices: reader.get_batch(list(indices)).asnumpy()


def by_lerobot(path: str, times: Sequence[float]) -> Take:
    """LeRobot's own function for a dataset's frames, which takes seconds; it may be half a frame off without error."""
    _without_torchvision()
    from lerobot.datasets.video_utils import decode_video_frames

    def take(indices: Sequence[int]) -> np.ndarray:
        seconds = [times[index] for index in indices]
        frames = decode_video_frames(path, seconds, tolerance_s=0.5 / RATE, backend="torchcodec")
        return np.asarray((frames * 255).round().byte().permute(0, 2, 3, 1))

    return take


def _without_torchvision() -> None:
    """LeRobot imports torchvision, whose wheel has to match torch's; this way of decoding never calls it."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        module = types.ModuleType("torchvision")
        module.__spec__ = importlib.machinery.ModuleSpec("torchvision", None)
        sys.modules["torchvision"] = module


READERS = {"decord": by_decord, "lerobot": by_lerobot}


def answers(reader: str, path: str, jobs: Sequence[Sequence[int]], times: Sequence[float]) -> list[Any]:
    """One per job: numbers, or an error as a text.

    Args:
        reader: a name in `READERS`.
        path: of the file.
        jobs: frame numbers of each.
        times: seconds of every frame.
    """
    try:
        take = READERS[reader](path, times)
    except Exception as error:  # noqa: BLE001 - whatever a peer says counts as its answer
        return [_text(error)] * len(jobs)
    found: list[Any] = []
    for job in jobs:
        try:
            found.append([number_of(frame) for frame in take(job)])
        except Exception as error:  # noqa: BLE001
            found.append(_text(error))
    return found


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:200]}"


def main() -> None:
    """Answers until its input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        found = answers(sys.argv[1], job["path"], job["jobs"], job["times"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
