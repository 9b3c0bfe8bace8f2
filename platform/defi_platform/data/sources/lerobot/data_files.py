"""Parquet files with the rows of LeRobot episodes: which of them holds an episode, whatever the index says."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.sources.records import Files
from defi_platform.data.tables.mmap_table import to_numpy
from defi_platform.storage.parallel_read import side_by_side

EPISODE = "episode_index"

DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, StopIteration, RuntimeError)


class DataFiles:
    """The files below `data/`, by the episodes they hold.

    Only their ends are read, where the smallest and the largest episode of each file stand; the column itself where
    these are not enough.

    Args:
        root: of the dataset.
        files: below it.
    """

    def __init__(self, root: str, files: Files) -> None:
        self._names = [name for name in files if name.startswith("data/") and name.endswith(".parquet")]
        self._files = files
        self._remote = storage.is_remote(root)
        self._episodes = functools.lru_cache(maxsize=4)(_episodes_and_tasks)

    def holding(self, named: str | None, episode: int) -> str | None:
        """Name of the file with the rows of an episode.

        Args:
            named: where the index puts it, if anywhere.
            episode: its index.

        Returns: `named` where no file is known to hold the episode.
        """
        names, position, low, high = self._ranges
        at = position.get(named or "")
        if at is not None and low[at] <= episode <= high[at]:
            return named
        for number in np.flatnonzero((low <= episode) & (episode <= high)).tolist():
            if episode in self.tasks(names[number]):
                return names[number]
        return named

    def tasks(self, name: str) -> dict[int, int]:
        """Index of each episode in a file -> the `task_index` of its first row, -1 where there is none."""
        try:
            return self._episodes(self._files[name].uri)
        except DAMAGE:
            return {}

    @functools.cached_property
    def _ranges(self) -> tuple[list[str], dict[str, int], np.ndarray, np.ndarray]:
        """Files that can be read: names, number by name, smallest and largest episode."""
        uris = (self._files[name].uri for name in self._names)
        spans = [span for _, span in side_by_side(_range, uris, self._remote)]
        found = [(name, *span) for name, span in zip(self._names, spans, strict=True) if span is not None]
        names = [name for name, _, _ in found]
        low, high = (np.array([entry[at] for entry in found], np.int64) for at in (1, 2))
        return names, {name: number for number, name in enumerate(names)}, low, high


def open_parquet(source: str) -> pq.ParquetFile:
    """Opens a Parquet file so that only what is asked of it is read; the caller closes it."""
    return pq.ParquetFile(storage.open_seekable(source))


def _range(uri: str) -> tuple[int, int] | None:
    try:
        with open_parquet(uri) as file:
            groups = list(_group_ranges(file))
        known = [span for span in groups if span is not None]
        if groups and len(known) == len(groups):
            return min(low for low, _ in known), max(high for _, high in known)
        episodes = _episodes_and_tasks(uri)
        return min(episodes), max(episodes)
    except storage.StorageError:
        raise
    except DAMAGE:
        return None  # whoever reads the signals of its episodes says what is wrong


def _group_ranges(file: pq.ParquetFile) -> Iterator[tuple[int, int] | None]:
    column = next(n for n in range(len(file.schema)) if file.schema.column(n).path == EPISODE)
    for number in range(file.metadata.num_row_groups):
        found = file.metadata.row_group(number).column(column).statistics
        known = found is not None and found.has_min_max
        yield (int(found.min), int(found.max)) if known else None


def _episodes_and_tasks(uri: str) -> dict[int, int]:
    with open_parquet(uri) as file:
        names = [name for name in (EPISODE, "task_index") if name in file.schema_arrow.names]
        table = file.read(columns=names)
    episodes, first = np.unique(to_numpy(table.column(EPISODE)), return_index=True)
    tasks = np.full(len(episodes), -1)
    if "task_index" in names:
        tasks = to_numpy(table.column("task_index"))[first]
    return dict(zip(episodes.tolist(), tasks.tolist(), strict=True))
