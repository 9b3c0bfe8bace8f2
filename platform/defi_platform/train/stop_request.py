"""The request to stop a run at a checkpoint: an empty file in its run folder, local or remote."""

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
    """Rank 0's view of that file; a remote folder is polled in a thread, so that no step waits for storage.

    Args:
        run: run folder.
        interval_s: seconds between two polls of a remote folder.
    """

    def __init__(self, run: str, interval_s: float = REMOTE_INTERVAL_S):
        self._path, self._remote = storage.join(run, STOP), storage.is_remote(run)
        self._requested, self._interval_s = threading.Event(), interval_s
        self._ended = threading.Event()
        if self._remote:
            threading.Thread(target=self._poll, daemon=True, name="stop-request").start()

    def made(self) -> bool:
        """True when a stop has been requested."""
        return self._requested.is_set() if self._remote else storage.exists(self._path)

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()

    def _poll(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                if storage.exists(self._path):
                    self._requested.set()
                    return
            except (OSError, StorageError):
                # Storage is unavailable, which checkpoints report; the next poll tries again.
                continue
