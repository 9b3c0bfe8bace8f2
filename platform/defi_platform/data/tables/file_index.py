"""Rows that are found by a name, in columns: a dict of millions would take ten times the memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

ROWS_PER_CHUNK = 4_000

TEXT = pa.binary()
"""Names of files need not be texts that Arrow takes for one."""


class KeyedRows:
    """Rows in the order in which they came; of several with one key the last is found.

    Args:
        kinds: of the values of a row; `TEXT` for texts.
    """

    def __init__(self, *kinds: pa.DataType) -> None:
        self._kinds = (TEXT, *kinds)
        self._chunks: list[list[pa.Array]] = []
        self._waiting: list[tuple[Any, ...]] = []
        self._hashes: list[np.ndarray] = []
        self._index: tuple[np.ndarray, np.ndarray] | None = None
        """(hashes in order, the row of each), made at the first question."""

    def add(self, key: str, *values: Any) -> None:
        """Adds a row."""
        self._index = None
        self._waiting.append((key, *values))
        if len(self._waiting) == ROWS_PER_CHUNK:
            self._hashes.append(_hashes([row[0] for row in self._waiting]))
            columns = zip(*self._waiting, strict=True)
            self._chunks.append(
                [_array(column, kind) for column, kind in zip(columns, self._kinds, strict=True)]
            )
            self._waiting = []

    def __len__(self) -> int:
        return len(self._chunks) * ROWS_PER_CHUNK + len(self._waiting)

    def row(self, key: str) -> int:
        """Number of the row of a key; -1 where there is none."""
        if self._index is None:
            hashes = np.concatenate([*self._hashes, _hashes([row[0] for row in self._waiting])])
            order = np.argsort(hashes, kind="stable")
            self._index = hashes[order], order.astype(np.uint32)
        hashes, rows = self._index
        wanted = np.int64(hash(key))
        place, found = int(hashes.searchsorted(wanted)), -1
        while place < len(hashes) and hashes[place] == wanted:
            row = int(rows[place])
            found = row if self._has(row, key) else found
            place += 1
        return found

    def _has(self, row: int, key: str) -> bool:
        number, place = divmod(row, ROWS_PER_CHUNK)
        if number == len(self._chunks):
            return bool(self._waiting[place][0] == key)
        return bool(self._chunks[number][0][place].as_py() == key.encode("utf-8", "surrogatepass"))

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        """(key, value, ...) of a row."""
        number, place = divmod(row, ROWS_PER_CHUNK)
        if number == len(self._chunks):
            return self._waiting[place]
        return tuple(_value(column[place].as_py()) for column in self._chunks[number])

    def keys(self) -> Iterator[str]:
        """Keys as they came."""
        for chunk in self._chunks:
            yield from map(_value, chunk[0].to_pylist())
        yield from (row[0] for row in self._waiting)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for chunk in self._chunks:
            for row in zip(*(column.to_pylist() for column in chunk), strict=True):
                yield tuple(map(_value, row))
        yield from self._waiting


def _hashes(keys: list[str]) -> np.ndarray:
    return np.fromiter(map(hash, keys), np.int64, len(keys))


def _array(values: tuple[Any, ...], kind: pa.DataType) -> pa.Array:
    if kind == TEXT:
        values = tuple(value.encode("utf-8", "surrogatepass") for value in values)
    return pa.array(values, kind)


def _value(value: Any) -> Any:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
