"""Notes of an ingest: what it counts besides videos and rejections, as a table of a corpus's commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform.data.rejection import NOTES
from defi_platform.data.tables.parquet_io import ROWS_PER_PART

NOTES_SCHEMA = pa.schema(
    [("kind", pa.string()), ("item", pa.string()), ("uri", pa.string()), ("message", pa.string())]
)

Notes = Mapping[str, tuple[int, str]]
"""Kind, one of `rejection.NOTES` -> (how many, an example)."""


def counted(videos: Path, noted: Path) -> dict[str, tuple[int, str]]:
    """Counts the notes of a corpus, and its videos without a text.

    Args:
        videos: Parquet file of the manifest's rows.
        noted: Parquet file by `NOTES_SCHEMA`.
    """
    notes: dict[str, tuple[int, str]] = {}

    def note(kind: str, item: str) -> None:
        count, example = notes.get(kind, (0, item))
        notes[kind] = (count + 1, example)

    for kind, item, message in _rows(noted, "kind", "item", "message"):
        note(kind, f"{item}: {message}" if message else item)
    for video_id, text in _rows(videos, "video_id", "text"):
        if not text:
            note("no_text", video_id)
    return notes


def warnings(corpus: str, notes: Notes) -> list[str]:
    """Makes a line of text per kind of note."""
    return [
        f"warning: {corpus}: {count:,} {kind} ({NOTES[kind]}), such as {example}"
        for kind, (count, example) in sorted(notes.items())
    ]


def _rows(path: Path, *columns: str) -> Iterator[tuple[Any, ...]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_PART, columns=list(columns)):
            by_name = batch.to_pydict()
            yield from zip(*(by_name[name] for name in columns), strict=True)
