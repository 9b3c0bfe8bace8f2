"""Results of opening files, kept for every file, so that no later ingest opens it again in this version.

<manifest>/corpora/<name>/probed/<block>.parquet    results as they come, gone after the commit
<manifest>/corpora/<name>/opened-<hash>.parquet     all of them, written by the commit
"""

from __future__ import annotations

import contextlib
import io
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.config import DecodeConfig
from defi_platform.data.decode.frame_scores import FrameScores
from defi_platform.data.decode.messages import Probe
from defi_platform.data.rejection import BadVideo
from defi_platform.data.tables.parquet_io import Row, encoded, to_table
from defi_platform.storage.parallel_read import side_by_side

RESULT_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("version", pa.string()),
        ("attempts", pa.int32()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("limit", pa.float64()),
        ("num_frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("bytes", pa.int64()),
        ("decoder", pa.string()),
        ("variable_rate", pa.bool_()),
        ("seek_index", pa.binary()),
        ("content", pa.uint64()),
        ("times", pa.list_(pa.float32())),
        ("sampled", pa.list_(pa.int32())),
        ("luma", pa.list_(pa.float32())),
        ("motion", pa.list_(pa.float32())),
        ("sharpness", pa.list_(pa.float32())),
        ("hashes", pa.list_(pa.uint64())),
        ("changes", pa.binary()),
    ]
)
"""`reason` and `message` are set for bad files, `limit` for those that went beyond one, what follows for good ones; from
`sampled` on it is the `FrameScores`, null where nobody asked for scores."""

HEAD = RESULT_SCHEMA.get_field_index("num_frames")

FACTS, SCORES = (
    operator.attrgetter(*RESULT_SCHEMA.names[HEAD:-9]),
    operator.attrgetter(*RESULT_SCHEMA.names[-6:]),
)


LIMITS = {"timeout": operator.attrgetter("timeout_s"), "memory": operator.attrgetter("memory_mb")}
"""Reason of rejection -> the limit of `DecodeConfig` that it is about."""


def limit_of(reason: str | None, limits: DecodeConfig) -> float | None:
    """The limit that a rejection is about; None where it is about none."""
    return float(LIMITS[reason](limits)) if reason in LIMITS else None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Result of opening one version of one file: its probe, or the reason why it cannot be used."""

    uri: str
    version: str
    answer: Probe | BadVideo
    attempts: int = 1
    """How many ingests opened it, up to this one."""
    limit: float | None = None
    """The limit that it went beyond, of those in `LIMITS`; a higher one may let it pass."""

    @property
    def bad(self) -> BadVideo | None:
        """The reason why it cannot be used, if so."""
        return self.answer if isinstance(self.answer, BadVideo) else None


def row_of(result: ProbeResult) -> Row:
    """The values of `RESULT_SCHEMA` for a result."""
    probe, head = result.answer, (result.uri, result.version, result.attempts)
    if isinstance(probe, BadVideo):
        bad = (probe.reason, probe.message, result.limit)
        return (*head, *bad, *[None] * (len(RESULT_SCHEMA) - HEAD))
    scores = (None,) * 6 if probe.frame_scores is None else SCORES(probe.frame_scores)
    return (
        *head,
        None,
        None,
        None,
        *FACTS(probe),
        probe.seek_index,
        probe.content,
        probe.times or None,
        *scores,
    )


def result_of(row: Row) -> ProbeResult:
    """The inverse of `row_of`."""
    uri, version, attempts, reason, message, limit = row[:HEAD]
    if reason is not None:
        return ProbeResult(uri, version, BadVideo(reason, message), attempts, limit)
    seek_index, content, times, sampled, luma, motion, sharpness, hashes, changes = row[-9:]
    screening = None
    if changes is not None:
        screening = FrameScores(
            np.asarray(sampled, np.int32),
            np.asarray(luma, np.float32),
            np.asarray(motion, np.float32),
            np.asarray(sharpness, np.float32),
            np.asarray(hashes, np.uint64),
            changes,
        )
    probe = Probe(*(*row[HEAD:-9], tuple(times or ()), screening, seek_index, content))
    return ProbeResult(uri, version, probe, attempts)


class ResultBlocks:
    """Results of an ingest under way, one file per block of videos.

    Args:
        folder: of the corpus within the manifest.
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage.join(folder, "probed")

    def write(self, name: str, results: Iterable[ProbeResult]) -> None:
        """Stores a block, whole or not at all."""
        table = to_table([row_of(result) for result in results], RESULT_SCHEMA)
        storage.write_bytes(storage.join(self._folder, f"{name}.parquet"), encoded(table))

    def read(self) -> Iterator[pa.Table]:
        """Tables of `RESULT_SCHEMA` that an ingest which did not reach its end has left."""
        uris = [
            storage.join(self._folder, name)
            for name in storage.names(self._folder)
            if name.endswith(".parquet") and not name.startswith(".")
        ]
        for uri, content in side_by_side(_content, uris, storage.is_remote(self._folder)):
            if content is None:
                continue  # another ingest of the same corpus has just reached its end
            try:
                table = pq.read_table(io.BytesIO(content))
            except (pa.ArrowInvalid, OSError) as error:
                print(f"ingest: {uri} is damaged ({error}); its videos are opened again", flush=True)
                continue
            if table.schema.equals(RESULT_SCHEMA):
                yield table

    def delete(self) -> None:
        """Drops the blocks, once the commit has them all."""
        # Another ingest of this corpus may be writing blocks; what it leaves is never wrong, only no longer needed.
        with contextlib.suppress(OSError):
            storage.delete(self._folder)


def _content(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except FileNotFoundError:
        return None
