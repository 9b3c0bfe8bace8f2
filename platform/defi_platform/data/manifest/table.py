"""The manifest: one row per usable video, as Parquet, with what else ingest knows of each corpus.

    <folder>/corpora/<name>/videos-<hash>.parquet       rows of a corpus
    <folder>/corpora/<name>/videos-<hash>.arrow         the same, laid out to be mapped into memory, not read
    <folder>/corpora/<name>/rejected-<hash>.parquet     what ingest rejected, with its reason
    <folder>/corpora/<name>/opened-<hash>.parquet       what every file was found to be, see probe_results.py
    <folder>/corpora/<name>/noted-<hash>.parquet        what else there is to say of the corpus, see notes.py
    <folder>/corpora/<name>/signals-<hash>.arrow        actions and states of all steps, see tables/signal_file.py
    <folder>/corpora/<name>/signal_index-<hash>.parquet the episodes in it, and those whose signals are unusable
    <folder>/corpora/<name>/committed.json              written last, see commit_marker.py

The order of rows is part of the contract, since the plan counts on it: corpora as configured, then `video_id`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.manifest.commit_marker import (
    Committed,
    arrow_name,
    corpus_file,
    corpus_folder,
    marker_of,
    read_committed,
    write_marker,
)
from defi_platform.data.manifest.notes import NOTES_SCHEMA, counted
from defi_platform.data.tables.mmap_table import MappedTable, write_mappable
from defi_platform.data.tables.parquet_io import ROWS_PER_PART, read_parts, read_table, write_rows
from defi_platform.errors import CorpusError
from defi_platform.storage.scratch import scratch

NAMES = pa.dictionary(pa.int16(), pa.string())
"""Texts of which a corpus has few: two bytes per row."""

SIGNAL_INDEX_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("uri", "episode_id", "version")),
        *((name, pa.int64()) for name in ("first", "count")),
        ("message", pa.string()),
    ]
)
"""Of an episode's signals: their file and its version, the rows they take in the table, what is wrong with them."""

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
        ("first_action", pa.int32()),
        ("first_frame", pa.int32()),
        ("decoder", NAMES),
        ("seek_index", pa.binary()),
        ("variable_rate", pa.bool_()),
        ("signals", NAMES),
        ("signals_row", pa.int64()),
        ("bad_actions", pa.bool_()),
        ("version", pa.string()),
        ("times", pa.list_(pa.float32())),
        ("luma", pa.float32()),
        ("motion", pa.float32()),
        ("sharpness", pa.float32()),
    ]
)
"""`first_frame`: where the video starts in its file; `signals`, `signals_row`: the table of its actions beside this one,
and the row there of its first action, from which `num_actions` follow; `bad_actions`: its source has actions that
cannot be used; `first_action`: number of the action at a window's first frame, in its episode; null for whole episodes.
`version`: of the file, as its store knows it. `width` and `height` are as displayed, after rotation.
`seek_index`: packed `decode.seek_index.SeekIndex`, as much as the row's frames need; null for stored pictures.
`times`: seconds of each frame from the video's first on, where `variable_rate`; else null.
`luma`, `motion`, `sharpness`: see `quality_filters.Scores`; null where no filter asked."""

GROUP_BATCHES = 25
"""Batches of a row group; a larger one compresses better, and is in memory as a whole when it is written."""


@dataclass(frozen=True)
class Corpus:
    """One committed corpus; its tables are read when they are asked for, since an unchanged one needs none."""

    folder: str
    """Of its tables."""
    committed: Committed

    def rejected(self) -> Iterator[pa.Table]:
        """By `quarantine.QUARANTINE_SCHEMA`, some rows at a time. Raises: CorpusError."""
        return read_parts(storage.join(self.folder, self.committed.rejected))

    def opened(self) -> Iterator[pa.Table]:
        """By `probe_results.RESULT_SCHEMA`: one row per file, some at a time. Raises: CorpusError."""
        return read_parts(storage.join(self.folder, self.committed.opened))

    def signal_index(self) -> Iterator[pa.Table]:
        """By `SIGNAL_INDEX_SCHEMA`: one row per episode, some at a time. Raises: CorpusError."""
        return read_parts(storage.join(self.folder, self.committed.signal_index))

    def noted(self) -> Iterator[pa.Table]:
        """By `notes.NOTES_SCHEMA`, some rows at a time. Raises: CorpusError."""
        return read_parts(storage.join(self.folder, self.committed.noted))


