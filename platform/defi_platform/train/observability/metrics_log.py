"""metrics.jsonl of a run: appended line by line, cut back to the step that a resume starts from."""

from __future__ import annotations

import json
import time
from typing import Any

from defi_platform import storage
from defi_platform.storage import StorageError
from defi_platform.train.observability.background_writer import BackgroundWriter

REMOTE_FLUSH_S = 30.0
"""Object stores cannot append: there the whole file is written again this often."""


class MetricsLog:
    """The only writer of a run's metrics; held by rank 0. A full disk or a store that is away never stops it: what
    could not be written is written with the next row.

    Args:
        path: file, local or remote.
        step: what was logged after this step by an earlier attempt is dropped, because it is done again.
    """

    def __init__(self, path: str, step: int):
        self._path = path
        self._lines = [json.dumps(row) for row in read_metrics(path) if row["step"] <= step] if step else []
        self._flushed = time.monotonic()
        self._background = BackgroundWriter()
        self._behind = False
        self._write_all()

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row; it survives the death of the process (local) or of the last 30 s (remote)."""
        line = json.dumps(row)
        self._lines.append(line)
        if storage.is_remote(self._path):
            if time.monotonic() - self._flushed > REMOTE_FLUSH_S:
                self._write_all()
        elif self._behind:
            self._write_all()
        else:
            try:
                with storage.local_path(self._path).open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                print(f"{self._path} cannot be written for now, training goes on: {error}", flush=True)
                self._behind = True

    def flush(self) -> None:
        """Brings a remote file up to date, some time soon."""
        if storage.is_remote(self._path):
            self._write_all()

    def close(self, patience_s: float) -> None:
        """Returns when every row is in the file. Raises: StorageError when that takes longer than `patience_s`."""
        deadline = time.monotonic() + patience_s
        self._write_all()
        while self._behind and time.monotonic() < deadline:
            time.sleep(1.0)
            self._write_all()
        if self._behind:
            raise StorageError(
                f"{self._path} could not be written for {patience_s:.0f} s. Make room on its disk."
            )
        self._background.flush(max(0.0, deadline - time.monotonic()))

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, earlier attempts' included."""
        return [json.loads(line) for line in self._lines]

    def _write_all(self) -> None:
        text = "".join(line + "\n" for line in self._lines)
        self._flushed = time.monotonic()
        if storage.is_remote(self._path):
            self._background.write(self._path, text)
            return
        try:
            storage.write_text(self._path, text)
            self._behind = False
        except OSError:
            # Told when it began.
            self._behind = True


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
