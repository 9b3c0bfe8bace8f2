"""How far a long step is: a bar for people, a line now and then for log files, from the first second on."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

FIRST_S = 1.0
EVERY_S = 10.0


class Progress:
    """Counts items of a step; a context manager.

    A thread of its own prints the lines, so that a step that waits for its first answer shows it too.

    Args:
        what: what is done, such as "ingest: bridge: listing".
        unit: what is counted.
        total: how many there will be; None where nobody knows.
    """

    def __init__(self, what: str, unit: str, total: int | None = None) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done = 0
        self._note = ""
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._bar = (
            tqdm(total=total, desc=what, unit=f" {unit}", leave=False) if sys.stderr.isatty() else None
        )
        self._printer = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> Progress:
        if self._bar is None:
            self._printer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bar is None:
            self._printer.join()
        else:
            self._bar.close()

    def step(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` stands at the end of the line."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note, refresh=False)

    def line(self) -> str:
        """The state in words."""
        seconds = time.monotonic() - self._started
        rate = self._done / seconds if seconds else 0.0
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._what} {self._done:,}{of} {self._unit}", f"{rate:,.1f}/s"]
        if self._total is not None and self._done:
            parts.append(f"about {(self._total - self._done) / rate:,.0f} s left")
        if self._note:
            parts.append(self._note)
        return ", ".join([*parts, f"{_resident_mb()} MB here"])

    def _print_lines(self) -> None:
        wait = FIRST_S
        while not self._ended.wait(wait):
            print(self.line(), flush=True)
            wait = EVERY_S


def _resident_mb() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE >> 20