class Manifest:
    """The usable videos of all corpora, in plan order.

    Args:
        parts: one table per corpus in the order of `names`; mapped from disk where it is local.
        folder: where it is stored; None for one made in memory.
        names: corpora in the order of the configuration.
        tables: names of the files that `parts` were read from; None for one made in memory.
    """

    def __init__(
        self,
        parts: Sequence[MappedTable],
        folder: str | None,
        names: Sequence[str],
        tables: Sequence[str] | None = None,
    ) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0] + [len(part) for part in parts])
        self.folder, self.names = folder, tuple(names)
        self._tables = None if tables is None else tuple(tables)
        self.reused: tuple[str, ...] = ()
        """Corpora that ingest found unchanged."""

    @classmethod
    def open(
        cls, folder: str, names: Sequence[str] | None = None, tables: Mapping[str, str] | None = None
    ) -> Manifest:
        """Opens the manifest in `folder`, all its corpora or those in `names`.

        Args:
            folder: of the manifest.
            names: corpora, in the order that the rows shall have; None: all there are.
            tables: corpus -> the version of it to open, from `Manifest.tables`; corpora that are not in it are
                opened in their newest version.

        Raises: CorpusError when there is none, or a version is gone.
        """
        present = storage.names(storage.join(folder, "corpora"))
        chosen = tuple(names) if names is not None else tuple(present)
        opened: dict[str, str] = {}
        for name in chosen:
            if tables is not None and name in tables:
                opened[name] = tables[name]
                continue
            committed = read_committed(folder, name)
            if committed is None:
                raise CorpusError(
                    f"{folder} has no committed manifest of corpus '{name}' that this version can read. "
                    f"There is: {', '.join(present) or 'nothing'}. Run the ingest first."
                )
            opened[name] = committed.videos
        if not opened:
            raise CorpusError(f"{folder} holds no manifest. Run the ingest first.")
        parts = [_mapped_table(folder, name, table) for name, table in opened.items()]
        return cls(parts, storage.absolute(folder), chosen, tuple(opened.values()))

    @property
    def tables(self) -> dict[str, str]:
        """Corpus -> name of its table, a hash of all its rows: the version of the manifest. {} for one in memory."""
        return dict(zip(self.names, self._tables or (), strict=False))

    @property
    def table(self) -> pa.Table:
        """All rows as one table; for small manifests and tests."""
        return pa.concat_tables([part.table for part in self._parts]).cast(SCHEMA)

    def columns(self, *names: str) -> pa.Table:
        """Some columns of all rows, not copied."""
        return pa.concat_tables(
            [part.table.select(list(names)) for part in self._parts], promote_options="permissive"
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def corpus(self, name: str) -> tuple[int, MappedTable]:
        """(number of the first row, rows) of one corpus. Raises: ValueError."""
        number = self.names.index(name)
        return int(self._starts[number]), self._parts[number]

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column as an array of one entry per row; nulls are 0."""
        parts = [part.numbers(column) for part in self._parts]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def numbers_at(self, column: str, rows: np.ndarray) -> np.ndarray:
        """A numeric column at `rows` alone."""
        if len(self._parts) == 1:
            return np.asarray(self._parts[0].numbers(column)[rows])
        part_of = self._part_of(rows)
        kind = self._parts[0].numbers(column).dtype
        values = np.empty(rows.shape, kind)
        for number in np.unique(part_of):
            chosen = part_of == number
            values[chosen] = self._parts[number].numbers(column)[rows[chosen] - self._starts[number]]
        return values

    def rows_where(self, column: str) -> np.ndarray:
        """int64: rows whose flag is set, in order."""
        starts = self._starts[:-1].tolist()
        return np.concatenate(
            [part.where(column) + start for start, part in zip(starts, self._parts, strict=True)]
        )

    def codes(self, column: str) -> tuple[np.ndarray, list[str]]:
        """A text column as (code per row, texts by code)."""
        texts: dict[str, int] = {}
        found = []
        for part in self._parts:
            indices, local_texts = part.codes(column)
            local = [texts.setdefault(text, len(texts)) for text in local_texts]
            same = local == list(range(len(local)))
            found.append(indices if same else np.asarray(local, indices.dtype)[indices])
        return np.concatenate(found) if len(found) > 1 else found[0], list(texts)

    def take(self, column: str, rows: np.ndarray) -> list[Any]:
        """Values of a column at `rows`."""
        part_of = self._part_of(rows)
        values: list[Any] = [None] * len(rows)
        for number in np.unique(part_of):
            chosen = np.flatnonzero(part_of == number)
            taken = self._parts[number].take(column, rows[chosen] - self._starts[number])
            for position, value in zip(chosen.tolist(), taken, strict=True):
                values[position] = value
        return values

    def row(self, index: int) -> dict[str, Any]:
        """One row as a mapping."""
        part = int(self._part_of(np.array([index]))[0])
        return self._parts[part].row(index - int(self._starts[part]))

    def _part_of(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(np.searchsorted(self._starts, rows, side="right") - 1)

    def find(self, wanted: Mapping[tuple[str, str, str], str]) -> dict[int, str]:
        """Row -> value for every (corpus, video_id, version) in `wanted` that the manifest has."""
        ids = pa.array(sorted({video_id for _, video_id, _ in wanted}))
        found = {}
        for start, part in zip(self._starts.tolist(), self._parts, strict=False):
            column = part.table.column("video_id")
            hits = pc.is_in(column, value_set=ids.cast(column.type)).to_numpy()
            for row in (np.flatnonzero(hits) + start).tolist():
                video = self.row(row)
                value = wanted.get((video["corpus"], video["video_id"], video["version"]))
                if value is not None:
                    found[row] = value
        return found

    def fingerprint(self, names: Iterable[str] | None = None) -> str:
        """Changes when anything in a row of these corpora does, in whatever column.

        Args:
            names: corpora, in any order; None: all.
        """
        digest = hashlib.sha256()
        for name in sorted(self.names if names is None else names):
            number = self.names.index(name)
            table = self._tables[number] if self._tables else _content_name(self._parts[number].table)
            digest.update(repr((name, table)).encode())
        return digest.hexdigest()[:16]

    def __reduce__(self) -> tuple[Any, ...]:
        # Sent to decode actors by name: ten million rows should not travel with every actor.
        if self.folder is None:
            return _in_memory, ([part.table for part in self._parts], self.names)
        return _opened_once, (self.folder, self.names, self._tables)


@functools.lru_cache(maxsize=4)
def _opened_once(folder: str, names: tuple[str, ...], tables: tuple[str, ...]) -> Manifest:
    return Manifest.open(folder, names, dict(zip(names, tables, strict=True)))


def _in_memory(tables: Sequence[pa.Table], names: tuple[str, ...]) -> Manifest:
    return Manifest([MappedTable(table) for table in tables], None, names)


# --------------------------------------------------------------------------- storage


def commit_corpus(
    folder: str,
    name: str,
    videos: pa.RecordBatchReader,
    rejected: pa.RecordBatchReader,
    opened: pa.RecordBatchReader,
    settings: dict[str, Any],
    noted: pa.RecordBatchReader | None = None,
    signals: tuple[str, pa.RecordBatchReader] | None = None,
) -> Committed:
    """Stores the tables of a corpus; they count once the marker, written last, is there.

    The rows that it replaces stay, see `prune_tables`.

    Args:
        folder: of the manifest.
        name: of the corpus.
        videos: rows by `SCHEMA`, in order of `video_id`.
        rejected: rows by `quarantine.QUARANTINE_SCHEMA`.
        opened: rows by `probe_results.RESULT_SCHEMA`.
        settings: what the rows depend on besides the files.
        noted: rows by `notes.NOTES_SCHEMA`; None: nothing to note.
        signals: name of the table of signals, which is there, and rows by `SIGNAL_INDEX_SCHEMA`; None: no actions.
    """
    before = marker_of(folder, name) or {}
    names: dict[str, str] = {}
    noted = NOTES_SCHEMA.empty_table().to_reader() if noted is None else noted
    tables = {"videos": videos, "rejected": rejected, "opened": opened, "noted": noted}
    if signals is not None:
        tables["signal_index"] = signals[1]
    with scratch("manifest") as staging:
        for kind, rows in tables.items():
            local = staging / f"{kind}.parquet"
            # Files of long videos have results of many kilobytes each.
            content = write_rows(local, rows, batches_per_group=1 if kind == "opened" else GROUP_BATCHES)
            names[kind] = f"{kind}-{content}.parquet"
            storage.put_file(local, corpus_file(folder, name, names[kind]))
        laid_out = staging / "videos.arrow"
        counts = {"videos": write_mappable(staging / "videos.parquet", laid_out)}
        storage.put_file(laid_out, corpus_file(folder, name, arrow_name(names["videos"])))
        for reason in pq.read_table(staging / "rejected.parquet", columns=["reason"])[0].to_pylist():
            counts[reason] = counts.get(reason, 0) + 1
        notes = counted(staging / "videos.parquet", staging / "noted.parquet")
    earlier = dict(before.get("earlier", {}))
    if before.get("videos"):
        earlier[before["videos"]] = time.time()
    earlier.pop(names["videos"], None)
    committed = Committed(
        names["videos"],
        names["rejected"],
        names["opened"],
        settings,
        counts,
        noted=names["noted"],
        notes=notes,
        earlier=earlier,
        signals=signals[0] if signals else "",
        signal_index=names.get("signal_index", ""),
    )
    write_marker(folder, name, committed)
    # Only what the marker before named: other tables may be those of an ingest that is about to commit.
    for kind in ("rejected", "opened", "noted", "signal_index"):
        if before.get(kind) and before[kind] != names.get(kind):
            storage.delete(corpus_file(folder, name, before[kind]))
    return committed


def read_corpus(folder: str, name: str) -> Corpus | None:
    """The committed tables of one corpus; None when there are none."""
    committed = read_committed(folder, name)
    return None if committed is None else Corpus(corpus_folder(folder, name), committed)


def _mapped_table(folder: str, name: str, table: str) -> MappedTable:
    """The table of a corpus: mapped where it is on this machine, else read. Raises: CorpusError."""
    parquet = corpus_file(folder, name, table)
    arrow = arrow_name(parquet)
    if not storage.is_remote(arrow) and storage.exists(arrow):
        with contextlib.suppress(ValueError, OSError):  # cut short: the Parquet table says the same
            return MappedTable.open(storage.local_path(arrow))
    if not storage.exists(parquet):
        raise CorpusError(
            f"{parquet} is gone: corpus '{name}' in the version that was asked for; another one may not stand in for "
            "it. It was pruned, or is of another manifest. Restore it, or begin again with the newest version."
        )
    return MappedTable(read_table(parquet))


def _content_name(table: pa.Table) -> str:
    """The name that rows in memory would be stored under."""
    rows = table.cast(SCHEMA).to_reader(ROWS_PER_PART)
    with scratch("manifest") as staging:
        return f"videos-{write_rows(staging / 'videos.parquet', rows, GROUP_BATCHES)}.parquet"
