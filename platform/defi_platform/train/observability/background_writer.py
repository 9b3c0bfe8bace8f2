"""Small files that training must not wait for: written by a thread of their own, again and again until they are there."""

from __future__ import annotations

import threading
import time

from defi_platform import storage
from defi_platform.storage import StorageError

RETRY_S = 2.0


class BackgroundWriter:
    """Writes the newest text of each path; older ones that were never written are dropped."""

    def __init__(self) -> None:
        self._newest: dict[str, str] = {}
        self._changed = threading.Condition()
        self._writing = False
        self._failure: str | None = None
        threading.Thread(target=self._work, daemon=True, name="background-writer").start()

    def write(self, path: str, text: str) -> None:
        """Returns at once."""
        with self._changed:
            self._newest[path] = text
            self._changed.notify_all()

    def flush(self, patience_s: float) -> None:
        """Waits until everything is written.

        Raises: StorageError with the last failure when that takes longer than `patience_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._newest and not self._writing, patience_s):
                raise StorageError(
                    f"{', '.join(self._newest) or 'a file'} could not be written for {patience_s:.0f} s: "
                    f"{self._failure or 'the store does not answer'}."
                )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._newest))
                path = next(iter(self._newest))
                text = self._newest.pop(path)
                self._writing = True
            try:
                storage.write_text(path, text)
                failure = None
            except (OSError, StorageError) as error:
                failure = str(error)
            with self._changed:
                self._writing = False
                if failure:
                    self._newest.setdefault(path, text)
                    if not self._failure:
                        print(f"{path} cannot be written for now, training goes on: {failure}", flush=True)
                self._failure = failure
                self._changed.notify_all()
            if failure:
                time.sleep(RETRY_S)
