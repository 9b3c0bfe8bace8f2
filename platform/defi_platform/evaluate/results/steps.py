"""The table of steps, `steps.parquet`: what was observed, done and got at every step of every episode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.storage.scratch import scratch

FILE = "steps.parquet"
_ROWS = 100_000
"""Steps of a row group; few enough to be held in memory at once."""

SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("task", pa.string()),
        ("seed", pa.int64()),
        ("step", pa.int32()),
        ("subtask", pa.int32()),
        ("observation_sha256", pa.string()),
        ("action", pa.list_(pa.float32())),
        ("executed", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("success", pa.bool_()),
        ("latency_ms", pa.float64()),
    ]
)
"""`observation_sha256` and `latency_ms` are those of the request that was sent before the step, null between requests."""


def write_steps(
    output: str, episodes: Iterable[tuple[Mapping[str, Any], pa.Table | None]]
) -> tuple[int, str]:
    """Writes the steps of all episodes into one file.

    Args:
        output: folder of the evaluation, local or remote.
        episodes: (row, its steps) in the order of the table; steps have the columns step, subtask,
            observation_sha256 ("" between requests), action, executed, reward and success; None: none were kept.

    Returns:
        The number of steps written, and the SHA-256 of the file in hex.
    """
    written, waiting = 0, list[pa.Table]()
    with scratch("steps") as folder:
        local = folder / FILE
        with pq.ParquetWriter(local, SCHEMA, compression="zstd") as file:
            for row, steps in episodes:
                if steps is None:
                    continue
                waiting.append(_with_keys(row, steps))
                if sum(map(len, waiting)) >= _ROWS:
                    file.write_table(pa.concat_tables(waiting))
                    waiting.clear()
                written += len(steps)
            if waiting:
                file.write_table(pa.concat_tables(waiting))
        with local.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        storage.put_file(local, storage.join(output, FILE))
    return written, digest


def digest_of_steps(output: str) -> str:
    """SHA-256 of the table's file, in hex.

    Raises:
        FileNotFoundError: the evaluation has not written it.
    """
    with storage.local_copy(storage.join(output, FILE)) as local, local.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _with_keys(row: Mapping[str, Any], steps: pa.Table) -> pa.Table:
    digests = [digest or None for digest in steps["observation_sha256"].to_pylist()]
    # A request and its latency come in the same order; random actions and the expert make none.
    latencies = iter(row["latency_ms"])
    columns = {
        "arm": [row["arm"]] * len(steps),
        "task": [row["task"]] * len(steps),
        "seed": [row["seed"]] * len(steps),
        "observation_sha256": digests,
        "latency_ms": [next(latencies, None) if digest else None for digest in digests],
    }
    return pa.table(
        {
            name: columns.get(name, steps[name] if name in steps.column_names else None)
            for name in SCHEMA.names
        }
    ).cast(SCHEMA)
