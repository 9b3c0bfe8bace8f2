"""A plain folder of videos: every video file below it, with no instruction (or with tables of texts)."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

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
from defi_platform.data.sources.texts.matching import STEM, VideoNames
from defi_platform.data.sources.texts.tables import READERS, TextRow, read_rows
from defi_platform.data.sources.uri import file_uri

TITLE = "plain videos"

VIDEO_SUFFIXES = frozenset(
    [".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv"]
)

NAMED_TABLES = ("metadata", "captions", "caption", "texts", "text", "labels", "annotations", "prompts")
"""Stems of files in sub-folders that are tables of texts; at the top of a corpus any name will do."""

MOST_TEXTS = 100
"""Rows of one video that are compared with each other."""


def is_video(name: str) -> bool:
    """True when a file's name ends like a video's."""
    return posixpath.splitext(name)[1].lower() in VIDEO_SUFFIXES


def detect(root: str, top: set[str]) -> bool:
    """True when there is a video anywhere below `root`."""
    return any(is_video(entry.name) for entry in storage.walk(root))


def listing(root: str, fps: float | None = None) -> Listing:
    """Yields every video file, with its text where a table names it, and what rows of tables fit no video or several."""
    files = yield from files_below(root)
    texts = FileIndex(values=3)
    yield from _read_tables(root, files, texts)
    for entry in files.entries():
        if is_video(entry.name):
            text, note = _text_of(texts, entry)
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
    stem, suffix = (part.lower() for part in posixpath.splitext(posixpath.basename(name)))
    if suffix not in READERS or "/" not in name:
        return suffix in READERS
    return stem in NAMED_TABLES and (stem, suffix) != (
        "metadata",
        ".json",
    )  # which is of one video, as a rule


def _read_tables(root: str, files: Files, texts: FileIndex) -> Listing:
    """Reads every table into `texts`: video -> how well the row's name fits, where the row stands, its text."""
    tables = sorted((entry for entry in files.entries() if _is_table(entry.name)), key=lambda e: e.name)
    if not tables:
        return
    names = VideoNames(name for name in files if is_video(name))
    for table in tables:
        fitting, unfit = 0, list[TextRow]()
        for row in read_rows(root, table):
            if not isinstance(row, TextRow):
                yield row
                continue
            match = names.find(row.names, posixpath.dirname(table.name))
            if match is None:
                # A mapping in a JSON file may be anything: it is of texts once a name in it fits a video.
                unfit.append(row)
            elif len(match.videos) > 1:
                message = f"{row.names[0]} may be {match.videos[0]} or {match.videos[1]}"
                yield Note(kind="ambiguous", item=row.place, uri=table.uri, message=message)
            else:
                texts.add(match.videos[0], match.rank, row.names[0], row.text)
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


def _unmatched(root: str, table: storage.Entry, rows: list[TextRow]) -> Iterator[RejectedRecord | Note]:
    for row in rows:
        name = row.names[0]
        yield Note(kind="unmatched", item=row.place, uri=table.uri, message=f"there is no {name}")
        yield RejectedRecord(
            video_id=name, uri=storage.join(root, name), reason="missing", message=f"{row.place} names it"
        )


def _text_of(texts: FileIndex, video: storage.Entry) -> tuple[str, Note | None]:
    rows = [(rank, name, text) for _, _, rank, name, text in texts.find_all(video.name, MOST_TEXTS)]
    if not rows:
        return "", None
    best = min(rank for rank, _, _ in rows)
    rows = [row for row in rows if row[0] == best]
    text = rows[-1][2]
    if all(other == text for _, _, other in rows):
        return text, None
    named = {name for _, name, _ in rows}
    if best > STEM and len(named) > 1:
        message = f"rows of {' and of '.join(sorted(named)[:2])} fit it, with different texts"
        return "", Note(kind="ambiguous", item=video.name, uri=video.uri, message=message)
    message = f"{len(rows)} rows name it, with different texts; the last counts"
    return text, Note(kind="repeated", item=video.name, uri=video.uri, message=message)
