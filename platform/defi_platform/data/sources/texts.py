"""Tables of texts next to plain videos: CSV, JSON lines or Parquet with a column that names the video."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Final

import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.sources.file_index import FileIndex
from defi_platform.data.tables.parquet_io import ROWS_PER_PART
from defi_platform.errors import CorpusError

VIDEO_COLUMNS = ("video", "file", "file_name", "filename", "path", "video_path", "id", "video_id", "key")
TEXT_KEYS = ("text", "caption", "label", "instruction", "task")
"""Names that texts go by in the wild, the likeliest first."""
TEXT_COLUMNS = (*TEXT_KEYS, "description")


def read_texts(root: str, names: Sequence[str]) -> FileIndex:
    """Reads (video name or key, text) from every table among `names` that has both columns.

    Raises: CorpusError for a table that cannot be read.
    """
    texts = FileIndex(values=1)
    for name in sorted(names):
        uri = storage.join(root, name)
        rows = READERS.get(posixpath.splitext(name)[1])
        if rows is None:
            continue
        try:
            with storage.open_seekable(uri) as file:
                for video, text in _pairs(rows(file)):
                    texts.add(video, text)
        except (ValueError, TypeError, AttributeError, csv.Error, OSError) as error:
            raise CorpusError(
                f"{uri} cannot be read as a table of texts: {error}. Repair or remove it."
            ) from error
    return texts


def _csv(file: IO[bytes]) -> Iterable[dict[str, Any]]:
    return csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""))


def _jsonl(file: IO[bytes]) -> Iterable[dict[str, Any]]:
    return (json.loads(line) for line in io.TextIOWrapper(file, "utf-8") if line.strip())


def _parquet(file: IO[bytes]) -> Iterable[dict[str, Any]]:
    for batch in pq.ParquetFile(file).iter_batches(batch_size=ROWS_PER_PART):
        yield from batch.to_pylist()


READERS: Final[dict[str, Callable[[IO[bytes]], Iterable[dict[str, Any]]]]] = {
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def _pairs(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for row in rows:
        video = next((row[c] for c in VIDEO_COLUMNS if row.get(c)), None)
        text = next((row[c] for c in TEXT_COLUMNS if row.get(c)), None)
        if video is not None and text is not None:
            yield str(video), str(text)
