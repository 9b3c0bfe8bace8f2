"""The commit marker of a corpus in a manifest: which of the tables in its folder count, and which are kept besides.

Tables are named by their content and never overwritten. The rows of an earlier ingest stay, since a training may still
read them: whoever is handed a manifest opens exactly its tables again, see `Manifest.tables`. `prune_tables` deletes
those that were replaced long ago.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.errors import CorpusError

COMMITTED = "committed.json"

LAYOUT = 5
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
    noted: str = ""
    notes: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kind of note, one of `rejection.NOTES` -> (how many, an example)."""
    signals: str = ""
    """Table of actions and states, see `tables/signal_file.py`; "" where there are none."""
    signal_index: str = ""
    layout: int = LAYOUT
    earlier: dict[str, float] = field(default_factory=dict)
    """Tables of rows that later ingests replaced -> Unix time at which; they are there until `prune_tables`."""


def read_committed(folder: str, name: str) -> Committed | None:
    """The commit marker of a corpus; None when it was never written to its end, or by another layout."""
    raw = marker_of(folder, name)
    if raw is None or raw.get("layout") != LAYOUT:
        return None
    try:
        return Committed(**raw)
    except TypeError as error:
        raise _damaged(folder, name, error) from error


def marker_of(folder: str, name: str) -> dict[str, Any] | None:
    """The commit marker of a corpus as it stands there, of any layout."""
    try:
        return dict(json.loads(storage.read_bytes(corpus_file(folder, name, COMMITTED))))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise _damaged(folder, name, error) from error


def _damaged(folder: str, name: str, error: Exception) -> CorpusError:
    uri = corpus_file(folder, name, COMMITTED)
    return CorpusError(f"{uri} is damaged ({error}); delete it and run the ingest again.")


def write_marker(folder: str, name: str, committed: Committed) -> None:
    """Writes the marker, from when on its tables count.

    Args:
        folder: of the manifest.
        name: of the corpus.
        committed: what the marker says.
    """
    storage.write_text(corpus_file(folder, name, COMMITTED), json.dumps(committed.__dict__, indent=1))


def prune_tables(folder: str, name: str, older_than_days: float) -> list[str]:
    """Deletes rows of a corpus that later ingests replaced, for which trainings that began on them then ask in vain.

    Args:
        folder: of the manifest.
        name: of the corpus.
        older_than_days: only those replaced longer ago than this.

    Returns: names of the deleted tables.
    """
    committed = read_committed(folder, name)
    if committed is None:
        return []
    oldest = time.time() - older_than_days * 86_400
    gone = [table for table, replaced in committed.earlier.items() if replaced < oldest]
    if gone:
        left = {table: replaced for table, replaced in committed.earlier.items() if table not in gone}
        write_marker(folder, name, replace(committed, earlier=left))
    replaced = {signals for table in gone for signals in _signals_of(folder, name, table)}
    for table in gone:
        storage.delete(corpus_file(folder, name, table))
        storage.delete(corpus_file(folder, name, arrow_name(table)))
    left_tables = [committed.videos, *(table for table in committed.earlier if table not in gone)]
    used = {committed.signals, *(signals for t in left_tables for signals in _signals_of(folder, name, t))}
    for signals in replaced - used if replaced else ():
        storage.delete(corpus_file(folder, name, signals))
    return gone


def _signals_of(folder: str, name: str, table: str) -> set[str]:
    """Tables of signals that rows of a corpus name."""
    try:
        with pq.ParquetFile(storage.open_seekable(corpus_file(folder, name, table))) as file:
            return set(pc.unique(file.read(columns=["signals"])[0]).to_pylist()) - {None}
    except FileNotFoundError:
        return set()


def corpus_folder(folder: str, name: str) -> str:
    """Path of the folder that holds the tables of a corpus."""
    return storage.join(folder, "corpora", name)


def corpus_file(folder: str, name: str, file: str) -> str:
    """Path of a file in the folder of a corpus.

    Args:
        folder: of the manifest.
        name: of the corpus.
        file: name of the file.
    """
    return storage.join(corpus_folder(folder, name), file)


def arrow_name(parquet: str) -> str:
    """Name of the file that has a Parquet table's rows laid out to be mapped."""
    return parquet.removesuffix(".parquet") + ".arrow"
