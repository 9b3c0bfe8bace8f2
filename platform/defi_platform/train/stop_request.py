"""Files in a run folder, local or remote, whose appearance tells a run something: an empty one asks it to stop."""

from __future__ import annotations

import threading

from defi_platform import storage
from defi_platform.storage import StorageError

STOP = "stop"
REMOTE_INTERVAL_S = 10.0


def request_stop(run: str) -> None:
    """Asks the run to stop at its next step."""
    storage.write_text(storage.join(run, STOP), "")


class FileWatch:
    """Rank 0's view of a file; a remote one is looked for in a thread, so that no step waits for storage.

    Args:
        path: of the file.
        interval_s: seconds between two looks at a remote one.
    """

    def __init__(self, path: str, interval_s: float = REMOTE_INTERVAL_S):
        self._path, self._remote = path, storage.is_remote(path)
        self._seen, self._interval_s = threading.Event(), interval_s
        self._ended = threading.Event()
        if self._remote:
            threading.Thread(target=self._poll, daemon=True, name="file-watch").start()

    def seen(self) -> bool:
        """True when the file has appeared."""
        if self._remote:
            return self._seen.is_set()
        try:
            return storage.exists(self._path)
        except OSError:
            return False  # as in `_poll`

    def close(self) -> None:
        """Ends the thread."""
        self._ended.set()

    def _poll(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                if storage.exists(self._path):
                    self._seen.set()
                    return
            except (OSError, StorageError):
                # Storage is unavailable, which checkpoints report; the next poll tries again.
                continue


class StopRequest(FileWatch):
    """Rank 0's view of the request to stop.

    Args:
        run: run folder.
        interval_s: see `FileWatch`.
    """

    def __init__(self, run: str, interval_s: float = REMOTE_INTERVAL_S):
        super().__init__(storage.join(run, STOP), interval_s)

    def made(self) -> bool:
        """True when a stop has been requested."""
        return self.seen()
