"""The files of a corpus and what is known of each: from earlier ingests, or by opening them now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from defi_platform.data.ingest.listing import claims_of
from defi_platform.data.ingest.probe_actors import ProbeRequest
from defi_platform.data.ingest.probe_results import SCHEMA, ProbeResult, table_of, verdicts_of
from defi_platform.data.rejection import TRANSIENT_REASON
from defi_platform.data.sources.records import VideoRecord
from defi_platform.data.tables.arrow_spill import ROWS_AT_ONCE, Spool
from defi_platform.data.tables.mmap_table import to_numpy

KEY = np.dtype("V16")
"""Half a SHA-256 of uri and version: ten million files fit into 160 MB, and two that share one would be a wonder."""

KEY_COLUMNS = ("uri", "version")


class Judged:
    """The different files that claims lie in, by number, and their verdicts.

    Args:
        claims: with the columns of `listed.CLAIMS`.
        screen: whether a good file's frames have to be scored.
    """

    def __init__(self, claims: Spool, screen: bool) -> None:
        self._claims = claims
        self._screen = screen
        keys = np.concatenate([np.empty(0, KEY), *map(_keys, claims.batches(*KEY_COLUMNS))])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        first = np.append(np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1])
        self._keys = keys[first]
        self._claim = order[first]
        """Per file the first claim that lies in it."""
        self._verdict = np.full(len(self._keys), -1, np.int64)
        """Per file its row in `_verdicts`; -1 while it has none."""
        self._tried = np.zeros(len(self._keys), np.int32)
        """Per file how many ingests opened it in vain."""
        self._reopen = np.zeros(len(self._keys), bool)
        self._verdicts = Spool(SCHEMA)
        self._waiting: list[ProbeResult] = []

    def __len__(self) -> int:
        return len(self._keys)

    def reopen(self, rejected: pa.Table) -> None:
        """Has files opened again. Args: rejected: rows with `uri`, `version` and `attempts`; before `remember`."""
        files, there = self._find(rejected)
        self._reopen[files] = True
        np.maximum.at(self._tried, files, to_numpy(rejected.column("attempts"))[there])

    def remember(self, opened: pa.Table) -> None:
        """Takes verdicts of the last commit. Args: opened: by `verdicts.SCHEMA`."""
        files, there = self._find(opened)
        opened = opened.filter(pa.array(there))
        bad = to_numpy(pc.is_valid(opened.column("reason")).cast(pa.uint8())).astype(bool)
        tried = bad & ~self._reopen[files]
        self._tried[files[tried]] = to_numpy(opened.column("attempts"))[tried]
        passing = to_numpy(
            pc.fill_null(pc.equal(opened.column("reason"), TRANSIENT_REASON), False).cast(pa.uint8())
        )
        self._keep(opened, files, ~self._reopen[files] & ~passing.astype(bool) & self._usable(opened))

    def go_on(self, block: pa.Table) -> bool:
        """Takes verdicts of an ingest that was killed: they are newer than the last commit, or the same.

        Returns: whether there was any of use. Args: block: by `verdicts.SCHEMA`.
        """
        usable = self._usable(block)
        files, there = self._find(block)
        newer = to_numpy(block.column("attempts"))[there] > self._tried[files]
        self._keep(block.filter(pa.array(there)), files, usable[there] & newer)
        return bool(usable.any())

    def openings(self) -> tuple[int, Iterator[ProbeRequest]]:
        """(how many files have no verdict, these files in order of their uris)."""
        todo = np.flatnonzero(self._verdict < 0)
        todo = todo[np.argsort(self._claim[todo])]  # as they came, which is nearly their order
        found = self._claims.in_order(self._claim[todo], "uri")
        uris = pa.chunked_array([c for table in found for c in table.column("uri").chunks], pa.string())
        todo = todo[to_numpy(pc.sort_indices(uris))]
        return len(todo), self._openings(todo)

    @property
    def any_known(self) -> bool:
        """Whether any file has a verdict."""
        return bool((self._verdict >= 0).any())

    def add(self, verdict: ProbeResult) -> None:
        """Takes the verdict of a file that was opened now."""
        self._waiting.append(verdict)
        if len(self._waiting) >= ROWS_AT_ONCE:
            self.close()

    def close(self) -> None:
        """Every file has been opened."""
        table = table_of(self._waiting)
        files, there = self._find(table)
        self._keep(table, files, there)
        self._waiting = []

    def claim_of(self, verdict: ProbeResult) -> VideoRecord:
        """The first claim that lies in a file."""
        files, _ = self._find(table_of([verdict]))
        return claims_of(self._claims.take(self._claim[files]))[0]

    def in_order(self) -> Iterator[tuple[VideoRecord, ProbeResult]]:
        """Every claim, in order of the ids, with the verdict of its file."""
        order = to_numpy(pc.sort_indices(self._claims.column("video_id"))).astype(np.int64)
        for table in self._claims.in_order(order):
            files, _ = self._find(table)
            # Hundreds of episodes may share a file, and a file's times and scores be long.
            rows, which = np.unique(self._verdict[files], return_inverse=True)
            verdicts = list(verdicts_of(self._verdicts.take(rows)))
            for claim, place in zip(claims_of(table), which.tolist(), strict=True):
                yield claim, verdicts[place]

    def verdicts(self) -> pa.RecordBatchReader:
        """The verdicts of all files, by `verdicts.SCHEMA`."""
        used = np.zeros(len(self._verdicts), bool)
        used[self._verdict] = True

        def chosen() -> Iterator[pa.RecordBatch]:
            start = 0
            for batch in self._verdicts.batches():
                yield batch.filter(pa.array(used[start : start + batch.num_rows]))
                start += batch.num_rows

        return pa.RecordBatchReader.from_batches(SCHEMA, chosen())

    def _openings(self, files: np.ndarray) -> Iterator[ProbeRequest]:
        attempts = iter((self._tried[files] + 1).tolist())
        for table in self._claims.in_order(self._claim[files], *KEY_COLUMNS):
            for row in table.to_pylist():
                yield ProbeRequest(**row, attempts=next(attempts), screen=self._screen)

    def _usable(self, table: pa.Table) -> np.ndarray:
        """Which verdicts say all that is asked: the frames of a good file may not have been scored."""
        if not self._screen:
            return np.ones(table.num_rows, bool)
        known = pc.or_(pc.is_valid(table.column("reason")), pc.is_valid(table.column("changes")))
        return to_numpy(known.cast(pa.uint8())).astype(bool)

    def _keep(self, table: pa.Table, files: np.ndarray, chosen: np.ndarray) -> None:
        start = len(self._verdicts)
        self._verdicts.append(table.filter(pa.array(chosen)).cast(SCHEMA))
        # Where a file comes twice, the later verdict counts.
        self._verdict[files[chosen]] = np.arange(start, len(self._verdicts))

    def _find(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the files of those rows that have one, which rows do)."""
        keys = _keys(table)
        if not len(self._keys):
            return np.empty(0, np.int64), np.zeros(len(keys), bool)
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        there = self._keys[places] == keys
        return places[there], there


def _keys(table: pa.Table | pa.RecordBatch) -> np.ndarray:
    """(rows,) of `KEY`."""
    uris, versions = (table.column(name).to_pylist() for name in KEY_COLUMNS)
    return np.frombuffer(
        b"".join(
            hashlib.sha256(f"{uri}\n{version}".encode()).digest()[:16]
            for uri, version in zip(uris, versions, strict=True)
        ),
        KEY,
    )
