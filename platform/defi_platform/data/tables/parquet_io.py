"""Parquet files of a manifest: written as the rows come, named by their content, read some rows at a time."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.errors import CorpusError

Row = tuple[Any, ...]

ROWS_PER_PART = 4_000
"""Rows that are in memory as Python objects at a time."""


def write_rows(path: Path, rows: pa.RecordBatchReader, batches_per_group: int = 1) -> str:
    """Writes rows to a local file as they come.

    Args:
        path: of the file.
        rows: some thousand per batch.
        batches_per_group: are in memory at a time, and a row group of the file.

    Returns: a hash of the content.
    """
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        while batches := list(itertools.islice(rows, batches_per_group)):
            writer.write_table(pa.Table.from_batches(batches).unify_dictionaries())
    return content_hash(path)


def content_hash(path: Path) -> str:
    """The hash of a local file's content by which tables are named."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def to_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Makes a table of rows of Python objects."""
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)


def to_rows(table: pa.Table) -> Iterator[Row]:
    """The inverse of `to_table`, column by column: mappings per row would take five times as long."""
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def encoded(table: pa.Table) -> bytes:
    """Writes a small table as a Parquet file in memory."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(uri: str) -> pa.Table:
    """Reads a whole file. Raises: CorpusError when it is absent or damaged."""
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise _unreadable(uri, error) from error


def read_parts(uri: str) -> Iterator[pa.Table]:
    """Reads a file some rows at a time. Raises: CorpusError when it is absent or damaged."""
    try:
        with storage.local_copy(uri) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_PART):
                yield pa.Table.from_batches([batch])
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> CorpusError:
    return CorpusError(f"{uri} cannot be read ({error}); delete its folder and run the ingest again.")
