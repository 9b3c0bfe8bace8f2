"""A table whose file is mapped into memory: columns are used where they are, texts looked up one by one."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

TAKEN_AT_ONCE = 64
"""Values after which the pages they lie in are let go again: each may bring half a megabyte of neighbours along."""

WIDE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
"""Types whose offsets are widened to 64 bits."""


class MappedTable:
    """One chunk of Arrow columns.

    Args:
        table: any table; its columns are joined to one chunk each.
        mapped: the mapping its columns lie in, if they do.
    """

    def __init__(self, table: pa.Table, mapped: mmap.mmap | None = None) -> None:
        self.table = table if mapped is not None else mappable(table)
        self._mapped = mapped
        self._texts = {} if mapped is None else _text_spans(table, mapped)
        self._looked_up = 0
        # Texts are looked up at random: the kernel would read 128 kB around each.
        self._advise(mmap.MADV_RANDOM, list(self._texts))

    @classmethod
    def open(cls, path: Path) -> MappedTable:
        """Maps a file that `write_mappable` made."""
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        return cls(pa.ipc.open_file(pa.py_buffer(mapped)).read_all(), mapped)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column, not copied; nulls are 0."""
        return to_numpy(self.table.column(column))

    def where(self, column: str) -> np.ndarray:
        """int64: rows whose flag is set, in order."""
        return to_numpy(pc.indices_nonzero(self.table.column(column))).astype(np.int64)

    def codes(self, column: str) -> tuple[np.ndarray, list[str]]:
        """A text column as (code per row, texts by code)."""
        values = self.table.column(column).combine_chunks()
        if not pa.types.is_dictionary(values.type):
            values = pc.dictionary_encode(values)
        return to_numpy(values.indices), values.dictionary.to_pylist()

    def take(self, column: str, rows: np.ndarray) -> list[Any]:
        """Values of a column at `rows`."""
        values: list[Any] = []
        for start in range(0, len(rows), TAKEN_AT_ONCE):
            some = pa.array(rows[start : start + TAKEN_AT_ONCE])
            values += self.table.column(column).take(some).to_pylist()
            self._advise(mmap.MADV_DONTNEED, [column])
        return values

    def row(self, index: int) -> dict[str, Any]:
        """One row as a mapping."""
        found: dict[str, Any] = self.table.slice(index, 1).to_pylist()[0]
        self._looked_up += 1
        if self._looked_up % TAKEN_AT_ONCE == 0:
            self._advise(mmap.MADV_DONTNEED, list(self._texts))
        return found

    def _advise(self, advice: int, columns: list[str]) -> None:
        """Advises the kernel on the pages of text columns.

        Pages that this process releases (MADV_DONTNEED) stay in the machine's cache of the file.
        """
        for column in columns:
            for start, length in self._texts.get(column, ()):
                assert self._mapped is not None
                self._mapped.madvise(advice, start, length)


def mappable(table: pa.Table) -> pa.Table:
    """Joins the chunks of each column, with offsets of texts and bytes of 64 bits: one chunk can hold any corpus."""
    return table.cast(_mappable_schema(table.schema)).unify_dictionaries().combine_chunks()


def _mappable_schema(fields: Iterable[pa.Field]) -> pa.Schema:
    return pa.schema([f.with_type(WIDE.get(f.type, f.type)) for f in fields])


def write_mappable(parquet: Path, path: Path) -> int:
    """Writes the rows of a local Parquet file as a file that can be mapped. Returns: how many."""
    with pq.ParquetFile(parquet) as file:
        schema = file.schema_arrow
        # The copy that joins a column's chunks is there for one at a time: the largest columns, texts, first.
        names = sorted(schema.names, key=lambda name: schema.field(name).type not in WIDE)
        columns = {name: _mappable_column(file, schema.field(name)) for name in names}
    laid_out = pa.table({name: columns.pop(name) for name in schema.names})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, laid_out.schema) as writer:
        writer.write_table(laid_out)
    return int(laid_out.num_rows)


def _mappable_column(file: pq.ParquetFile, field: pa.Field) -> pa.ChunkedArray:
    schema = _mappable_schema([field])
    parts = [file.read_row_group(n, [field.name]).cast(schema) for n in range(file.num_row_groups)]
    column = mappable(pa.concat_tables([schema.empty_table(), *parts])).column(0)
    del parts
    pa.default_memory_pool().release_unused()
    return column


def to_numpy(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Converts numbers without a copy, nulls as 0. Arrow's own way to numpy imports pandas, for a second."""
    if isinstance(values, pa.ChunkedArray):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    if values.null_count:
        values = pc.fill_null(values, 0)
    kind = np.dtype(values.type.to_pandas_dtype())
    content = values.buffers()[1]
    if content is None:
        return np.empty(0, kind)
    return np.frombuffer(content, kind)[values.offset : values.offset + len(values)]


def _text_spans(table: pa.Table, mapped: mmap.mmap) -> dict[str, list[tuple[int, int]]]:
    """Text column -> (start, length) within the mapping of all it consists of, in whole pages."""
    base = pa.py_buffer(mapped).address
    spans: dict[str, list[tuple[int, int]]] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if column.type not in WIDE.values() or not column.num_chunks:
            continue
        for content in filter(None, column.chunk(0).buffers()):
            # Pages shared with a neighbour are left alone.
            first = -(-(content.address - base) // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (content.address - base + content.size) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                spans.setdefault(name, []).append((first, last - first))
    return spans
