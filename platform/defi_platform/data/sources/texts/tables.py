"""Tables of texts as people write them: CSV, JSON, JSON lines or Parquet; a row that is damaged costs itself only."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.sources.metadata import DAMAGE, TEXT_KEYS, parsed_json, read_json, text_of
from defi_platform.data.sources.records import Note, RejectedRecord
from defi_platform.data.tables.parquet_io import ROWS_PER_PART
from defi_platform.storage.range_file import RangeFile

VIDEO_COLUMNS = (
    *("video", "file", "file_name", "filename", "filepath", "file_path", "path", "video_path", "videopath"),
    *(
        "video_file",
        "video_name",
        "videoname",
        "clip",
        "clip_path",
        "clip_name",
        "relpath",
        "uri",
        "url",
        "name",
    ),
    *("id", "video_id", "videoid", "clip_id", "youtube_id", "uid", "key", "__key__", "index"),
)
"""Names of columns that say which video a row is about; paths before ids."""

LONGEST_LINE = 16 << 20
"""Characters, or bytes of JSON lines."""

MOST_DAMAGED = 1_000
"""Damaged rows after which the rest of a table is not read: it is no such table."""

DELIMITERS = (",", ";", "\t", "|")

SURROGATE = re.compile("[\ud800-\udfff]").search

Fields = dict[str, Any]
"""A row by the names of its columns, in small letters."""


class TextRow(NamedTuple):
    """A row of a table that names a video and has a text."""

    names: tuple[str, ...]
    """Names that the video may go by, the likeliest first."""
    text: str
    place: str
    """Table and number of the row, for messages."""


class BadRow(ValueError):
    """A row that cannot be read."""


def read_rows(root: str, table: storage.Entry) -> Iterator[TextRow | RejectedRecord | Note]:
    """Reads the rows of a table that name a video and have a text.

    Args:
        root: of the corpus.
        table: a file whose suffix is in `READERS`.

    Yields: rows; what is damaged as rejected; a note where no column names a video or none has texts.
    """
    suffix = posixpath.splitext(table.name)[1].lower()
    damaged, usable, number = 0, 0, 0
    first: tuple[str, ...] = ()
    columns = Columns((), (), ())
    RangeFile.failures.clear()
    for number, fields in enumerate(_rows(table, READERS[suffix]), start=1):
        place = f"{table.name}:{number}"
        try:
            if isinstance(fields, BadRow):
                raise fields
            if (names := tuple(fields)) != columns.names:
                columns, first = _columns(names), first or names
            row = _text_row(fields, columns, place)
        except DAMAGE as error:
            damaged += 1
            yield _rejected(table, place, error)
            if damaged >= MOST_DAMAGED:
                yield _rejected(
                    table, f"{table.name}:{number}-", ValueError("the rest of the table is not read")
                )
                return
            continue
        if row is not None:
            usable += 1
            yield row
    if not usable and not damaged and (number or suffix != ".json"):
        named = ", ".join(first[:12]) or "none"
        yield Note(
            kind="skipped", item=table.name, uri=table.uri,
            message=f"not read as a table of texts: no column for the video or none for the text, of {named}",
        )  # fmt: skip


class Columns(NamedTuple):
    """The columns of a row that count, the likeliest first."""

    names: tuple[str, ...]
    """Of all columns."""
    texts: tuple[str, ...]
    videos: tuple[str, ...]


def _columns(names: tuple[str, ...]) -> Columns:
    known = {str(name).strip().lower(): name for name in names}
    texts, videos = (
        tuple([known[key] for key in keys if key in known]) for keys in (TEXT_KEYS, VIDEO_COLUMNS)
    )
    return Columns(names, texts, videos)


def _text_row(fields: Fields, columns: Columns, place: str) -> TextRow | None:
    """The row in `fields`; None where no column is one of texts or videos. Raises: ValueError for a text without a video."""
    text, found = "", list[str]()
    for column in columns.texts:
        if text := text_of(fields[column]):
            break
    else:
        return None
    for column in columns.videos:
        found += _names(fields[column])
    if not found:
        if columns.videos:
            raise BadRow(f"a text without a video: {text[:60]!r}")
        return None
    for value in (text, *found):
        if not value.isascii() and SURROGATE(value):
            raise BadRow(f"no text in UTF-8: {value[:60]!r}")
    return TextRow(tuple(dict.fromkeys(found)) if len(found) > 1 else (found[0],), text, place)


def _names(value: Any) -> list[str]:
    """Names of a video in a value: numbers as tables write them, 7.0 for 7 too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return []
    if isinstance(value, float):
        return [str(int(value))] if value.is_integer() else []
    name = str(value).strip()
    whole = re.fullmatch(r"(\d+)\.0+", name) if name.endswith("0") else None
    return [name, *([whole[1]] if whole else [])] if name else []


