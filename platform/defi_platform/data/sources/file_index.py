"""An index of names on local disk: a dict of millions would take gigabytes of memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from defi_platform.data.tables.temp_database import TempDatabase

Key = Callable[[str], str | None]
"""Makes of a name what its row is found by too; None: it is not. Must not raise."""


class FileIndex:
    """Rows of a name and some values, in the order in which they came; of several with one name the last is found.

    Args:
        values: number of texts and integers in a row, besides its name.
        keys: by which rows are found too. Each costs something at the first question for it only.
    """

    def __init__(self, values: int, **keys: Key) -> None:
        columns = "".join(f", value{number}" for number in range(values))
        self._database = TempDatabase(f"CREATE TABLE named (name{columns})")
        for key, of in keys.items():
            self._database.define(key, _on_encoded(of))
        self._insert = f"INSERT INTO named VALUES (?{', ?' * values})"
        self._length, self._indexed = 0, set[str]()

    def add(self, name: str | int, *values: str | int) -> None:
        """Adds a row."""
        self._database.add(self._insert, tuple([_encoded(value) for value in (name, *values)]))
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

    def find_only(self, key: str, values: Sequence[str]) -> list[int | None]:
        """Finds rows that are the only ones with one of their keys, many at once.

        Args:
            key: its name.
            values: what it is.

        Returns: number of the row of each value; None where no row has it, or several have, or it has other
            letters than ASCII's.
        """
        self._make_index(key)
        # A subquery looks at two rows of the index at most, a join at all that have the key.
        query = (
            "WITH first AS MATERIALIZED (SELECT key, value, "
            f"(SELECT rowid FROM named WHERE {key}(name) = value ORDER BY rowid LIMIT 1) AS row FROM json_each(?)) "
            f"SELECT iif(EXISTS (SELECT 1 FROM named WHERE {key}(name) = value AND rowid > row), NULL, row - 1) "
            "FROM first ORDER BY key"
        )
        asked = json.dumps([value if value.isascii() and value.isprintable() else None for value in values])
        return [number for (number,) in self._database.select(query, (asked,))]

    def find_by(self, key: str, value: str, most: int) -> list[tuple[int, str]]:
        """Finds rows by one of their keys.

        Args:
            key: its name.
            value: what it is.
            most: the first so many rows.

        Returns: number and name of each.
        """
        self._make_index(key)
        query = f"SELECT rowid - 1, name FROM named WHERE {key}(name) = ? ORDER BY rowid LIMIT ?"
        return list(map(_decoded, self._database.execute(query, (_encoded(value), most))))

    def find_below(self, key: str, folder: str, most: int) -> list[tuple[int, str]]:
        """Finds rows of which a key is a path below a folder.

        Args:
            key: its name.
            folder: the first parts of that path.
            most: the first so many rows in order of the key.

        Returns: number and name of each.
        """
        self._make_index(key)
        query = f"SELECT rowid - 1, name FROM named WHERE {key}(name) > ? AND {key}(name) < ? LIMIT ?"
        # What comes after a slash, among the letters, is a zero.
        bounds = _encoded(f"{folder}/"), _encoded(f"{folder}0")
        found = list(self._database.execute(query, (*bounds, most)))
        if folder.isascii():  # below which there may be other letters
            bounds = f"{folder}/".encode(), f"{folder}0".encode()
            found += self._database.execute(query, (*bounds, most - len(found)))
        return list(map(_decoded, found))

    def _make_index(self, key: str = "") -> None:
        if key not in self._indexed:
            of = f"{key}(name)" if key else "name"
            self._database.execute(f"CREATE INDEX [by {key}] ON named ({of})")
            self._indexed.add(key)

    def names(self) -> Iterator[str]:
        """Yields the names as they came."""
        return (_decoded(row)[0] for row in self._database.select("SELECT name FROM named ORDER BY rowid"))

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return map(_decoded, self._database.select("SELECT * FROM named ORDER BY rowid"))

    def by_name(self) -> Iterator[tuple[Any, ...]]:
        """Yields the rows in order of their names; those of one name as they came."""
        return map(_decoded, self._database.select("SELECT * FROM named ORDER BY name, rowid"))


def _on_encoded(of: Key) -> Callable[[str | bytes], Any]:
    def key(name: str | bytes) -> Any:
        found = of(name if isinstance(name, str) else name.decode("utf-8", "surrogatepass"))
        return None if found is None else _encoded(found)

    return key


def _encoded(value: str | int) -> Any:
    # Names of files need not be texts that a database takes for one.
    if isinstance(value, int) or value.isascii():
        return value
    return value.encode("utf-8", "surrogatepass")


def _decoded(row: tuple[Any, ...]) -> tuple[Any, ...]:
    for value in row:
        if isinstance(value, bytes):
            return tuple([v.decode("utf-8", "surrogatepass") if isinstance(v, bytes) else v for v in row])
    return row
