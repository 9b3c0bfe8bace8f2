"""Episodes of a LeRobot dataset for offline evaluation: pictures at any step, states, actions, instruction."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from defi_platform import storage
from defi_platform.config import CorpusConfig
from defi_platform.data.decode.messages import Probe
from defi_platform.data.decode.probe import probe
from defi_platform.data.decode.seek_index import SeekIndex
from defi_platform.data.decode.video_readers import VideoReader
from defi_platform.data.ingest.alignment import place
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.data.manifest.split import hash_position, held_out
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.formats import format_of, listing, read_signals, signal_names
from defi_platform.data.sources.records import RejectedRecord, Signals, VideoRecord
from defi_platform.data.sources.uri import parse
from defi_platform.errors import ConfigError, CorpusError

FORMATS = ("lerobot_v3", "lerobot_v21")
_MEMORY_BYTES = 2 << 30
"""That decoding a picture may need."""


@dataclass(frozen=True)
class Episode:
    """One episode as its dataset lists it."""

    name: str
    text: str
    cameras: Mapping[str, VideoRecord]


@dataclass(frozen=True)
class Dataset:
    """A LeRobot dataset whose episodes have actions."""

    root: str
    source: str
    """Its format."""
    episodes: tuple[Episode, ...]
    """By name."""
    action_names: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """Episode or video -> why it is not used."""

    def held_out(self, share: float) -> tuple[Episode, ...]:
        """Those that a training on this dataset alone leaves out with data.holdout = `share`.

        Copies of a video, which an ingest keeps on one side, are not looked for.
        """
        return self._chosen(held_out(self._positions(), share))

    def held_out_by(self, split: ProjectSplit, corpus: str) -> tuple[Episode, ...]:
        """Those that the trainings of a project hold out.

        Args:
            split: `data.split` of these.
            corpus: name of this dataset in them.

        Raises: CorpusError when they had no such corpus.
        """
        return self._chosen(split.held(corpus, self._positions()))

    def _positions(self) -> NDArray[np.uint64]:
        keys = [next(iter(one.cameras.values())).group or one.name for one in self.episodes]
        return np.array([hash_position(key) for key in keys], np.uint64)

    def _chosen(self, held: NDArray[np.bool_]) -> tuple[Episode, ...]:
        return tuple(episode for episode, chosen in zip(self.episodes, held, strict=True) if chosen)

    def named(self, numbers: Sequence[int]) -> tuple[Episode, ...]:
        """Episodes by their numbers, in the dataset's order.

        Raises:
            ConfigError: a number is named twice, or no usable episode has it.
        """
        by_number = {int(episode.name.rsplit("_", 1)[-1]): episode for episode in self.episodes}
        absent = [number for number in numbers if number not in by_number]
        if absent or len(set(numbers)) < len(numbers):
            known = sorted(by_number)
            raise ConfigError(
                f"episodes is {list(numbers)}; {self.root} has {len(known)} usable ones, {known[0]} to {known[-1]}"
                + (f", and not {', '.join(map(str, absent))}." if absent else "; name each once.")
            )
        return tuple(by_number[number] for number in sorted(numbers))

    def signals(self, episode: Episode) -> Signals:
        """Its actions and states, raw. Raises: CorpusError where they are damaged."""
        record = next(iter(episode.cameras.values()))
        return read_signals(self.source, record.signals_uri, record.episode_id)


def open_dataset(root: str) -> Dataset:
    """Lists a dataset.

    Args:
        root: its folder, local or remote.

    Raises:
        ConfigError: it is of another format.
        CorpusError: it is absent, damaged, or no episode has actions and video.
    """
    source = format_of("dataset", CorpusConfig(path=root))
    if source not in FORMATS:
        raise ConfigError(
            f"dataset: {root} is of the format {source}; offline evaluation reads LeRobot v2.1 and v3.0."
        )
    cameras: dict[str, dict[str, VideoRecord]] = defaultdict(dict)
    left_out: dict[str, str] = {}
    for item in listing(source, root, None):
        if isinstance(item, RejectedRecord):
            left_out[item.video_id] = f"{item.reason}: {item.message}"
        elif isinstance(item, VideoRecord):
            if item.num_actions:
                cameras[item.episode_id][item.camera] = item
            else:
                left_out[item.video_id] = "it has no actions"
    episodes = tuple(
        Episode(name, next(iter(views.values())).text, views) for name, views in sorted(cameras.items())
    )
    if not episodes:
        reasons = "; ".join(sorted(set(left_out.values()))[:3]) or "it lists no episodes"
        raise CorpusError(f"{root} has no episode with video and actions ({reasons}).")
    return Dataset(root, source, episodes, signal_names(source, root).action, left_out)


class Pictures:
    """Reader of the pictures of a dataset's episodes; files that episodes share are opened and checked once."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._files: dict[str, tuple[Probe, VideoReader]] = {}

    def __enter__(self) -> Pictures:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def at(
        self, episode: Episode, camera: str, steps: Sequence[int], length: int
    ) -> Iterator[NDArray[np.uint8]]:
        """Yields the pictures of a camera at some steps, in order: uint8 (H, W, 3).

        Args:
            episode: of the dataset.
            camera: one of its cameras.
            steps: ascending.
            length: steps of the episode, by its actions.

        Raises:
            BadVideo: the file is damaged, or has other frames than its dataset says.
        """
        record = episode.cameras[camera]
        found, reader = self._file(record.uri)
        placed = place(record, found)
        if isinstance(placed, BadVideo):
            raise placed
        if placed.count != length:
            raise BadVideo("short", f"{placed.count} frames for {length} actions")
        for step in steps:
            yield reader.picture(placed.first + step)

    def _file(self, uri: str) -> tuple[Probe, VideoReader]:
        if uri not in self._files:
            path = str(self._open.enter_context(storage.local_copy(parse(uri).path)))
            found = probe(path, _MEMORY_BYTES, False, lambda seconds: None)
            reader = VideoReader(path, SeekIndex.from_bytes(found.seek_index))
            self._open.callback(reader.close)
            self._files[uri] = found, reader
        return self._files[uri]
