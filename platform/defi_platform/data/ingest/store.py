"""The videos of one corpus on their way from listing to manifest, in a private database.

A video is listed as a `VideoRecord`, its file is probed (once, however many videos lie in it), and it ends accepted, as
rows of the manifest, or rejected, as a row of the quarantine. The database is gone with its process, whatever ends that:
what a killed ingest has found lies in the manifest's folder, see `probe_results`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import operator
import pickle
import sqlite3
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa

from defi_platform.config import DecodeConfig
from defi_platform.data.ingest.manifest_rows import rejection
from defi_platform.data.ingest.near_duplicates import BITS, WORDS, near_duplicates
from defi_platform.data.ingest.probe_actors import ProbeRequest
from defi_platform.data.ingest.probe_results import RESULT_SCHEMA, ProbeResult, limit_of, result_of, row_of
from defi_platform.data.manifest.notes import NOTES_SCHEMA
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.data.manifest.quarantine import QUARANTINE_SCHEMA, strict_error
from defi_platform.data.manifest.split import TRAIN, VALIDATION, hash_position, held_out, joined
from defi_platform.data.manifest.table import SCHEMA
from defi_platform.data.rejection import TRANSIENT_REASON, BadVideo
from defi_platform.data.sources.records import Note, RejectedRecord, VideoRecord
from defi_platform.data.tables.parquet_io import ROWS_PER_PART, Row, to_rows, to_table
from defi_platform.data.tables.temp_database import ADDED_AT_ONCE, TempDatabase

SQL_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL", int | None: "INTEGER", float | None: "REAL"}

FIELDS = {name: SQL_TYPES[kind] for name, kind in get_type_hints(VideoRecord).items()}

TABLES = (
    f"CREATE TABLE listed ({', '.join(f'[{name}] {kind}' for name, kind in FIELDS.items())}) STRICT",
    "CREATE TABLE probed (uri, version, attempts, content, PRIMARY KEY (uri, version)) WITHOUT ROWID",
    # How often a file was opened in vain by earlier ingests.
    "CREATE TABLE failed (uri, version, attempts, PRIMARY KEY (uri, version)) WITHOUT ROWID",
    "CREATE TABLE ended (state, video_id, number, content, PRIMARY KEY (state, video_id, number)) WITHOUT ROWID",
)

VIDEO_ID, SPLIT = map(SCHEMA.get_field_index, ("video_id", "split"))
REASON, LIMIT, CHANGES = map(RESULT_SCHEMA.get_field_index, ("reason", "limit", "changes"))

FILES = "(SELECT DISTINCT uri, version FROM listed ORDER BY uri, version)"

ATTEMPTS = "coalesce((SELECT attempts FROM failed WHERE failed.uri = {0} AND failed.version = {1}), 0)"

SAME_FILE = "probed.uri = listed.uri AND probed.version = listed.version"

KEEP = (
    "INSERT OR REPLACE INTO probed SELECT ?1, ?2, ?3, ?4 "
    f"WHERE EXISTS (SELECT 1 FROM listed WHERE uri = ?1 AND version = ?2) AND ?3 > {ATTEMPTS.format('?1', '?2')}"
)
"""A result counts for a file that is still listed, and where it is newer than the last failure."""

INSERT_LISTED = f"INSERT INTO listed VALUES ({', '.join('?' * len(FIELDS))})"

UNSTORABLE = (
    UnicodeEncodeError,
    OverflowError,
    sqlite3.IntegrityError,
    sqlite3.ProgrammingError,
    sqlite3.InterfaceError,
)
"""What is raised for a file name that is no text, a count beyond all numbers, a list for a text."""

ACCEPTED, REJECTED, NOTED = "accepted", "rejected", "noted"

VALUES = {
    ACCEPTED: operator.itemgetter(*SCHEMA.names),
    REJECTED: operator.itemgetter(*QUARANTINE_SCHEMA.names),
    NOTED: operator.itemgetter(*NOTES_SCHEMA.names),
}


class VideoStore:
    """The videos of a corpus with what is known of each.

    Args:
        corpus: its name.
        screen: whether a good file's frames have to be scored.
        strict: whether the first rejected video is an error, a CorpusError of whatever method finds it.
        limits: of the decoder; a file that went beyond a lower one is opened again.
    """

    def __init__(
        self, corpus: str, screen: bool = False, strict: bool = False, limits: DecodeConfig | None = None
    ) -> None:
        self._corpus, self._screen, self._strict = corpus, screen, strict
        self._limits = limits or DecodeConfig()
        self._database = TempDatabase(*TABLES)
        self._unstored: list[VideoRecord] = []
        self._signatures, self._signed = array("Q"), array("q")
        self._is_accepted = bytearray()
        """By number of an ended video: 1 or 0."""
        self._is_named = bytearray()
        """By number of an ended video: 1 where its source names it for validation, else 0."""
        self._positions = array("Q")
        """By number of an ended video: the hash position of its group, or else its episode."""
        self._contents = array("Q")
        """By number of an ended video: what its copies share; 0: not known."""
        self._length = self._sum = 0

    def close(self) -> None:
        """Drops everything."""
        self._database.close()

    def add(self, item: VideoRecord | RejectedRecord | Note) -> None:
        """Takes one item of a listing; a record that no table can hold is rejected."""
        # The name of each field again and again would take more time than all the rest.
        content = tuple.__repr__(item) if isinstance(item, VideoRecord) else repr(item)
        self._sum += int.from_bytes(hashlib.sha256(content.encode()).digest()[:16], "big")
        if isinstance(item, Note):
            self.note(item)
            return
        self._length += 1
        if isinstance(item, RejectedRecord):
            self._reject_listed(item, item.reason, item.message)
            return
        self._unstored.append(item)
        if len(self._unstored) >= ADDED_AT_ONCE:
            self._store_listed()

    def __len__(self) -> int:
        return self._length

    def fingerprint(self) -> str:
        """Of what is listed, in whatever order: a sum of hashes, since millions of texts need not be sorted."""
        return f"{self._sum % (1 << 128):032x}"

    def load_committed(self, tables: Iterable[pa.Table]) -> None:
        """Takes the results of the last commit, by `RESULT_SCHEMA`, once everything is listed."""
        self._store_listed()
        self._database.execute("CREATE INDEX by_file ON listed (uri, version)")
        self._database.execute("CREATE INDEX by_id ON listed (video_id)")
        for table in tables:
            rows = list(to_rows(table))
            self._keep(rows)
            self._note_failures(row[:3] for row in rows if row[3] is not None)

    def reject_repeated(self) -> None:
        """Rejects videos whose id has come before: lines of an index that are there twice. After `load_committed`."""
        repeated = "SELECT video_id FROM listed GROUP BY video_id HAVING count(*) > 1"
        for (video_id,) in list(self._database.select(repeated)):
            same = "SELECT rowid, * FROM listed WHERE video_id = ? ORDER BY rowid"
            for number, *fields in list(self._database.select(same, (video_id,)))[1:]:
                self._database.execute("DELETE FROM listed WHERE rowid = ?", (number,))
                item = VideoRecord._make(fields)
                self._reject_listed(item, "bad_source", "another of the same id stands before it")

    def invalidate(self, rejected: pa.Table) -> None:
        """Has files opened again. Args: rejected: rows with `uri`, `version` and `attempts`."""
        # Whoever puts videos into quarantine may leave fields out.
        rows = [
            (uri, version, attempts or 0)
            for uri, version, attempts in to_rows(rejected.select(["uri", "version", "attempts"]))
            if uri is not None and version is not None
        ]
        self._database.execute_many(
            "DELETE FROM probed WHERE uri = ? AND version = ?", (row[:2] for row in rows)
        )
        self._note_failures(rows)

    def load_partial(self, block: pa.Table) -> bool:
        """Takes results, by `RESULT_SCHEMA`, of an ingest that was killed. Returns: whether any was of use."""
        return self._keep(to_rows(block)) > 0

    def todo(self) -> tuple[int, Iterator[ProbeRequest]]:
        """(number of files without a result, these files in order of their uris)."""
        self._database.execute(
            f"CREATE TABLE todo AS SELECT uri, version, 1 + {ATTEMPTS.format('listed.uri', 'listed.version')} "
            f"FROM {FILES} listed WHERE NOT EXISTS (SELECT 1 FROM probed WHERE {SAME_FILE})"
        )
        files = self._database.select("SELECT * FROM todo ORDER BY rowid")
        count = self._database.value("SELECT count(*) FROM todo")
        return count, (ProbeRequest(uri, version, attempts, self._screen) for uri, version, attempts in files)

    def episodes_with_actions(self) -> Iterator[tuple[str, str, str]]:
        """Yields (URI of the signals, id of the episode, version of that file) of every episode that has actions."""
        version = "CASE signals_version WHEN '' THEN version ELSE signals_version END"
        yield from self._database.select(
            f"SELECT signals_uri, episode_id, min({version}) FROM listed WHERE num_actions > 0 AND signals_uri <> '' "
            "GROUP BY signals_uri, episode_id ORDER BY signals_uri, episode_id"
        )

    def num_files(self) -> int:
        """Number of different files that the listed videos lie in."""
        return int(self._database.value(f"SELECT count(*) FROM {FILES}"))

    def any_probed(self) -> bool:
        """Returns whether any file has a result."""
        return bool(self._database.value("SELECT EXISTS (SELECT 1 FROM probed)"))

    def add_result(self, result: ProbeResult) -> None:
        """Takes the result of a file that was opened now."""
        file = (result.uri, result.version)
        content = (*file, result.attempts, pickle.dumps(row_of(result)))
        self._database.add("INSERT OR REPLACE INTO probed VALUES (?, ?, ?, ?)", content)
        if result.bad is not None and self._strict:
            query = "SELECT * FROM listed WHERE uri = ? AND version = ? ORDER BY rowid"
            first = VideoRecord._make(next(self._database.select(query, file)))
            self.reject(rejection(self._corpus, first, result.bad, result.attempts))

    def probed(self) -> Iterator[tuple[VideoRecord, ProbeResult]]:
        """Every listed video, in order of the ids, with the result of its file."""
        last, result = b"", None
        for row in self._database.select(
            "SELECT listed.*, content FROM listed INDEXED BY by_id CROSS JOIN probed "
            f"ON {SAME_FILE} ORDER BY listed.video_id, listed.rowid"
        ):
            # Hundreds of episodes may share a file, and a file's times and scores be long.
            if result is None or row[-1] != last:
                last, result = row[-1], result_of(pickle.loads(row[-1]))
            yield VideoRecord._make(row[:-1]), result

    def accept(self, row: dict[str, Any], signature: tuple[int, ...] = ()) -> None:
        """Takes a row of the manifest with its `group` and `content`. Args: signature: by which near-duplicates are found."""
        number = self._end(ACCEPTED, row)
        if signature:
            self._signatures.extend(signature)
            self._signed.append(number)

    def reject(self, row: dict[str, Any]) -> None:
        """Takes a row of the quarantine."""
        row = _printable(row)
        if self._strict:
            raise strict_error(row)
        self._end(REJECTED, row)

    def note(self, note: Note) -> None:
        """Takes a note, which is about no rejected video and ends no strict ingest."""
        row = _printable(dataclasses.asdict(note))
        self._end(NOTED, row | {"video_id": row["item"]})

    def reject_duplicates(self, most_bits: int) -> None:
        """Rejects every accepted video that repeats an earlier one. Args: most_bits: see `near_duplicates`."""
        if not self._signed:
            return
        signatures = np.frombuffer(self._signatures, np.uint64).reshape(-1, WORDS)
        self._database.execute("CREATE INDEX by_number ON ended (number)")
        query = "SELECT content FROM ended WHERE number = ?"
        partly: list[int] = []
        for late, (early, bits) in near_duplicates(signatures, most_bits, partly).items():
            number = (self._signed[late],)
            video = dict(zip(SCHEMA.names, pickle.loads(self._database.value(query, number)), strict=True))
            same = pickle.loads(self._database.value(query, (self._signed[early],)))[VIDEO_ID]
            message = f"{bits} of {BITS} bits from {same}, filters.duplicate_bits={most_bits}"
            self._database.execute("DELETE FROM ended WHERE number = ?", number)
            self._is_accepted[number[0]] = 0
            item = RejectedRecord(
                reason="duplicate", message=message, **{n: video[n] for n in ("video_id", "uri", "version")}
            )
            self._end(REJECTED, rejection(self._corpus, item, BadVideo(item.reason, message), attempts=1))
        if partly:
            message = f"{len(partly)} videos, held against some of those that look nearly the same; fewer bits tell more"
            self.note(Note(kind="skipped", item="filters.duplicate_bits", uri="", message=message))

    def accepted(self, holdout: float, project: ProjectSplit | None = None) -> pa.RecordBatchReader:
        """The manifest's rows in order of the ids, each with its split.

        Args:
            holdout: see `held_out`; where the source itself names videos for validation, all others train. One that
                names none, such as a folder of training videos alone, is split like others.
            project: its decisions count before those of the hash; None: there are none.
        """
        numbers = np.flatnonzero(np.frombuffer(self._is_accepted, np.bool_))
        of_source = np.frombuffer(self._is_named, np.bool_)[numbers]
        named = bool(of_source.any())
        positions, contents = (
            np.frombuffer(values, np.uint64)[numbers] for values in (self._positions, self._contents)
        )
        held = np.zeros(len(self._positions), bool)
        if project is not None:
            held[numbers] = project.decide(
                self._corpus, positions, contents, holdout, of_source if named else None
            )
        elif not named:
            held[numbers] = held_out(joined(positions, contents), holdout)
        rows = (
            row
            if named and row[SPLIT]
            else (*row[:SPLIT], VALIDATION if held[number] else TRAIN, *row[SPLIT + 1 :])
            for number, row in self._ended(ACCEPTED)
        )
        return _reader(rows, SCHEMA)

    def rejected(self) -> pa.RecordBatchReader:
        """The quarantine's rows in order of the ids."""
        return _reader((row for _, row in self._ended(REJECTED)), QUARANTINE_SCHEMA)

    def noted(self) -> pa.RecordBatchReader:
        """The notes in order of their items."""
        return _reader((row for _, row in self._ended(NOTED)), NOTES_SCHEMA)

    def results(self) -> pa.RecordBatchReader:
        """The results of all files, by `RESULT_SCHEMA`."""
        contents = self._database.select("SELECT content FROM probed ORDER BY uri, version")
        return _reader((pickle.loads(content) for (content,) in contents), RESULT_SCHEMA)

    def _store_listed(self) -> None:
        rows, self._unstored = self._unstored, []
        while rows:
            stored = self._database.changes
            try:
                self._database.execute_many(INSERT_LISTED, rows)
                return
            except UNSTORABLE as error:
                # Those before it are stored.
                stored = self._database.changes - stored
                self._reject_listed(rows[stored], "bad_source", f"{type(error).__name__}: {error}")
                rows = rows[stored + 1 :]

    def _reject_listed(self, item: VideoRecord | RejectedRecord, reason: str, message: str) -> None:
        self.reject(rejection(self._corpus, item, BadVideo(reason, message), attempts=1))

    def _keep(self, rows: Iterable[Row]) -> int:
        """Takes those of earlier results that say all that is asked. Returns: how many."""
        usable = [
            (*row[:3], pickle.dumps(row))
            for row in rows
            # A file that did not come is asked for again, a good one whose frames were not scored is opened again.
            if row[REASON] != TRANSIENT_REASON
            and not self._limit_raised(row)
            and not (self._screen and row[REASON] is None and row[CHANGES] is None)
        ]
        self._database.execute_many(KEEP, usable)
        return len(usable)

    def _limit_raised(self, row: Row) -> bool:
        limit = limit_of(row[REASON], self._limits)
        return limit is not None and row[LIMIT] is not None and bool(row[LIMIT] < limit)

    def _note_failures(self, rows: Iterable[Row]) -> None:
        self._database.execute_many(
            "INSERT INTO failed VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET attempts = max(attempts, excluded.attempts)",
            rows,
        )

    def _end(self, state: str, row: dict[str, Any]) -> int:
        number, content = len(self._positions), pickle.dumps(VALUES[state](row))
        self._is_accepted.append(state == ACCEPTED)
        self._is_named.append(row.get("split") == VALIDATION)
        self._positions.append(hash_position(row.get("group") or row.get("episode_id") or row["video_id"]))
        self._contents.append(row.get("content") or 0)
        self._database.add("INSERT INTO ended VALUES (?, ?, ?, ?)", (state, row["video_id"], number, content))
        return number

    def _ended(self, state: str) -> Iterator[tuple[int, Row]]:
        query = "SELECT number, content FROM ended WHERE state = ? ORDER BY video_id, number"
        return ((number, pickle.loads(content)) for number, content in self._database.select(query, (state,)))


def _printable(row: dict[str, Any]) -> dict[str, Any]:
    # Names that are no text are written as Python would print them.
    return {
        n: v.encode("utf-8", "backslashreplace").decode() if isinstance(v, str) else v for n, v in row.items()
    }


def _reader(rows: Iterator[Row], schema: pa.Schema) -> pa.RecordBatchReader:
    parts = iter(lambda: list(itertools.islice(rows, ROWS_PER_PART)), [])
    batches = (batch for part in parts for batch in to_table(part, schema).to_batches())
    return pa.RecordBatchReader.from_batches(schema, batches)
