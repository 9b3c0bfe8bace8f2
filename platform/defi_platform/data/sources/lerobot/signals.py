"""Actions and proprioception of LeRobot datasets: parquet with a row per frame, one or many episodes per file."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.sources.records import Signals
from defi_platform.errors import CorpusError

ACTION = "action"
PROPRIO = "observation.state"


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads the signals of one episode, such as `episode_000012`.

    Raises: CorpusError when the file or the episode in it is absent.
    """
    index = int(episode_id.rsplit("_", 1)[-1])
    try:
        return _file(uri)[index]
    except FileNotFoundError as error:
        raise CorpusError(
            f"{uri}, which holds actions, is not there. Restore it or run the ingest again."
        ) from error
    except KeyError as error:
        raise CorpusError(
            f"{uri} has no rows of episode {index}, which the manifest says it has. Run the ingest again."
        ) from error


@functools.lru_cache(maxsize=16)
def _file(uri: str) -> dict[int, Signals]:
    file = pq.ParquetFile(io.BytesIO(storage.read_bytes(uri)))
    has_proprio = PROPRIO in file.schema_arrow.names
    table = file.read(columns=["episode_index", ACTION] + ([PROPRIO] if has_proprio else []))
    episode = table.column("episode_index").to_numpy()
    actions = matrix(table.column(ACTION).to_pylist())
    proprio = matrix(table.column(PROPRIO).to_pylist()) if has_proprio else None
    return {
        int(index): Signals(actions[episode == index], None if proprio is None else proprio[episode == index])
        for index in np.unique(episode)
    }


def matrix(rows: Sequence[object]) -> np.ndarray:
    """Makes (n, D) float32 of n rows; a number counts as a row of one."""
    values = np.asarray(rows, np.float32)
    return values.reshape(len(values), -1)
