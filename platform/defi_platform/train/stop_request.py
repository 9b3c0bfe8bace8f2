"""The request to stop a run at a checkpoint: an empty file in its run folder, wherever that lies."""

from __future__ import annotations

import threading

from defi_platform import storage
from defi_platform.storage import StorageError

STOP = "stop"
REMOTE_INTERVAL_S = 10.0


def request_stop(run: str) -> None:
    """Asks the run to stop at its next step."""
    storage.write_text(storage.join(run, STOP), "")


class StopRequest:
    """Rank 0's look at that file; in a remote folder a thread looks now and then, so that no step waits for it."""

    def __init__(self, run: str, interval_s: float = REMOTE_INTERVAL_S):
        self._path, self._remote = storage.join(run, STOP), storage.is_remote(run)
        self._seen, self._interval_s = threading.Event(), interval_s
        self._ended = threading.Event()
        if self._remote:
            threading.Thread(target=self._look, daemon=True, name="stop-request").start()

    def made(self) -> bool:
        """Whether somebody has asked."""
        return self._seen.is_set() if self._remote else storage.exists(self._path)

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                if storage.exists(self._path):
                    self._seen.set()
                    return
            except (OSError, StorageError):
                # The store is away. Checkpoints tell of that; the request is looked for again.
                continue
