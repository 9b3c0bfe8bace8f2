"""The steps of one episode as the bytes of a Parquet file: the same steps always give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_VECTOR = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("subtask", pa.int32()),
        ("observation_sha256", pa.string()),
        ("action", _VECTOR),
        ("executed", _VECTOR),
        ("reward", pa.float32()),
        ("success", pa.bool_()),
    ]
)
"""Of N steps: number of the step, of its subtask, SHA-256 of the observation that was sent before it ("" between
requests), the action as the policy gave it and as it was executed (A,), the reward, and whether it solved the subtask."""


def pack_steps(steps: Mapping[str, Any]) -> bytes:
    """Parquet bytes of an episode's steps.

    Args:
        steps: a column of N values for each field of SCHEMA; `action` and `executed` are (N, A).

    Raises:
        KeyError: a column is missing.
        ValueError: the columns differ in length.
    """
    columns = []
    for field in SCHEMA:
        values = steps[field.name]
        if field.type == _VECTOR:
            vectors = np.asarray(values, dtype=np.float32)
            values = list(vectors) if vectors.size else [[] for _ in range(len(vectors))]
        columns.append(pa.array(values, type=field.type))
    if len({len(column) for column in columns}) > 1:
        lengths = {field.name: len(column) for field, column in zip(SCHEMA, columns, strict=True)}
        raise ValueError(f"the columns of an episode's steps differ in length: {lengths}")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), sink, compression="zstd")
    return bytes(sink.getvalue())


def unpack_steps(content: bytes) -> pa.Table:
    """The steps in Parquet bytes, a table of SCHEMA."""
    return pq.read_table(pa.BufferReader(content))
