"""Actions and proprioception of LeRobot datasets: parquet with a row per frame, one or many episodes per file."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from defi_platform import storage
from defi_platform.data.sources.lerobot.data_files import DAMAGE, EPISODE, open_parquet
from defi_platform.data.sources.records import Signals
from defi_platform.data.tables.mmap_table import to_numpy
from defi_platform.errors import CorpusError

ACTION = "action"
PROPRIO = "observation.state"
FRAME = "frame_index"


def read_signals(uri: str, episode_id: str) -> Signals:
    """Reads the signals of one episode, such as `episode_000012`, in the order of its frames.

    Raises: CorpusError when the file or the episode in it is absent or damaged.
    """
    index = int(episode_id.rsplit("_", 1)[-1])
    try:
        table = _file(uri)
    except FileNotFoundError as error:
        raise CorpusError(f"{uri}, which should hold the episode's actions, is not there") from error
    except storage.StorageError:
        raise
    except DAMAGE as error:
        raise CorpusError(f"{uri} cannot be read: {type(error).__name__}: {error}") from error
    for name in (EPISODE, ACTION):
        if name not in table.column_names:
            raise CorpusError(f"{uri} has no column {name}")
    rows = np.flatnonzero(to_numpy(table.column(EPISODE)) == index)
    if not len(rows):
        raise CorpusError(f"{uri} has no rows of episode {index}")
    own = table.take(pa.array(rows))
    if FRAME in own.column_names:
        own = own.take(pa.array(_order(to_numpy(own.column(FRAME)), f"{uri}: episode {index}")))
    proprio = own.column(PROPRIO) if PROPRIO in own.column_names else None
    where = f"{uri}: episode {index}"
    return Signals(
        _values(own.column(ACTION), f"{where}: {ACTION}"),
        None if proprio is None else _values(proprio, f"{where}: {PROPRIO}"),
    )


@functools.lru_cache(maxsize=2)
def _file(uri: str) -> pa.Table:
    with open_parquet(uri) as file:
        present = file.schema_arrow.names
        return file.read(columns=[name for name in (EPISODE, FRAME, ACTION, PROPRIO) if name in present])


def _order(frames: np.ndarray, where: str) -> np.ndarray:
    """The rows of an episode in the order of its frames."""
    order = np.argsort(frames, kind="stable")
    if (frames[order] != np.arange(len(frames))).any():
        raise CorpusError(
            f"{where}: {FRAME} of its {len(frames)} rows is not 0 to {len(frames) - 1}, but has "
            f"{len(np.unique(frames))} values from {frames.min()} to {frames.max()}"
        )
    return np.asarray(order)


def _values(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """(n, D) float32 of a column of lists or numbers. Raises: CorpusError for nulls, texts and rows of unequal length."""
    values = column.combine_chunks()
    width = 1
    if column.null_count:
        raise CorpusError(f"{where} is null in {column.null_count} of {len(column)} rows")
    while pa.types.is_list(values.type) or _is_other_list(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) > 1:
            raise CorpusError(f"{where} has rows of {' and of '.join(map(str, sorted(lengths)))} numbers")
        width *= lengths[0]
        values = values.flatten()
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        raise CorpusError(f"{where} is of type {values.type}; numbers are expected")
    if values.null_count:
        raise CorpusError(f"{where} holds {values.null_count} nulls")
    return to_numpy(values).astype(np.float32).reshape(len(column), width)


def _is_other_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind))


def matrix(rows: Sequence[object]) -> np.ndarray:
    """Makes (n, D) float32 of n rows; a number counts as a row of one."""
    values = np.asarray(rows, np.float32)
    return values.reshape(len(values), -1)
