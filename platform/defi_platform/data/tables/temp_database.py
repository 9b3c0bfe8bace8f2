"""A private SQLite database for rows of any number: memory stays bounded, and the file vanishes with its process."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from defi_platform.data.tables.parquet_io import Row
from defi_platform.storage import StorageError

SETTINGS = (
    "PRAGMA cache_size = -4096",  # KiB; what does not fit lies on disk, mostly in the machine's own cache
    "PRAGMA temp_store = FILE",
    "PRAGMA journal_mode = OFF",  # nobody reads the file after a failure
    "BEGIN",
)

ADDED_AT_ONCE = 1_000
"""Rows after which a buffer of INSERTs is emptied."""


class TempDatabase:
    """Tables below `TMPDIR` that only this process can see.

    Args:
        statements: of SQL that make the tables.

    Raises: StorageError, here and from every method, when the disk is full or fails.
    """

    def __init__(self, *statements: str) -> None:
        folder = tempfile.gettempdir().replace("'", "''")
        # A database without a name has no directory entry either: a killed process leaves nothing behind.
        self._connection = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._added: dict[str, list[Sequence[Any]]] = {}
        for statement in (f"PRAGMA temp_store_directory = '{folder}'", *SETTINGS, *statements):
            self.execute(statement)

    def add(self, statement: str, values: Sequence[Any]) -> None:
        """Runs an INSERT before the next other statement, with many at once: a call per row costs as much as the row."""
        rows = self._added.setdefault(statement, [])
        rows.append(values)
        if len(rows) >= ADDED_AT_ONCE:
            self._flush()

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Runs a statement. Raises: as Python's sqlite3 for values that it cannot store."""
        self._flush()
        try:
            return self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error

    def execute_many(self, statement: str, rows: Iterable[Sequence[Any]]) -> None:
        """Runs a statement for each of `rows`, up to the first that cannot be stored. Raises: as `execute`."""
        self._flush()
        try:
            self._connection.executemany(statement, rows)
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error

    def select(self, statement: str, values: Sequence[Any] = ()) -> Iterator[Row]:
        """Yields the rows of a query as they are found; other tables may be written meanwhile."""
        try:
            for row in self.execute(statement, values):  # noqa: UP028  `yield from` closes cursors, too late perhaps
                yield row
        except sqlite3.OperationalError as error:
            raise _no_room(error) from error

    def define(self, name: str, function: Callable[[Any], Any]) -> None:
        """Defines a function for SQL, also for its indexes: one argument, always the same result, no exceptions."""
        self._connection.create_function(name, 1, function, deterministic=True)

    def value(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """The first value of a query's first row; None where it finds no row."""
        row = self.execute(statement, values).fetchone()
        return None if row is None else row[0]

    @property
    def changes(self) -> int:
        """Number of rows that all statements so far have inserted, replaced or deleted."""
        # Rows that wait would count as those of the next statement.
        self._flush()
        return self._connection.total_changes

    def close(self) -> None:
        """Drops everything."""
        self._connection.close()

    def _flush(self) -> None:
        while self._added:
            self.execute_many(*self._added.popitem())


def _no_room(error: sqlite3.OperationalError) -> StorageError:
    return StorageError(
        f"no temporary file can be written in {tempfile.gettempdir()}: {error}. "
        "Make room there, or set TMPDIR to a folder with more."
    )
