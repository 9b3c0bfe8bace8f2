"""An index of names on local disk: a dict of millions would take gigabytes of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from defi_platform.data.tables.temp_database import TempDatabase


class FileIndex:
    """Rows of a name and some values, in the order in which they came; of several with one name the last is found.

    Args:
        values: number of texts and integers in a row, besides its name.
    """

    def __init__(self, values: int) -> None:
        columns = "".join(f", value{number}" for number in range(values))
        self._database = TempDatabase(f"CREATE TABLE named (name{columns})")
        self._insert = f"INSERT INTO named VALUES (?{', ?' * values})"
        self._length, self._indexed = 0, False

    def add(self, name: str, *values: str | int) -> None:
        """Adds a row."""
        row: tuple[Any, ...] = (name, *values)
        if not all([isinstance(value, int) or value.isascii() for value in row]):
            row = tuple(map(_encoded, row))
        self._database.add(self._insert, row)
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def find(self, name: str) -> tuple[Any, ...] | None:
        """Finds a row by its name. Returns: (number of the row, name, value, ...); None where there is none."""
        if not self._length:
            return None
        self._make_index()
        # The other columns are those of the row that has the maximum.
        query = "SELECT max(rowid) - 1, * FROM named WHERE name = ?"
        row = self._database.execute(query, (_encoded(name),)).fetchone()
        return None if row[0] is None else _decoded(row)

    def find_all(self, name: str, most: int) -> list[tuple[Any, ...]]:
        """Finds the first `most` rows of a name, as `find` gives them, in the order in which they came."""
        if not self._length:
            return []
        self._make_index()
        query = "SELECT rowid - 1, * FROM named WHERE name = ? ORDER BY rowid LIMIT ?"
        return [_decoded(row) for row in self._database.execute(query, (_encoded(name), most)).fetchall()]

    def _make_index(self) -> None:
        if not self._indexed:
            self._database.execute("CREATE INDEX by_name ON named (name)")
            self._indexed = True

    def names(self) -> Iterator[str]:
        """Yields the names as they came."""
        return (_decoded(row)[0] for row in self._database.select("SELECT name FROM named ORDER BY rowid"))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(_decoded, self._database.select("SELECT * FROM named ORDER BY rowid"))


def _encoded(value: str | int) -> str | int | bytes:
    # Names of files need not be texts that a database takes for one.
    if isinstance(value, int) or value.isascii():
        return value
    return value.encode("utf-8", "surrogatepass")


def _decoded(row: tuple[Any, ...]) -> tuple[Any, ...]:
    if bytes not in map(type, row):
        return row
    return tuple([v.decode("utf-8", "surrogatepass") if isinstance(v, bytes) else v for v in row])
