"""metrics.jsonl of a run: appended line by line, cut back to the step that a resume starts from."""

from __future__ import annotations

import json
import time
from typing import Any

from defi_platform import storage
from defi_platform.retry import RetryPolicy, retry
from defi_platform.storage import StorageError
from defi_platform.train.observability.background_writer import BackgroundWriter

REMOTE_FLUSH_S = 30.0
"""Object stores cannot append: there the whole file is written again this often."""
CLOSE_PAUSE_S = 1.0


class MetricsLog:
    """The only writer of a run's metrics, on rank 0.

    A full disk or a store that is away never stops it: rows that could not be written are written with the next one.

    Args:
        path: file, local or remote.
        step: rows that an earlier attempt logged after this step are dropped, because its steps are done again.
    """

    def __init__(self, path: str, step: int):
        self._path = path
        self._lines = [json.dumps(row) for row in read_metrics(path) if row["step"] <= step] if step else []
        self._flushed = time.monotonic()
        self._background = BackgroundWriter()
        self._behind = False
        """Rows are missing in the local file."""
        self._try_write_all()

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row; it survives the death of the process (local) or of the last 30 s (remote)."""
        line = json.dumps(row)
        self._lines.append(line)
        if storage.is_remote(self._path):
            if time.monotonic() - self._flushed > REMOTE_FLUSH_S:
                self._write_all()
        elif self._behind:
            self._try_write_all()
        else:
            try:
                with storage.local_path(self._path).open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:
                print(f"{self._path} cannot be written for now, training goes on: {error}", flush=True)
                self._behind = True

    def flush(self) -> None:
        """Starts to bring a remote file up to date."""
        if storage.is_remote(self._path):
            self._write_all()

    def wait_for_flush(self, timeout_s: float) -> None:
        """Waits until a remote file is up to date. Raises: StorageError when that takes longer than `timeout_s`."""
        self._background.flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Returns when every row is in the file. Raises: StorageError when that takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        policy = RetryPolicy(timeout_s=timeout_s, first_pause_s=CLOSE_PAUSE_S, max_pause_s=CLOSE_PAUSE_S)
        try:
            retry(self._write_all, policy, is_transient=lambda error: isinstance(error, OSError))
        except OSError as error:
            raise StorageError(
                f"{self._path} could not be written for {timeout_s:.0f} s. Make room on its disk."
            ) from error
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
        storage.write_text(self._path, text)
        self._behind = False

    def _try_write_all(self) -> None:
        try:
            self._write_all()
        except OSError:
            # `append` has warned when it began.
            self._behind = True


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Rows of a metrics file, [] when there is none; a last line cut off by a kill is ignored."""
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
