"""Parquet files of a manifest: written as the rows come, named by their content, read some rows at a time."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.errors import CorpusError
from defi_platform.storage.scratch import scratch

ROWS_PER_GROUP = 100_000
"""Of files that are written from a table; the format's own million would take the memory of a million to read."""

ROWS_PER_PART = 4_000


def write_rows(folder: str, kind: str, rows: pa.RecordBatchReader) -> str:
    """Stores rows, a row group per batch. Returns: the name of the file, `<kind>-<hash>.parquet`."""
    with scratch("rows") as staging:
        place = staging / f"{kind}.parquet"
        with pq.ParquetWriter(place, rows.schema, compression="zstd") as writer:
            for batch in rows:
                writer.write_batch(batch)
        with place.open("rb") as content:
            name = f"{kind}-{hashlib.file_digest(content, 'sha256').hexdigest()[:16]}.parquet"
        storage.put_file(place, storage.join(folder, name))
    return name


def encoded(table: pa.Table) -> bytes:
    """A small table as a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_table(uri: str) -> pa.Table:
    """A whole file. Raises: CorpusError when it is absent or damaged."""
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise _unreadable(uri, error) from error


def read_parts(uri: str) -> Iterator[pa.Table]:
    """A file some rows at a time. Raises: CorpusError when it is absent or damaged."""
    try:
        with storage.local_copy(uri) as place, pq.ParquetFile(place) as file:
            for batch in file.iter_batches(batch_size=ROWS_PER_PART):
                yield pa.Table.from_batches([batch])
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise _unreadable(uri, error) from error


def _unreadable(uri: str, error: Exception) -> CorpusError:
    return CorpusError(f"{uri} cannot be read ({error}); delete its folder and run the ingest again.")
