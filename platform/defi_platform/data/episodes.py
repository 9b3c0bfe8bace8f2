"""Actions and proprioception of labelled corpora: reading them, and their statistics for normalisation.

Layout: n steps, A action dimensions, P proprioception dimensions; float32, raw units of the robot.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.manifest import Manifest
from defi_platform.data.plan import Plan
from defi_platform.errors import CorpusError

ACTION = "action"
PROPRIO = "observation.state"

OPEN_TABLES = 16


@dataclass(frozen=True)
class Signals:
    """What the robot did and felt in one episode."""

    actions: np.ndarray
    """(n, A) float32"""
    proprio: np.ndarray | None
    """(n, P) float32; None where the corpus has none."""


@dataclass(frozen=True)
class Statistics:
    """Per dimension, over the steps of the training split."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int


class SignalReader:
    """Reads signals of manifest rows and keeps the files it read last."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, dict[int, Signals]] = OrderedDict()

    def read(self, source: str, uri: str, episode_id: str) -> Signals:
        """Signals of one episode. Raises: CorpusError when the file or the episode in it is absent."""
        if uri not in self._files:
            self._files[uri] = _lerobot_file(uri)
            while len(self._files) > OPEN_TABLES:
                self._files.popitem(last=False)
        self._files.move_to_end(uri)
        index = int(episode_id.rsplit("_", 1)[-1])
        try:
            return self._files[uri][index]
        except KeyError as error:
            raise CorpusError(
                f"{uri} has no rows of episode {index}, which the manifest places there. Run the ingest again."
            ) from error


def _lerobot_file(uri: str) -> dict[int, Signals]:
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
    except FileNotFoundError as error:
        raise CorpusError(
            f"{uri}, which holds actions, is not there. Restore it or run the ingest again."
        ) from error
    names = set(file.schema_arrow.names)
    columns = ["episode_index", ACTION] + ([PROPRIO] if PROPRIO in names else [])
    table = file.read(columns=columns)
    episode = table.column("episode_index").to_numpy()
    actions = _matrix(table.column(ACTION).to_pylist())
    proprio = _matrix(table.column(PROPRIO).to_pylist()) if PROPRIO in names else None
    return {
        int(index): Signals(actions[episode == index], None if proprio is None else proprio[episode == index])
        for index in np.unique(episode)
    }


def _matrix(rows: Sequence[object]) -> np.ndarray:
    values = np.asarray(rows, np.float32)
    return values.reshape(len(values), -1)


def statistics(plan: Plan) -> dict[str, Statistics]:
    """Statistics of "action" and, where there is one, "proprio" over every episode that `plan` draws from.

    Raises: CorpusError when no episode has actions.
    """
    reader = SignalReader()
    actions, proprios = [], []
    for signals in _episodes_of(plan, reader):
        actions.append(signals.actions)
        if signals.proprio is not None:
            proprios.append(signals.proprio)
    found = {"action": _summary(np.concatenate(actions))}
    if proprios:
        found["proprio"] = _summary(np.concatenate(proprios))
    return found


def dimensions(plan: Plan) -> tuple[int, int]:
    """(A, P) of the corpora that `plan` draws from; P is 0 without proprioception."""
    signals = next(iter(_episodes_of(plan, SignalReader())))
    return signals.actions.shape[1], 0 if signals.proprio is None else signals.proprio.shape[1]


def signals_of(manifest: Manifest, row: int, reader: SignalReader) -> Signals:
    """Signals of one manifest row. Raises: CorpusError."""
    found = manifest.row(row)
    return reader.read(found["source"], found["signals_uri"], found["episode_id"])


def _episodes_of(plan: Plan, reader: SignalReader) -> Iterator[Signals]:
    rows = plan.first_rows()
    if not len(rows):
        raise CorpusError("no episode with actions to take statistics from.")
    for row in rows.tolist():
        yield signals_of(plan.manifest, row, reader)


def _summary(values: np.ndarray) -> Statistics:
    wide = values.astype(np.float64)
    return Statistics(
        mean=wide.mean(axis=0).astype(np.float32),
        std=wide.std(axis=0).astype(np.float32),
        min=values.min(axis=0),
        max=values.max(axis=0),
        count=len(values),
    )
