"""Actions and states at ingest: every episode's are read once, checked, and laid out in one file for training.

An episode whose signals cannot be used keeps its videos; what is wrong is noted. Signals of an earlier ingest whose
files have not changed are copied, not read again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from defi_platform import storage
from defi_platform.config import DecodeConfig
from defi_platform.data.decode.messages import EpisodeSignals, SignalsJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.probe_actors import on_actors, one_process
from defi_platform.data.manifest.table import SIGNAL_INDEX_SCHEMA, Corpus
from defi_platform.data.rejection import TRANSIENT_REASON, BadVideo
from defi_platform.data.sources.records import Note, SignalNames, VideoRecord
from defi_platform.data.tables.parquet_io import ROWS_PER_PART, content_hash, to_rows, to_table
from defi_platform.data.tables.signal_file import SignalFile, SignalLayout, Steps, write_signals
from defi_platform.data.tables.temp_database import TempDatabase
from defi_platform.errors import CorpusError

FEW_EPISODES = 512
"""Up to so many are read from this process: actors would start for longer than that takes."""

TABLES = (
    "CREATE TABLE known (uri, episode_id, version, first, count, message, "
    "PRIMARY KEY (uri, episode_id)) WITHOUT ROWID",
    # Where the numbers of an episode lie among the staged ones, and in the file that is made of them.
    "CREATE TABLE episodes (uri, episode_id, version, place, count, action_dim, state_dim, message, first, "
    "PRIMARY KEY (uri, episode_id)) WITHOUT ROWID",
)

Episode = tuple[str, str, str]
"""URI of its signals, its id, version of the file."""

Read = tuple[Episode, EpisodeSignals | BadVideo]


class SignalStage:
    """Signals of one corpus on their way from their files to a table.

    Args:
        folder: for the numbers of all episodes, on local disk.
        source: format of the corpus.
        names: of the entries of actions and states.
    """

    def __init__(self, folder: Path, source: str, names: SignalNames) -> None:
        self._folder, self._source, self._names = folder, source, names
        self._database = TempDatabase(*TABLES)
        self._staged: BinaryIO = (folder / "staged").open("w+b")
        self._layout: SignalLayout | None = None
        self.table = ""
        """Name of the table; "" while or where there is none."""
        self.unread = 0
        """Episodes whose signals the store did not give: they are asked for again by the next ingest."""

    def close(self) -> None:
        """Drops everything."""
        self._staged.close()
        self._database.close()

    def read(
        self, episodes: Iterable[Episode], before: Corpus | None, limits: DecodeConfig, pool: DecoderPool
    ) -> Iterator[int]:
        """Reads the signals of all episodes, and yields 1 for each.

        Args:
            episodes: of the corpus, each once, in order.
            before: the corpus as it was committed before.
            limits: of the processes that read.
            pool: that reads few episodes.
        """
        earlier = self._load_known(before)
        todo = self._copied(episodes, earlier)
        first = list(itertools.islice(todo, FEW_EPISODES + 1))
        if len(first) <= FEW_EPISODES:
            for episode, answer in _read(pool, self._source, first):
                self._keep(episode, answer)
                yield 1
            return
        # How many there are beyond is not known; enough that every CPU may have an actor.
        requests = itertools.chain(first, todo)
        for episode, answer in on_actors(SignalActor, (limits, self._source), requests, len(first) * 64):
            self._keep(episode, answer)
            yield 1

    def write(self, uri: str) -> None:
        """Lays out the episodes that can be used, in order, in a table below the folder `uri`; none where there are none.

        Where episodes differ in their widths, the most frequent ones count.
        """
        widths = list(
            self._database.select(
                "SELECT action_dim, state_dim, count(*) FROM episodes WHERE message IS NULL "
                "GROUP BY action_dim, state_dim ORDER BY count(*) DESC, action_dim, state_dim"
            )
        )
        if not widths:
            return
        action_dim, state_dim, _ = widths[0]
        self._database.execute(
            "UPDATE episodes SET message = 'actions of ' || action_dim || ' and states of ' || state_dim || "
            "' numbers, most episodes of the corpus have ' || ? || ' and ' || ? "
            "WHERE message IS NULL AND (action_dim <> ? OR state_dim <> ?)",
            (action_dim, state_dim, action_dim, state_dim),
        )
        self._database.execute(
            "UPDATE episodes SET first = sums.total - sums.count FROM (SELECT uri, episode_id, count, "
            "sum(count) OVER (ORDER BY uri, episode_id) AS total FROM episodes WHERE message IS NULL) AS sums "
            "WHERE episodes.uri = sums.uri AND episodes.episode_id = sums.episode_id"
        )
        action_names, state_names = (
            names if len(names) == width else ()
            for names, width in ((self._names.action, action_dim), (self._names.state, state_dim))
        )
        layout = SignalLayout(action_dim, state_dim, action_names, state_names, self._centres(state_dim))
        local = self._folder / "signals.arrow"
        write_signals(local, layout, self._steps())
        self.table = f"signals-{content_hash(local)}.arrow"
        if not storage.exists(storage.join(uri, self.table)):
            storage.put_file(local, storage.join(uri, self.table))
        local.unlink()

    def place(self, record: VideoRecord, frames: int) -> tuple[int, int] | None:
        """(first row in the table, steps) of an episode; None where its signals cannot be used.

        Args:
            record: one of its videos.
            frames: of that video.
        """
        key = (record.signals_uri, record.episode_id)
        query = "SELECT first, count, message FROM episodes WHERE uri = ? AND episode_id = ?"
        first, count, message = next(self._database.select(query, key), (None, 0, "not read"))
        if message is not None:
            return None
        # The last frame need not have an action.
        if not frames - 1 <= count <= frames:
            self._database.execute(
                "UPDATE episodes SET message = ? WHERE uri = ? AND episode_id = ?",
                (f"{count} rows of actions for {frames} frames of camera {record.camera}", *key),
            )
            return None
        return int(first), int(count)

    def notes(self) -> Iterator[Note]:
        """Yields a note per episode whose signals cannot be used."""
        query = (
            "SELECT uri, episode_id, message FROM episodes WHERE message IS NOT NULL ORDER BY uri, episode_id"
        )
        for uri, episode_id, message in self._database.select(query):
            yield Note(kind="bad_actions", item=episode_id, uri=uri, message=message)

    def index(self) -> pa.RecordBatchReader:
        """All episodes by `SIGNAL_INDEX_SCHEMA`; those that the store did not give are left out."""
        rows = self._database.select(
            "SELECT uri, episode_id, version, first, count, message FROM episodes "
            "WHERE message IS NULL OR place IS NOT NULL ORDER BY uri, episode_id"
        )
        parts = iter(lambda: list(itertools.islice(rows, ROWS_PER_PART)), [])
        batches = (batch for part in parts for batch in to_table(part, SIGNAL_INDEX_SCHEMA).to_batches())
        return pa.RecordBatchReader.from_batches(SIGNAL_INDEX_SCHEMA, batches)

    # ----------------------------------------------------------------------- inside

    def _load_known(self, before: Corpus | None) -> SignalFile | None:
        """Takes the index of the committed corpus. Returns: its table, if there is one."""
        if before is None or not before.committed.signals:
            return None
        try:
            earlier = SignalFile(storage.join(before.folder, before.committed.signals))
            for table in before.signal_index():
                # What was wrong with an episode may lie in its video, so it is read again.
                usable = (row for row in to_rows(table) if row[-1] is None)
                self._database.execute_many("INSERT OR REPLACE INTO known VALUES (?, ?, ?, ?, ?, ?)", usable)
        except CorpusError as error:
            print(f"ingest: {error} The signals are read again.", flush=True)
            return None
        return earlier

    def _copied(self, episodes: Iterable[Episode], earlier: SignalFile | None) -> Iterator[Episode]:
        """Copies what `earlier` has, and yields the other episodes."""
        query = "SELECT first, count FROM known WHERE uri = ? AND episode_id = ? AND version = ?"
        for episode in episodes:
            found = None if earlier is None else next(self._database.select(query, episode), None)
            if earlier is None or found is None:
                yield episode
            else:
                self._keep(episode, EpisodeSignals(earlier.actions(*found), earlier.states(*found)))

    def _keep(self, episode: Episode, answer: EpisodeSignals | BadVideo) -> None:
        insert = "INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)"
        if isinstance(answer, BadVideo):
            unread = answer.reason == TRANSIENT_REASON
            self.unread += unread
            message = (
                answer.message if answer.reason == "bad_source" else f"{answer.reason}: {answer.message}"
            )
            self._database.add(insert, (*episode, None if unread else 0, 0, 0, 0, message))
            return
        place = self._staged.seek(0, 2)
        self._staged.write(np.ascontiguousarray(np.concatenate([answer.actions, answer.states], axis=1)).data)
        widths = (answer.actions.shape[1], answer.states.shape[1])
        self._database.add(insert, (*episode, place, len(answer.actions), *widths, None))

    def _steps(self) -> Iterator[Steps]:
        """The usable episodes in their order."""
        query = "SELECT place, count, action_dim, state_dim FROM episodes WHERE message IS NULL ORDER BY uri, episode_id"
        for place, count, action_dim, state_dim in self._database.select(query):
            self._staged.seek(place)
            content = self._staged.read(4 * count * (action_dim + state_dim))
            values = np.frombuffer(content, np.float32).reshape(count, -1)
            yield values[:, :action_dim], values[:, action_dim:]

    def _centres(self, state_dim: int) -> tuple[float, ...]:
        """Mean direction of each entry of the states."""
        sums = np.zeros((2, state_dim))
        for _, states in self._steps():
            wide = states.astype(np.float64)
            sums += [np.cos(wide).sum(axis=0), np.sin(wide).sum(axis=0)]
        return tuple(np.round(np.arctan2(sums[1], sums[0]), 4).tolist())


class SignalActor:
    """Reads blocks of episodes in its own decoder process.

    Args:
        limits: of the process.
        source: format of the corpus.
    """

    def __init__(self, limits: DecodeConfig, source: str) -> None:
        self._pool = one_process(limits)
        self._source = source

    def probe(self, block: list[Episode]) -> list[Read]:
        """Reads the episodes of a block."""
        return list(_read(self._pool, self._source, block))


def _read(pool: DecoderPool, source: str, episodes: list[Episode]) -> Iterator[Read]:
    answers = pool.run(SignalsJob(source, uri, episode_id) for uri, episode_id, _ in episodes)
    for episode, answer in zip(episodes, answers, strict=True):
        assert isinstance(answer, EpisodeSignals | BadVideo)
        yield episode, answer
