"""The manifest (one row per usable video) and the quarantine table (one row per rejected one), as Parquet.

    <folder>/corpora/<name>/videos-<hash>.parquet       rows of a corpus
    <folder>/corpora/<name>/videos-<hash>.arrow         the same, laid out to be mapped into memory, not read
    <folder>/corpora/<name>/rejected-<hash>.parquet     what ingest rejected, with its reason
    <folder>/corpora/<name>/opened-<hash>.parquet       what every file was found to be, see verdicts.py
    <folder>/corpora/<name>/committed.json              written last: names the files above
    <folder>/quarantine/<stage>-<id>.parquet            what later stages rejected

The order of rows is part of the contract, since the plan counts on it: corpora as configured, then `video_id`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.errors import CorpusError

NAMES = pa.dictionary(pa.int16(), pa.string())
"""Texts of which a corpus has few: two bytes per row."""

SCHEMA = pa.schema(
    [
        ("corpus", NAMES),
        ("video_id", pa.string()),
        ("uri", pa.string()),
        ("camera", NAMES),
        ("text", pa.string()),
        ("split", NAMES),
        ("num_frames", pa.int32()),
        ("fps", pa.float32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", NAMES),
        ("bytes", pa.int64()),
        ("source", NAMES),
        ("episode_id", pa.string()),
        ("num_actions", pa.int32()),
        ("first_frame", pa.int32()),
        ("decoder", NAMES),
        ("variable_rate", pa.bool_()),
        ("signals_uri", pa.string()),
        ("version", pa.string()),
        ("times", pa.list_(pa.float32())),
        ("luma", pa.float32()),
        ("motion", pa.float32()),
        ("sharpness", pa.float32()),
    ]
)
"""`first_frame`: where the video starts in its file; `signals_uri`: the file with its actions;
`version`: of the file, as its store knows it. `width` and `height` are as displayed, after rotation.
`times`: seconds of each frame from the video's first on, where `variable_rate`; else null.
`luma`, `motion`, `sharpness`: see `filters.Scores`; null where no filter asked."""

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

COMMITTED = "committed.json"

TABLES = ("videos-", "rejected-", "opened-")

LAYOUT = 3
"""Of the tables in a committed corpus; those of another one are made again by the next ingest."""


@dataclass(frozen=True)
class Committed:
    """The commit marker of one corpus."""

    videos: str
    rejected: str
    opened: str
    settings: dict[str, Any]
    """What the rows depend on besides the files: path, format, holdout."""
    counts: dict[str, int]
    """`videos`, and one count per reason of rejection."""
    layout: int = LAYOUT


@dataclass(frozen=True)
class Corpus:
    """The committed tables of one corpus."""

    videos: pa.Table
    rejected: pa.Table
    opened: pa.Table
    """By `verdicts.SCHEMA`: one row per file."""
    committed: Committed


class Manifest:
    """The usable videos of all corpora, in plan order.

    Args:
        parts: one table per corpus, of one chunk each; mapped from disk where it is local.
        folder: where it is stored; None for one made in memory.
        names: corpora in the order of the configuration.
    """

    def __init__(self, parts: Sequence[pa.Table], folder: str | None, names: Sequence[str]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [part.num_rows for part in parts])
        self.folder = folder
        self.names = tuple(names)
        self.reused: tuple[str, ...] = ()
        """Corpora that ingest found unchanged."""

    @classmethod
    def from_rows(cls, rows: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> Manifest:
        """A manifest in memory, from rows with the columns of `SCHEMA` (absent ones are null)."""
        names = tuple(names or dict.fromkeys(row["corpus"] for row in rows))
        parts = [
            pa.Table.from_pylist([row for row in rows if row["corpus"] == n], schema=SCHEMA) for n in names
        ]
        return cls([_mappable(part) for part in parts], None, names)

    @classmethod
    def open(cls, folder: str, names: Sequence[str] | None = None) -> Manifest:
        """Opens the manifest in `folder`, all its corpora or those in `names`.

        Raises: CorpusError when there is none.
        """
        listed = storage.names(storage.join(folder, "corpora"))
        chosen = tuple(names) if names is not None else tuple(listed)
        parts = []
        for name in chosen:
            committed = read_committed(folder, name)
            if committed is None:
                raise CorpusError(
                    f"{folder} has no committed manifest of corpus '{name}' that this version can read. "
                    f"There is: {', '.join(listed) or 'nothing'}. Run the ingest first."
                )
            parts.append(_mapped_table(_corpus_file(folder, name, committed.videos)))
        if not parts:
            raise CorpusError(f"{folder} holds no manifest. Run the ingest first.")
        return cls(parts, storage.absolute(folder), chosen)

    @property
    def table(self) -> pa.Table:
        """All rows as one table; for small manifests and tests."""
        return pa.concat_tables(self._parts).cast(SCHEMA)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column as an array of one entry per row."""
        parts = [part.column(column).to_numpy() for part in self._parts]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def rows_where(self, column: str) -> np.ndarray:
        """int64: rows whose flag is set, in order."""
        found = [
            np.flatnonzero(pc.fill_null(part.column(column), False).to_numpy()) + start
            for start, part in zip(self._starts.tolist(), self._parts, strict=False)
        ]
        return np.concatenate(found)

    def codes(self, column: str) -> tuple[np.ndarray, list[str]]:
        """A text column as (code per row, texts by code)."""
        texts: dict[str, int] = {}
        found = []
        for part in self._parts:
            values = part.column(column).combine_chunks()
            if not pa.types.is_dictionary(values.type):
                values = pc.dictionary_encode(values)
            local = [texts.setdefault(text, len(texts)) for text in values.dictionary.to_pylist()]
            indices = values.indices.to_numpy(zero_copy_only=False)
            same = local == list(range(len(local)))
            found.append(indices if same else np.asarray(local, indices.dtype)[indices])
        return np.concatenate(found) if len(found) > 1 else found[0], list(texts)

    def take(self, column: str, rows: np.ndarray) -> list[Any]:
        """Values of a column at `rows`."""
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        values: list[Any] = [None] * len(rows)
        for number in np.unique(part_of):
            places = np.flatnonzero(part_of == number)
            local = pa.array(rows[places] - self._starts[number])
            taken = self._parts[number].column(column).take(local).to_pylist()
            for place, value in zip(places.tolist(), taken, strict=True):
                values[place] = value
        return values

    def row(self, index: int) -> dict[str, Any]:
        """One row as a mapping."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        found: dict[str, Any] = self._parts[part].slice(index - int(self._starts[part]), 1).to_pylist()[0]
        return found

    def find(self, wanted: Mapping[tuple[str, str, str], str]) -> dict[int, str]:
        """Row -> value for every (corpus, video_id, version) in `wanted` that the manifest has."""
        ids = pa.array(sorted({video_id for _, video_id, _ in wanted}))
        found = {}
        for start, part in zip(self._starts.tolist(), self._parts, strict=False):
            column = part.column("video_id")
            hits = pc.is_in(column, value_set=ids.cast(column.type)).to_numpy()
            for row in (np.flatnonzero(hits) + start).tolist():
                video = self.row(row)
                value = wanted.get((video["corpus"], video["video_id"], video["version"]))
                if value is not None:
                    found[row] = value
        return found

    def fingerprint(self) -> str:
        """Changes when a row does in what the plan sees of it."""
        digest = hashlib.sha256()
        for column in ("num_frames", "fps", "first_frame", "num_actions"):
            digest.update(self.numbers(column).tobytes())
        for column in ("corpus", "camera", "split"):
            codes, texts = self.codes(column)
            digest.update(repr(texts).encode())
            digest.update(codes.tobytes())
        for value in self.take("times", self.rows_where("variable_rate")):
            digest.update(np.asarray(value, np.float32).tobytes())
        for part in self._parts:
            ids = part.column("video_id").combine_chunks()
            digest.update(pc.binary_length(ids).to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
            digest.update(_text_bytes(ids))
        return digest.hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent to decode actors by name: ten million rows should not travel with every actor.
        if self.folder is None:
            return Manifest, (self._parts, None, self.names)
        return _opened_once, (self.folder, self.names)


@functools.lru_cache(maxsize=4)
def _opened_once(folder: str, names: tuple[str, ...]) -> Manifest:
    return Manifest.open(folder, names)


def _text_bytes(texts: pa.LargeStringArray) -> memoryview:
    """The characters of all texts in a row, without a copy."""
    _, offsets, characters = texts.buffers()
    if not len(texts) or characters is None:
        return memoryview(b"")
    places = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(characters)[places[0] : places[-1]]


# --------------------------------------------------------------------------- storage


def read_committed(folder: str, name: str) -> Committed | None:
    """The commit marker of a corpus; None when it was never written to its end, or by another layout."""
    place = _corpus_file(folder, name, COMMITTED)
    try:
        raw = json.loads(storage.read_bytes(place))
        return Committed(**raw) if raw.get("layout") == LAYOUT else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise CorpusError(f"{place} is damaged ({error}); delete it and run the ingest again.") from error


def commit_corpus(
    folder: str, name: str, videos: pa.Table, rejected: pa.Table, opened: pa.Table, settings: dict[str, Any]
) -> Committed:
    """Stores the tables of a corpus; they count once the marker, written last, is there."""
    file = _write_table(folder, name, "videos", videos)
    storage.write_bytes(_corpus_file(folder, name, _arrow_name(file)), _arrow(videos))
    counts = {"videos": videos.num_rows}
    for item in pc.value_counts(rejected.column("reason").combine_chunks()).to_pylist():
        counts[item["values"]] = item["counts"]
    committed = Committed(
        videos=file,
        rejected=_write_table(folder, name, "rejected", rejected),
        opened=_write_table(folder, name, "opened", opened),
        settings=settings,
        counts=counts,
    )
    storage.write_text(_corpus_file(folder, name, COMMITTED), json.dumps(committed.__dict__, indent=1))
    current = {COMMITTED, file, _arrow_name(file), committed.rejected, committed.opened}
    for old in storage.names(corpus_folder(folder, name)):
        # Tables of earlier commits, and of ingests that were killed before theirs.
        if old not in current and old.startswith(TABLES):
            storage.delete(_corpus_file(folder, name, old))
    return committed


def read_corpus(folder: str, name: str) -> Corpus | None:
    """The tables and the marker of one corpus; None when it is not committed."""
    committed = read_committed(folder, name)
    if committed is None:
        return None
    videos, rejected, opened = (
        _read_table(_corpus_file(folder, name, file))
        for file in (committed.videos, committed.rejected, committed.opened)
    )
    return Corpus(videos, rejected, opened, committed)


def corpus_folder(folder: str, name: str) -> str:
    """Where the tables of a corpus lie."""
    return storage.join(folder, "corpora", name)


def add_to_quarantine(folder: str, entries: Iterable[dict[str, Any]], stage: str) -> None:
    """Adds rows to the quarantine table; safe from any number of processes at once."""
    table = pa.Table.from_pylist([{"stage": stage, **e} for e in entries], schema=QUARANTINE_SCHEMA)
    if table.num_rows:
        place = storage.join(folder, "quarantine", f"{stage}-{uuid.uuid4().hex[:12]}.parquet")
        storage.write_bytes(place, _encoded(table))


def read_quarantine(folder: str) -> pa.Table:
    """Every rejected video of every stage, one row per event."""
    tables = [QUARANTINE_SCHEMA.empty_table()]
    for name in storage.names(storage.join(folder, "corpora")):
        committed = read_committed(folder, name)
        if committed is not None:
            tables.append(_read_table(_corpus_file(folder, name, committed.rejected)))
    return pa.concat_tables([*tables, *(_read_table(place) for place in _later_events(folder))])


def read_quarantined_later(folder: str, name: str) -> pa.Table:
    """What stages after the ingest rejected of one corpus."""
    tables = [_read_table(place) for place in _later_events(folder)]
    events = pa.concat_tables([QUARANTINE_SCHEMA.empty_table(), *tables])
    return events.filter(pc.equal(events.column("corpus"), name))


def forget_quarantined(folder: str, name: str) -> None:
    """Drops what stages after the ingest rejected of one corpus: its videos have been opened again."""
    for place in _later_events(folder):
        events = _read_table(place)
        others = events.filter(pc.not_equal(events.column("corpus"), name))
        if others.num_rows == events.num_rows:
            continue
        if others.num_rows:
            storage.write_bytes(place, _encoded(others))
        else:
            storage.delete(place)


def _later_events(folder: str) -> list[str]:
    below = storage.join(folder, "quarantine")
    return [storage.join(below, name) for name in storage.names(below) if name.endswith(".parquet")]


def skipped(folder: str) -> dict[str, int]:
    """Reason -> number of different videos rejected for it, over all stages."""
    seen = {(r["corpus"], r["video_id"], r["reason"]) for r in read_quarantine(folder).to_pylist()}
    counts: dict[str, int] = {}
    for _, _, reason in sorted(seen):
        counts[reason] = counts.get(reason, 0) + 1
    return counts


def _corpus_file(folder: str, name: str, file: str) -> str:
    return storage.join(corpus_folder(folder, name), file)


def _write_table(folder: str, name: str, kind: str, table: pa.Table) -> str:
    content = _encoded(table)
    file = f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    storage.write_bytes(_corpus_file(folder, name, file), content)
    return file


def _encoded(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _read_table(uri: str) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (FileNotFoundError, pa.ArrowInvalid, OSError) as error:
        raise CorpusError(
            f"{uri} cannot be read ({error}); delete its folder and run the ingest again."
        ) from error


def _arrow_name(parquet: str) -> str:
    return parquet.removesuffix(".parquet") + ".arrow"


def _mappable(table: pa.Table) -> pa.Table:
    """One chunk per column, with text offsets of 64 bits so that one chunk can hold any corpus."""
    fields = [f.with_type(pa.large_string()) if f.type == pa.string() else f for f in table.schema]
    return table.cast(pa.schema(fields)).unify_dictionaries().combine_chunks()


def _arrow(table: pa.Table) -> memoryview:
    sink = pa.BufferOutputStream()
    mappable = _mappable(table)
    with pa.ipc.new_file(sink, mappable.schema) as writer:
        writer.write_table(mappable)
    return memoryview(sink.getvalue())


def _mapped_table(parquet: str) -> pa.Table:
    """The table of a corpus: mapped where it is on this machine, else read."""
    place = _arrow_name(parquet)
    if not storage.is_remote(place) and storage.exists(place):
        with pa.memory_map(str(storage.local_path(place))) as source:
            return pa.ipc.open_file(source).read_all()
    return _mappable(_read_table(parquet))
