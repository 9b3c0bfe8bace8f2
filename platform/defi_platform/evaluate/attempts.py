"""The finished attempts of a recording on disk, one file each: what an interrupted recording resumes from."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from defi_client.recording.lerobot import Episode, Stats
from defi_platform import storage
from defi_platform.evaluate.resume_guard import bind_settings


@dataclass(frozen=True)
class Attempt:
    """One try of the expert: the unit of work."""

    task: str
    seed: int


class Attempts:
    """The finished attempts of a recording, one file each, so that an interrupted one can be resumed."""

    def __init__(self, folder: str, settings: dict[str, Any], output: str):
        """Lists what is there.

        Args:
            folder: of the attempts; made where there is none.
            settings: of the recording, `tasks` among them.
            output: of the recording, for messages.

        Raises:
            ConfigError: the folder holds attempts of a recording with other settings.
        """
        self.settings = settings
        self._folder = folder
        self._lengths: dict[str, dict[int, int]] = {task: {} for task in settings["tasks"]}
        bind_settings(folder, settings, "a recording", output)
        for name in storage.names(folder):
            if not name.endswith(".npz") or name.startswith("."):
                continue
            task, seed, length = name.removesuffix(".npz").rsplit("_", 2)
            self._lengths[unquote(task)][int(seed)] = int(length)

    def done(self, attempt: Attempt) -> bool:
        """Whether the attempt was made, with or without success."""
        return attempt.seed in self._lengths[attempt.task]

    def succeeded(self, task: str) -> list[int]:
        """Seeds, ascending."""
        return sorted(seed for seed, length in self._lengths[task].items() if length)

    def failed(self, task: str) -> list[int]:
        """Seeds, ascending."""
        return sorted(seed for seed, length in self._lengths[task].items() if not length)

    def add(self, attempt: Attempt, packed: bytes) -> bool:
        """Stores an attempt.

        Returns:
            Whether it succeeded.
        """
        length = _unpack(packed).length
        storage.write_bytes(self._path(attempt, length), packed)
        self._lengths[attempt.task][attempt.seed] = length
        return length > 0

    def episode(self, attempt: Attempt) -> Episode:
        """The stored episode of an attempt that succeeded."""
        return _unpack(storage.read_bytes(self._path(attempt, self._lengths[attempt.task][attempt.seed])))

    def positions(self, attempt: Attempt) -> dict[str, float]:
        """Positions at the start of an attempt that succeeded; {} where its benchmark, or an earlier version, has none."""
        packed = storage.read_bytes(self._path(attempt, self._lengths[attempt.task][attempt.seed]))
        with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
            return {
                name.removeprefix("position/"): float(arrays[name])
                for name in arrays.files
                if name.startswith("position/")
            }

    def delete(self) -> None:
        """Removes all of them."""
        storage.delete(self._folder)

    def _path(self, attempt: Attempt, length: int) -> str:
        # The outcome is in the name, so that a resume needs a listing and no reading.
        return storage.join(self._folder, f"{quote(attempt.task, safe='')}_{attempt.seed}_{length}.npz")


def packed_episode(episode: Episode, positions: Mapping[str, float]) -> bytes:
    """An episode as one file, arrays and nothing else.

    Args:
        episode: of an attempt.
        positions: of its initial state, see `Benchmark.initial_positions`.
    """
    arrays: dict[str, Any] = {"text": np.array(episode.text), "length": np.array(episode.length)}
    arrays |= {f"position/{name}": np.array(value, np.float64) for name, value in positions.items()}
    for camera, video in episode.videos.items():
        arrays[f"video/{camera}"] = np.frombuffer(video, np.uint8)
        for name, value in episode.video_stats[camera].items():
            arrays[f"stats/{camera}/{name}"] = value
    for key, values in episode.vectors.items():
        arrays[f"vector/{key}"] = values
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Episode:
    videos: dict[str, bytes] = {}
    stats: dict[str, Stats] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        for name in arrays.files:
            kind, _, rest = name.partition("/")
            if kind == "video":
                videos[rest] = arrays[name].tobytes()
            elif kind == "stats":
                camera, _, statistic = rest.partition("/")
                stats.setdefault(camera, {})[statistic] = arrays[name]
            elif kind == "vector":
                vectors[rest] = arrays[name]
        return Episode(str(arrays["text"]), videos, stats, int(arrays["length"]), vectors)