def _rows(table: storage.Entry, read: Callable[[storage.Entry], Iterable[Fields | BadRow]]) -> Iterator[Any]:
    try:
        yield from read(table)
    except (OSError, pa.ArrowException, csv.Error, *DAMAGE) as error:
        if RangeFile.failures:  # Arrow reports whatever its source raises as damage
            raise RangeFile.failures.pop() from error
        yield BadRow(f"{type(error).__name__}: {error}")


def _csv(table: storage.Entry) -> Iterator[Fields | BadRow]:
    csv.field_size_limit(LONGEST_LINE)
    with storage.open_seekable(table.uri) as file:
        lines = _text_lines(file)
        first = next(lines, "")
        header, delimiter = _header(first)
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        next(rows, None)
        while True:
            try:
                values = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield BadRow(str(error))
                continue
            if not any(map(str.strip, values)):
                continue
            if len(values) > len(header) and any(map(str.strip, values[len(header) :])):
                yield BadRow(f"{len(values)} values under {len(header)} columns; is a text without quotes?")
                continue
            yield dict(zip(header, values, strict=False))


def _header(line: str) -> tuple[list[str], str]:
    """(names of the columns, delimiter): the delimiter that gives a column of videos and one of texts, else a comma."""
    for delimiter in DELIMITERS:
        names = [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter), [])]
        if any(name in VIDEO_COLUMNS for name in names) and any(name in TEXT_KEYS for name in names):
            return names, delimiter
    return [name.strip().lower() for name in next(csv.reader([line]), [])], ","


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    """Lines with their ends; bytes that are no UTF-8 become surrogates, which no text may hold. Raises: ValueError."""
    start = file.read(2)
    file.seek(0)
    encoding = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    lines = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
    while line := lines.readline(LONGEST_LINE):
        if len(line) >= LONGEST_LINE:
            raise ValueError(f"a line of {LONGEST_LINE:,} characters or more")
        yield line


def _jsonl(table: storage.Entry) -> Iterator[Fields | BadRow]:
    # Not text lines: JSON may hold U+2028 and others that count as line ends elsewhere.
    with storage.open_seekable(table.uri) as file:
        while line := file.readline(LONGEST_LINE):
            if len(line) >= LONGEST_LINE:
                raise ValueError(f"a line of {LONGEST_LINE:,} bytes or more")
            if not line.strip():
                continue
            try:
                row = parsed_json(line)
            except ValueError as error:
                yield BadRow(str(error))
                continue
            if isinstance(row, dict):
                yield row


def _json(table: storage.Entry) -> Iterator[Fields]:
    """A list of rows, a mapping with such a list in it, or a mapping of videos to texts."""
    content = read_json(table.uri, table.bytes)
    lists = content.values() if isinstance(content, dict) else [content]
    found = [value for value in lists if isinstance(value, list) and value and isinstance(value[0], dict)]
    for rows in found:
        yield from (row for row in rows if isinstance(row, dict))
    if isinstance(content, dict) and not found:
        # Whatever else a JSON file says in numbers and mappings, it is no text of a video.
        yield from ({"video": k, "text": v} for k, v in content.items() if isinstance(v, str | list | dict))


def _parquet(table: storage.Entry) -> Iterator[Fields]:
    with storage.open_seekable(table.uri) as source, pq.ParquetFile(source) as file:
        names = file.schema_arrow.names
        wanted = [name for name in names if name.strip().lower() in (*VIDEO_COLUMNS, *TEXT_KEYS)]
        for batch in file.iter_batches(batch_size=ROWS_PER_PART, columns=wanted):
            yield from batch.to_pylist()


READERS: Final[dict[str, Callable[[storage.Entry], Iterable[Fields | BadRow]]]] = {
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _rejected(table: storage.Entry, place: str, error: Exception) -> RejectedRecord:
    what = str(error) if isinstance(error, BadRow) else f"{type(error).__name__}: {error}"
    return RejectedRecord(
        video_id=place, uri=table.uri, reason="bad_source", message=what, version=table.version
    )
