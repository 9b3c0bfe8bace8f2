"""metrics.jsonl of a run: appended line by line, cut back to the step that a resume starts from."""

from __future__ import annotations

import json
import time
from typing import Any

from defi_platform import storage

REMOTE_FLUSH_S = 30.0
"""Object stores cannot append: there the whole file is written again this often."""


class MetricsLog:
    """The only writer of a run's metrics; held by rank 0.

    Args:
        path: file, local or remote.
        step: what was logged after this step by an earlier attempt is dropped, because it is done again.
    """

    def __init__(self, path: str, step: int):
        self._path = path
        self._lines = [json.dumps(row) for row in read_metrics(path) if row["step"] <= step] if step else []
        self._flushed = time.monotonic()
        self._write_all()

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row; it survives the death of the process (local) or of the last 30 s (remote)."""
        line = json.dumps(row)
        self._lines.append(line)
        if storage.is_remote(self._path):
            if time.monotonic() - self._flushed > REMOTE_FLUSH_S:
                self._write_all()
            return
        with storage.local_path(self._path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def flush(self) -> None:
        """Brings a remote file up to date."""
        if storage.is_remote(self._path):
            self._write_all()

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, earlier attempts' included."""
        return [json.loads(line) for line in self._lines]

    def _write_all(self) -> None:
        storage.write_text(self._path, "".join(line + "\n" for line in self._lines))
        self._flushed = time.monotonic()


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Rows of a metrics file, [] when there is none; a last line cut off by a kill is left out."""
    if not storage.exists(path):
        return []
    lines = storage.read_text(path).splitlines()
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise
    return rows
