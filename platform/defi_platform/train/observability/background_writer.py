"""Background writes of small files that training must not wait for, retried until they succeed."""

from __future__ import annotations

import threading

from defi_platform import storage
from defi_platform.retry import RetryPolicy, retry
from defi_platform.storage import StorageError

POLICY = RetryPolicy(first_pause_s=2.0, max_pause_s=2.0)


class BackgroundWriter:
    """Writes the newest text of each path in a thread; an older one that was never written is dropped."""

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

    def flush(self, timeout_s: float) -> None:
        """Waits until everything is written.

        Raises: StorageError with the last failure when that takes longer than `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._newest and not self._writing, timeout_s):
                raise StorageError(
                    f"{', '.join(self._newest) or 'a file'} could not be written for {timeout_s:.0f} s: "
                    f"{self._failure or 'the store does not answer'}."
                )

    def _work(self) -> None:
        while True:
            retry(self._write_next, POLICY, is_transient=_is_transient)

    def _write_next(self) -> None:
        """Waits for a text and writes it; one that fails is put back unless there is a newer one."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._newest))
            path = next(iter(self._newest))
            text = self._newest.pop(path)
            self._writing = True
        failure: Exception | None = None
        try:
            storage.write_text(path, text)
        except (OSError, StorageError) as error:
            failure = error
        with self._changed:
            self._writing = False
            if failure:
                self._newest.setdefault(path, text)
                if not self._failure:
                    print(f"{path} cannot be written for now, training goes on: {failure}", flush=True)
            self._failure = str(failure) if failure else None
            self._changed.notify_all()
        if failure:
            raise failure


def _is_transient(error: Exception) -> bool:
    # A folder that is absent may be made again, and nobody else would.
    return isinstance(error, (OSError, StorageError))
