"""The manifest version that a run reads: fixed when it begins, kept in its checkpoints, the same for all its processes.

An ingest that other jobs run meanwhile changes nothing for it. A resume goes on with the same version and says what is
new since; `data.take_in_new` goes over to the newest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from defi_platform.config import DataConfig
from defi_platform.config.data import drawn_corpora
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.manifest.table import Manifest
from defi_platform.errors import CheckpointError, CorpusError
from defi_platform.train.checkpoint import format as checkpoints

Tables = dict[str, str]
"""Corpus -> name of its table, as `Manifest.tables`."""


@dataclass
class PinnedData:
    """The manifests of a run, sent with its recipe to every process that takes part."""

    kind: str
    """Of the recipe, for messages."""
    tables: dict[str, Tables] = field(default_factory=dict)
    """By part of the configuration that names the manifest: data | probe."""

    def ingest(self, run: str, part: str, data: DataConfig) -> None:
        """Brings a manifest up to date and fixes the version that the run reads; the driver does it before workers start.

        Args:
            run: run folder.
            part: data | probe.
            data: of that part.

        Raises: CheckpointError when the version of a resumed run is gone; what `ingest` raises.
        """
        newest = ingest(data)
        begun = _tables_of(run).get(part)
        self.tables[part] = newest.tables
        if begun is None or begun == newest.tables:
            return
        if data.take_in_new:
            for line in _differences(run, part, begun, data, newest):
                print(f"{self.kind}: {line}; taken in from here on", flush=True)
            return
        self.tables[part] = begun
        for line in _differences(run, part, begun, data, newest):
            print(
                f"{self.kind}: {line}; it goes on with those it began with (data.take_in_new=true takes in the new ones)",
                flush=True,
            )

    def open(self, run: str, part: str, data: DataConfig) -> Manifest:
        """Opens a manifest in the version of the run.

        Args:
            run: run folder, which knows the version where this process does not.
            part: data | probe.
            data: of that part.

        Raises: CheckpointError when that version is gone; CorpusError when there is no manifest.
        """
        if part not in self.tables:
            begun = None if data.take_in_new else _tables_of(run).get(part)
            self.tables[part] = _open(run, begun, data).tables
        return _open(run, self.tables[part], data)


def _tables_of(run: str) -> dict[str, Tables]:
    """The versions in the newest checkpoint of a run; {} before its first one."""
    found = checkpoints.committed(run)
    return found[0].position.data if found else {}


def _open(run: str, tables: Tables | None, data: DataConfig) -> Manifest:
    try:
        return Manifest.open(data.manifest, list(drawn_corpora(data)), tables)
    except CorpusError as error:
        if tables is None:
            raise
        raise CheckpointError(
            f"{run} cannot go on with the videos that it began with: {error} To go on from its last checkpoint with the "
            "videos of now, set data.take_in_new=true."
        ) from error


def _differences(run: str, part: str, begun: Tables, data: DataConfig, newest: Manifest) -> Iterator[str]:
    """One line per corpus that has changed since the run began."""
    try:
        before = _open(run, begun, data)
    except CheckpointError as error:
        if not data.take_in_new:
            raise
        yield f"{part}: the versions that the run began with are gone ({error.__cause__})"
        return
    for name in newest.names:
        if begun.get(name) != newest.tables[name]:
            old, new = before.corpus(name)[1].table, newest.corpus(name)[1].table
            more, gone, changed = _count(new, old), _count(old, new), 0
            changed = _count(new, old, "version") - more
            said = [(more, "new"), (gone, "gone"), (changed, "in another version of their file")]
            what = ", ".join(f"{count:,} {word}" for count, word in said if count)
            yield (
                f"{part}: corpus {name} has {len(new):,} videos, {len(old):,} when this run began: "
                + (what or "the same ones, with other texts, splits or settings")
            )


def _count(rows: pa.Table, others: pa.Table, *more: str) -> int:
    """Number of rows whose video is not among `others`; `more`: columns that have to agree too."""
    inside = pc.is_in(_keys(rows, more), value_set=_keys(others, more))
    return len(rows) - int(pc.sum(inside).as_py() or 0)


def _keys(rows: pa.Table, more: tuple[str, ...]) -> pa.ChunkedArray:
    columns = [rows[name].cast(pa.large_string()) for name in ("video_id", *more)]
    return pc.binary_join_element_wise(*columns, pa.scalar("\0", pa.large_string()), null_handling="replace")
