"""A file with the actions and states of all steps of a corpus: mapped where it is local, else read in parts.

Arrow IPC with the columns `action` and, where there are states, `state`, both fixed-size lists of float32. Every batch
but the last has `BATCH_ROWS` rows, so the batch of a row is known without a search.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from defi_platform import storage
from defi_platform.data.tables.mmap_table import to_numpy
from defi_platform.errors import CorpusError

BATCH_ROWS = 4096

BATCHES_KEPT = 64
"""Batches of a remote file that stay in memory."""

Steps = tuple[np.ndarray, np.ndarray]
"""Actions (n, A) and states (n, P) of n steps, float32; P may be 0."""


@dataclass(frozen=True)
class SignalLayout:
    """Widths and names of the actions and states of a corpus."""

    action_dim: int
    state_dim: int
    """0: it has no states."""
    action_names: tuple[str, ...] = ()
    """() where the corpus gives none."""
    state_names: tuple[str, ...] = ()
    state_centres: tuple[float, ...] = ()
    """Mean direction of each entry of the states, taken for an angle in radians: one that needs no jump starts there."""


def write_signals(path: Path, layout: SignalLayout, episodes: Iterable[Steps]) -> None:
    """Writes the steps of all episodes one after the other.

    Args:
        path: local file.
        layout: of every episode.
        episodes: some steps each.
    """
    fields = [pa.field("action", pa.list_(pa.float32(), layout.action_dim))]
    if layout.state_dim:
        fields.append(pa.field("state", pa.list_(pa.float32(), layout.state_dim)))
    schema = pa.schema(fields, {"layout": json.dumps(asdict(layout))})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for steps in _batches(episodes):
            columns = [
                pa.FixedSizeListArray.from_arrays(
                    pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1]
                )
                for values in steps[: len(fields)]
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _batches(episodes: Iterable[Steps]) -> Iterator[list[np.ndarray]]:
    waiting: list[Steps] = []
    count = 0
    for steps in episodes:
        waiting.append(steps)
        count += len(steps[0])
        if count >= BATCH_ROWS:
            joined = [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
            full = count - count % BATCH_ROWS
            for start in range(0, full, BATCH_ROWS):
                yield [values[start : start + BATCH_ROWS] for values in joined]
            waiting, count = [(joined[0][full:], joined[1][full:])], count - full
    if count:
        yield [np.concatenate(parts) for parts in zip(*waiting, strict=True)]


class SignalFile:
    """Reads the file that `write_signals` made.

    Args:
        uri: local or remote.

    Raises: CorpusError when it is absent or damaged.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        try:
            source = (
                pa.PythonFile(storage.open_seekable(uri))
                if storage.is_remote(uri)
                else pa.memory_map(str(storage.local_path(uri)))
            )
            self._file = pa.ipc.open_file(source)
            known = json.loads(self._file.schema.metadata[b"layout"])
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{uri}, which holds actions, cannot be read ({error}). Run the ingest again."
            ) from error
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
        self.layout = SignalLayout(**values)
        self._batch = functools.lru_cache(maxsize=BATCHES_KEPT)(self._read_batch)

    def actions(self, first: int, count: int) -> np.ndarray:
        """Actions (count, A) float32 of steps from row `first` on; not to be written to."""
        return self._rows(0, self.layout.action_dim, first, count)

    def states(self, first: int, count: int) -> np.ndarray:
        """States (count, P) float32 of steps from row `first` on; not to be written to."""
        if not self.layout.state_dim:
            return np.empty((count, 0), np.float32)
        return self._rows(1, self.layout.state_dim, first, count)

    def _rows(self, column: int, width: int, first: int, count: int) -> np.ndarray:
        parts = []
        while count > 0:
            number, start = divmod(first, BATCH_ROWS)
            values = self._batch(number)[column][start : start + count]
            parts.append(values)
            first, count = first + len(values), count - len(values)
        if not parts:
            return np.empty((0, width), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _read_batch(self, number: int) -> list[np.ndarray]:
        try:
            batch = self._file.get_batch(number)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise CorpusError(f"{self.uri} cannot be read ({error}). Run the ingest again.") from error
        return [to_numpy(column.flatten()).reshape(len(batch), -1) for column in batch.columns]
