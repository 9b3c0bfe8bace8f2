"""The table of episodes, `episodes.parquet`: one row per episode that was asked for, those left out included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from defi_platform import storage

FILE = "episodes.parquet"
_PROTOCOL = b"defi.protocol"

_SUBTASK = pa.struct(
    [("name", pa.string()), ("instruction", pa.string()), ("success", pa.bool_()), ("steps", pa.int32())]
)
_FAULT = pa.struct([("kind", pa.string()), ("message", pa.string()), ("place", pa.string())])
_TEXT = pa.struct([("step", pa.int32()), ("text", pa.string())])
_POSITION = pa.struct([("name", pa.string()), ("value", pa.float64())])
SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("arm", pa.string()),
        ("task", pa.string()),
        ("seed", pa.int64()),
        ("success", pa.bool_()),
        ("solved", pa.int32()),
        ("subtasks", pa.list_(_SUBTASK)),
        ("steps", pa.int32()),
        ("reward", pa.float64()),
        ("wall_s", pa.float64()),
        ("latency_ms", pa.list_(pa.float64())),
        ("instructions", pa.list_(_TEXT)),
        ("simulator_errors", pa.list_(_FAULT)),
        ("initial_state", pa.list_(pa.float64())),
        ("initial_positions", pa.list_(_POSITION)),
        ("policy_digest", pa.string()),
        ("video", pa.string()),
        ("host", pa.string()),
        ("unit", pa.string()),
        ("steps_file", pa.string()),
    ]
)
"""`initial_positions` are those of objects and goals, see `Benchmark.initial_positions`; policies get `initial_state`
alone. `instructions` are those that came during a subtask, each with the first step under it. `unit` and `steps_file` name the episode's files in the store (`store.episodes`). `success` is null for an episode that was left out because its simulator kept failing."""


def write_episodes(output: str, rows: Sequence[Mapping[str, Any]], protocol: Mapping[str, Any]) -> str:
    """Writes the table, with the protocol in the metadata of the file.

    Args:
        output: folder of the evaluation, local or remote.
        rows: of the episodes, in the order of the table; keys that are no column are left out.
        protocol: JSON values.

    Returns: SHA-256 of the file, in hex.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    table = table.replace_schema_metadata({_PROTOCOL: json.dumps(protocol).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(output, FILE), content)
    return hashlib.sha256(content).hexdigest()


def digest_of_episodes(output: str) -> str:
    """SHA-256 of the table's file, in hex.

    Raises:
        FileNotFoundError: the evaluation has not written it.
    """
    return hashlib.sha256(storage.read_bytes(storage.join(output, FILE))).hexdigest()


def read_episodes(output: str) -> list[dict[str, Any]]:
    """The rows of the table, as they were given.

    Raises:
        FileNotFoundError: the evaluation has not written it.
    """
    content = storage.read_bytes(storage.join(output, FILE))
    rows: list[dict[str, Any]] = pq.read_table(pa.BufferReader(content)).to_pylist()
    return rows


def left_out(row: Mapping[str, Any]) -> bool:
    """True for an episode without an outcome: its simulator failed in every try."""
    return row["success"] is None
