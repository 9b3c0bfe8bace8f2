"""What opening a file showed: kept for every file, so that no later ingest opens it again in this version.

<manifest>/corpora/<name>/probed/<block>.parquet    verdicts as they come, gone after the commit
<manifest>/corpora/<name>/opened-<hash>.parquet     all of them, written by the commit
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.data.decode.frame_scores import FrameScores
from defi_platform.data.decode.messages import Probe
from defi_platform.data.rejection import BadVideo
from defi_platform.data.tables.arrow_spill import ROWS_AT_ONCE
from defi_platform.storage.parallel_read import side_by_side

SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("version", pa.string()),
        ("attempts", pa.int32()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("bytes", pa.int64()),
        ("rotation", pa.int32()),
        ("decoder", pa.string()),
        ("variable_rate", pa.bool_()),
        ("times", pa.list_(pa.float32())),
        ("sampled", pa.list_(pa.int32())),
        ("luma", pa.list_(pa.float32())),
        ("motion", pa.list_(pa.float32())),
        ("sharpness", pa.list_(pa.float32())),
        ("hashes", pa.list_(pa.uint64())),
        ("changes", pa.binary()),
    ]
)
"""`reason` and `message` are set for bad files, what follows them for good ones; from `sampled` on it is the
`FrameScores`, null where nobody asked for scores."""

PROBE_COLUMNS = SCHEMA.names[5:-6]
SCREENING_COLUMNS = SCHEMA.names[-6:]


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one file is, in one version of it."""

    uri: str
    version: str
    answer: Probe | BadVideo
    attempts: int = 1
    """How many ingests opened it, up to this one."""

    @property
    def screened(self) -> bool:
        """Whether its frames were scored, or there is nothing to score."""
        return isinstance(self.answer, BadVideo) or self.answer.frame_scores is not None

    @property
    def bad(self) -> BadVideo | None:
        """Why it cannot be used, if so."""
        return self.answer if isinstance(self.answer, BadVideo) else None


def table_of(verdicts: Iterable[ProbeResult]) -> pa.Table:
    """Verdicts as a table of `SCHEMA`."""
    rows = (_row(verdict) for verdict in verdicts)
    chunks = [SCHEMA.empty_table()]
    while some := list(itertools.islice(rows, ROWS_AT_ONCE)):
        chunks.append(pa.Table.from_pylist(some, schema=SCHEMA))
    return pa.concat_tables(chunks)


def verdicts_of(table: pa.Table) -> Iterator[ProbeResult]:
    """The inverse of `table_of`."""
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        for row in batch.to_pylist():
            answer: Probe | BadVideo
            if row["reason"] is not None:
                answer = BadVideo(row["reason"], row["message"])
            else:
                values = {name: row[name] for name in PROBE_COLUMNS}
                values |= {"times": tuple(values["times"] or ()), "frame_scores": _frame_scores(row)}
                answer = Probe(**values)
            yield ProbeResult(row["uri"], row["version"], answer, row["attempts"])


def _row(verdict: ProbeResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        "uri": verdict.uri,
        "version": verdict.version,
        "attempts": verdict.attempts,
    }
    if verdict.bad is not None:
        return row | {"reason": verdict.bad.reason, "message": verdict.bad.message}
    assert isinstance(verdict.answer, Probe)
    row |= {name: getattr(verdict.answer, name) for name in PROBE_COLUMNS}
    row["times"] = list(verdict.answer.times) or None
    screening = verdict.answer.frame_scores
    if screening is not None:
        row |= {name: getattr(screening, name) for name in SCREENING_COLUMNS}
    return row


def _frame_scores(row: dict[str, Any]) -> FrameScores | None:
    if row["changes"] is None:
        return None
    kinds = {"sampled": np.int32, "hashes": np.uint64}
    arrays = {n: np.array(row[n], kinds.get(n, np.float32)) for n in SCREENING_COLUMNS if n != "changes"}
    return FrameScores(**arrays, changes=row["changes"])


# --------------------------------------------------------------------------- blocks


class Blocks:
    """Verdicts of an ingest under way, one file per block of videos.

    Args:
        folder: of the corpus within the manifest.
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage.join(folder, "probed")

    def write(self, name: str, verdicts: Sequence[ProbeResult]) -> None:
        """Stores a block, whole or not at all."""
        sink = io.BytesIO()
        pq.write_table(table_of(verdicts), sink, compression="zstd")
        storage.write_bytes(storage.join(self._folder, f"{name}.parquet"), sink.getvalue())

    def read(self) -> Iterator[pa.Table]:
        """Tables of `SCHEMA`: verdicts that an ingest which did not reach its end has left."""
        places = [
            storage.join(self._folder, name)
            for name in storage.names(self._folder)
            if name.endswith(".parquet") and not name.startswith(".")
        ]
        for place, content in side_by_side(_content, places, storage.is_remote(self._folder)):
            if content is None:
                continue  # another ingest of the same corpus has just reached its end
            try:
                table = pq.read_table(io.BytesIO(content))
            except (pa.ArrowInvalid, OSError) as error:
                print(f"ingest: {place} is damaged ({error}); its videos are opened again", flush=True)
                continue
            if table.schema.equals(SCHEMA):
                yield table

    def delete(self) -> None:
        """Once the commit has them all."""
        # Another ingest of this corpus may be writing blocks; what it leaves is never wrong, only no longer needed.
        with contextlib.suppress(OSError):
            storage.delete(self._folder)


def _content(place: str) -> bytes | None:
    try:
        return storage.read_bytes(place)
    except FileNotFoundError:
        return None
