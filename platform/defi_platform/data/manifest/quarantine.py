"""The quarantine: one row per rejected video and event, as Parquet in the folder of the manifest.

<folder>/corpora/<name>/rejected-<hash>.parquet     what ingest rejected: a table of the corpus's commit
<folder>/quarantine/<stage>-<id>.parquet            what later stages rejected, a file per event
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from defi_platform import storage
from defi_platform.data.manifest.commit_marker import corpus_folder, read_committed
from defi_platform.data.tables.parquet_io import encoded, read_table
from defi_platform.errors import CorpusError

QUARANTINE_SCHEMA = pa.schema(
    [
        ("corpus", pa.string()),
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("stage", pa.string()),
        ("attempts", pa.int32()),
        ("decoder", pa.string()),
        ("version", pa.string()),
    ]
)


def strict_error(entry: Mapping[str, Any]) -> CorpusError:
    """Makes the error that `data.strict` stops with at a row of the quarantine."""
    return CorpusError(
        f"{entry['uri']} (corpus {entry['corpus']}, video {entry['video_id']}) is bad: {entry['reason']}: "
        f"{entry['message']}. Repair or remove it, or set data.strict=false to put bad videos into quarantine."
    )


def add_to_quarantine(folder: str, entries: Iterable[dict[str, Any]], stage: str) -> None:
    """Adds rows to the quarantine table; safe from any number of processes at once.

    Args:
        folder: of the manifest.
        entries: by the columns of `QUARANTINE_SCHEMA`; absent ones are null.
        stage: that rejected them, such as "decode".
    """
    table = pa.Table.from_pylist([{"stage": stage, **e} for e in entries], schema=QUARANTINE_SCHEMA)
    if table.num_rows:
        uri = storage.join(folder, "quarantine", f"{stage}-{uuid.uuid4().hex[:12]}.parquet")
        storage.write_bytes(uri, encoded(table))


def read_quarantine(folder: str) -> pa.Table:
    """Reads every rejected video of every stage, one row per event."""
    tables = [QUARANTINE_SCHEMA.empty_table()]
    for name in storage.names(storage.join(folder, "corpora")):
        committed = read_committed(folder, name)
        if committed is not None:
            tables.append(read_table(storage.join(corpus_folder(folder, name), committed.rejected)))
    return pa.concat_tables([*tables, *(read_table(uri) for uri in _later_events(folder))])


def read_quarantined_later(folder: str, name: str) -> pa.Table:
    """Reads what stages after the ingest rejected of one corpus."""
    tables = [read_table(uri) for uri in _later_events(folder)]
    events = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *tables])
    return events.filter(pc.equal(events.column("corpus"), name))


def forget_quarantined(folder: str, name: str) -> None:
    """Drops what stages after the ingest rejected of one corpus: its videos have been opened again."""
    for uri in _later_events(folder):
        events = read_table(uri)
        others = events.filter(pc.not_equal(events.column("corpus"), name))
        if others.num_rows == events.num_rows:
            continue
        if others.num_rows:
            storage.write_bytes(uri, encoded(others))
        else:
            storage.delete(uri)


def _later_events(folder: str) -> list[str]:
    below = storage.join(folder, "quarantine")
    return [storage.join(below, name) for name in storage.names(below) if name.endswith(".parquet")]


def skipped(folder: str) -> dict[str, int]:
    """Counts the different videos that were rejected, over all stages, by reason."""
    different = read_quarantine(folder).group_by(["corpus", "video_id", "reason"]).aggregate([])
    counts = pc.value_counts(different.column("reason")).to_pylist()
    return {item["values"]: item["counts"] for item in sorted(counts, key=lambda item: item["values"])}
