"""Rows of any number on local disk while an ingest works on them: compressed batches, read back in any order."""

from __future__ import annotations

import bisect
import functools
import itertools
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from defi_platform.storage import StorageError

ROWS_AT_ONCE = 4_000
"""Rows of a batch: so many are in memory as Python objects at a time."""

KEPT_BATCHES = 4
"""Batches held decompressed: rows are asked for nearly in the order in which they came."""


class Spool:
    """Rows that are all appended first and then read; they vanish with the process.

    The file lies where `TMPDIR` says. Raises: StorageError when there is no room for it.

    Args:
        schema: without dictionaries, since batches of one file would have to share them.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._file = tempfile.TemporaryFile(prefix="defi-ingest-")  # noqa: SIM115  lives as long as the spool
        # By its descriptor, since it has no name: Arrow reads Python's files from several threads, and mixes them up.
        self._place = f"/proc/self/fd/{self._file.fileno()}"
        self._sink = pa.OSFile(self._place, "wb")
        self._writer = pa.ipc.new_file(self._sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))
        self._readers: dict[tuple[str, ...], pa.ipc.RecordBatchFileReader] = {}
        self._starts = [0]
        self._batch = functools.lru_cache(maxsize=KEPT_BATCHES)(self._read)

    def __len__(self) -> int:
        return self._starts[-1]

    def append(self, table: pa.Table) -> None:
        """Adds rows; few thousand at a time make good batches."""
        assert not self._readers, "a spool is filled before it is read"
        for batch in table.combine_chunks().to_batches(max_chunksize=ROWS_AT_ONCE):
            try:
                self._writer.write_batch(batch)
            except OSError as error:
                raise StorageError(
                    f"no temporary file can be written in {tempfile.gettempdir()}: {error}. "
                    "Make room there, or set TMPDIR to a folder with more."
                ) from error
            self._starts.append(self._starts[-1] + batch.num_rows)

    def batches(self, *columns: str) -> Iterator[pa.RecordBatch]:
        """All rows as they came; all columns, or those named."""
        for number in range(len(self._starts) - 1):
            yield self._read(number, columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows, in memory."""
        kind = self.schema.field(name).type
        return pa.chunked_array([batch.column(name) for batch in self.batches(name)], kind)

    def take(self, rows: np.ndarray, *columns: str) -> pa.Table:
        """Rows by number, in the order asked for."""
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        tables = [self._schema(columns).empty_table()]
        for start, stop in _runs(np.searchsorted(self._starts, ascending, side="right")):
            number = bisect.bisect_right(self._starts, int(ascending[start])) - 1
            places = ascending[start:stop] - self._starts[number]
            tables.append(pa.Table.from_batches([self._batch(number, columns).take(pa.array(places))]))
        found = pa.concat_tables(tables)
        if np.array_equal(ascending, rows):
            return found
        return found.take(pa.array(np.argsort(order, kind="stable")))

    def in_order(self, rows: np.ndarray, *columns: str) -> Iterator[pa.Table]:
        """`take` of `rows`, some at a time."""
        for start in range(0, len(rows), ROWS_AT_ONCE):
            yield self.take(rows[start : start + ROWS_AT_ONCE], *columns)

    def _read(self, number: int, columns: tuple[str, ...]) -> pa.RecordBatch:
        if columns not in self._readers:
            if not self._readers:
                self._writer.close()
                self._sink.close()
            fields = sorted(self.schema.get_field_index(name) for name in columns)
            options = pa.ipc.IpcReadOptions(included_fields=fields or None)
            self._readers[columns] = pa.ipc.open_file(pa.OSFile(self._place, "rb"), options=options)
        return self._readers[columns].get_batch(number)

    def _schema(self, columns: Sequence[str]) -> pa.Schema:
        return pa.schema([field for field in self.schema if not columns or field.name in columns])


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each run of equal values."""
    borders = np.flatnonzero(values[1:] != values[:-1]) + 1
    if len(values):
        yield from itertools.pairwise([0, *borders.tolist(), len(values)])
