"""A plain folder of videos: every video file below it, with no instruction (or with tables of texts)."""

from __future__ import annotations

import operator
import posixpath
from collections.abc import Iterable, Iterator
from typing import Any

from defi_platform import storage
from defi_platform.data.sources.file_index import FileIndex
from defi_platform.data.sources.records import (
    Files,
    Listing,
    Note,
    RejectedRecord,
    VideoRecord,
    files_below,
)
from defi_platform.data.sources.texts.matching import EXACT, STEM, VideoNames, video_keys
from defi_platform.data.sources.texts.tables import READERS, TextRow, read_rows
from defi_platform.data.sources.uri import file_uri

TITLE = "plain videos"

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"]
)

NAMED_TABLES = ("metadata", "captions", "caption", "texts", "text", "labels", "annotations", "prompts")
"""Stems of files in sub-folders that are tables of texts; at the top of a corpus any name will do."""

TABLE_SUFFIXES = tuple(READERS)

MOST_TEXTS = 100
"""Rows of one video that are compared with each other."""

LOOKED_UP_ROWS, LOOKED_UP_CHARACTERS = 1_000, 1 << 20
"""Rows of a table that are looked up at once: the most, and what may be in them."""

Row = TextRow | RejectedRecord | Note

Text = tuple[Any, ...]
"""Number of the video, how well the row's name fits, that name, the text."""


def is_video(name: str) -> bool:
    """True when a file's name ends like a video's."""
    dot = name.rfind(".")
    if name[dot:].lower() not in VIDEO_SUFFIXES or dot <= 0:
        return False
    # Not for every name: what stands between dots only is no suffix.
    return name[dot - 1] not in "/." or posixpath.splitext(name)[1] != ""


def detect(root: str, top: set[str]) -> bool:
    """True when there is a video anywhere below `root`."""
    return any(is_video(entry.name) for entry in storage.walk(root))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields every video file, with its text where a table names it, and what rows of tables fit no video or several."""
    files = yield from files_below(root, **video_keys(is_video))
    texts = FileIndex(values=3)
    yield from _read_tables(root, files, texts)
    by_video = _by_video(texts)
    rows = next(by_video, None)
    for number, entry in enumerate(files.entries()):
        if is_video(entry.name):
            text, note = "", None
            if rows is not None and number == rows[0][0]:
                text, note = _text_of(rows, entry)
                rows = next(by_video, None)
            yield VideoRecord(
                video_id=entry.name,
                uri=file_uri(entry.uri),
                text=text,
                bytes=entry.bytes,
                version=entry.version,
                fps=fps,
            )
            if note is not None:
                yield note


def _is_table(name: str) -> bool:
    if not name.lower().endswith(TABLE_SUFFIXES):
        return False  # most are videos
    stem, suffix = posixpath.splitext(name)
    if suffix.lower() not in READERS or "/" not in name:
        return suffix.lower() in READERS
    table = posixpath.basename(stem).lower()
    # A metadata.json is of one video, as a rule.
    return table in NAMED_TABLES and (table, suffix.lower()) != ("metadata", ".json")


def _read_tables(root: str, files: Files, texts: FileIndex) -> Listing:
    """Reads every table into `texts`, rows of `Text`."""
    tables = sorted(files.entries(_is_table), key=operator.attrgetter("name"))
    if not tables:
        return
    names = VideoNames(files.rows)
    for table in tables:
        fitting, unfit = 0, list[TextRow]()
        folder = posixpath.dirname(table.name)
        for row, video in _with_exact(read_rows(root, table), names, folder):
            if not isinstance(row, TextRow):
                yield row
                continue
            if video is not None:
                texts.add(video, EXACT, row.names[0], row.text)
                fitting += 1
                continue
            match = names.find(row.names, folder)
            if match is None:
                # A mapping in a JSON file may be anything: it is of texts once a name in it fits a video.
                unfit.append(row)
            elif len(match.videos) > 1:
                message = f"{row.names[0]} may be {match.videos[0][1]} or {match.videos[1][1]}"
                yield Note(kind="ambiguous", item=row.place, uri=table.uri, message=message)
            else:
                texts.add(match.videos[0][0], match.rank, row.names[0], row.text)
            fitting += match is not None
            if len(unfit) >= MOST_TEXTS and (fitting or not table.name.endswith(".json")):
                yield from _unmatched(root, table, unfit)
                unfit.clear()
        if fitting or not table.name.lower().endswith(".json"):
            yield from _unmatched(root, table, unfit)
        elif unfit:
            yield Note(
                kind="skipped", item=table.name, uri=table.uri, message="none of its names is that of a video"
            )


def _with_exact(rows: Iterable[Row], names: VideoNames, folder: str) -> Iterator[tuple[Row, int | None]]:
    """Yields rows with the number of the video of which they have the whole path."""
    for some in _batches(rows):
        found = names.find_exact([row.names[0] if isinstance(row, TextRow) else "" for row in some], folder)
        yield from zip(some, found, strict=True)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    some, characters = list[Row](), 0
    for row in rows:
        some.append(row)
        if isinstance(row, TextRow):
            characters += len(row.text) + sum(map(len, row.names))
        if len(some) >= LOOKED_UP_ROWS or characters >= LOOKED_UP_CHARACTERS:
            yield some
            some, characters = [], 0
    yield some


def _unmatched(root: str, table: storage.Entry, rows: list[TextRow]) -> Iterator[RejectedRecord | Note]:
    for row in rows:
        name = row.names[0]
        yield Note(kind="unmatched", item=row.place, uri=table.uri, message=f"there is no {name}")
        yield RejectedRecord(
            video_id=name, uri=storage.join(root, name), reason="missing", message=f"{row.place} names it"
        )


def _by_video(texts: FileIndex) -> Iterator[list[Text]]:
    rows = list[Text]()
    for row in texts.by_name():
        if rows and rows[0][0] != row[0]:
            yield rows
            rows = []
        if len(rows) < MOST_TEXTS:
            rows.append(row)
    if rows:
        yield rows


def _text_of(rows: list[Text], video: storage.Entry) -> tuple[str, Note | None]:
    if len(rows) == 1:
        return rows[0][3], None
    best = min(rank for _, rank, _, _ in rows)
    rows = [row for row in rows if row[1] == best]
    text = rows[-1][3]
    if all(other == text for _, _, _, other in rows):
        return text, None
    named = {name for _, _, name, _ in rows}
    if best > STEM and len(named) > 1:
        message = f"rows of {' and of '.join(sorted(named)[:2])} fit it, with different texts"
        return "", Note(kind="ambiguous", item=video.name, uri=video.uri, message=message)
    message = f"{len(rows)} rows name it, with different texts; the last counts"
    return text, Note(kind="repeated", item=video.name, uri=video.uri, message=message)
