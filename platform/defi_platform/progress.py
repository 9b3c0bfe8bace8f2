"""Progress displays of long steps: a bar or status lines on a terminal, lines now and then in a log."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from defi_platform import logs

FIRST_S = 1.0
EVERY_S = 10.0


class Progress:
    """Counts the items of a step; a context manager.

    On a terminal it is a bar, otherwise a line after a second and then every ten. A thread prints the lines, so that
    a step that waits for its first answer shows it too.

    Args:
        title: of the step, such as "ingest: bridge: listing".
        unit: of the items.
        total: number of items; None where nobody knows.
        initial: items that were done before.
        publish: is called now and then, from a thread, and at the end with the number of items since the last call.
        about: fields of its lines in a JSON log, such as the corpus.
    """

    def __init__(
        self,
        title: str,
        unit: str,
        total: int | None = None,
        initial: int = 0,
        publish: Callable[[int], None] | None = None,
        **about: Any,
    ) -> None:
        self._title, self._unit, self._total = title, unit, total
        self._done = self._initial = self._published = initial
        self._publish, self._about = publish, about
        self._note = ""
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._bar = (
            tqdm(total=total, initial=initial, desc=title, unit=f" {unit}", leave=False)
            if sys.stderr.isatty()
            else None
        )
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Progress:
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._watcher.join()
        self._publish_new()
        if self._bar is not None:
            self._bar.close()

    def step(self, count: int = 1, note: str = "") -> None:
        """Counts `count` more items; `note` ends the line from now on."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.update(count)
            if note:
                self._bar.set_postfix_str(note, refresh=False)

    def line(self) -> str:
        """The state in words."""
        seconds = time.monotonic() - self._started
        rate = (self._done - self._initial) / seconds if seconds else 0.0
        of = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._title} {self._done:,}{of} {self._unit}", f"{rate:,.1f}/s"]
        if self._total is not None and rate:
            parts.append(f"about {(self._total - self._done) / rate:,.0f} s left")
        if self._note:
            parts.append(self._note)
        return ", ".join([*parts, f"{_resident_mb()} MB here"])

    def _watch(self) -> None:
        wait = FIRST_S
        while not self._ended.wait(wait):
            self._publish_new()
            if self._bar is None:
                logs.say(self.line(), done=self._done, total=self._total, **self._about)
            wait = EVERY_S

    def _publish_new(self) -> None:
        """Hands on the items since the last call; not at each `step`, of which a listing makes 100,000 per second."""
        if self._publish is not None:
            done = self._done
            self._publish(done - self._published)
            self._published = done


class StatusLines:
    """One line for each of several things that go on at the same time.

    On a terminal the lines are drawn in place once a second; in a log one appears when it has changed.

    Args:
        interval_s: shortest time between two lines of one thing in a log.
    """

    def __init__(self, interval_s: float = EVERY_S) -> None:
        self._interval_s = 1.0 if sys.stdout.isatty() else interval_s
        self._drawn = 0
        self._shown = 0.0
        self._last: dict[str, str] = {}

    def due(self) -> bool:
        """True when `show` was called long enough ago."""
        return time.monotonic() - self._shown >= self._interval_s

    def show(self, lines: dict[str, str], about: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Draws the lines.

        Args:
            lines: name -> line.
            about: name -> fields of its line in a JSON log.
        """
        self._shown = time.monotonic()
        if sys.stdout.isatty():
            if self._drawn:
                sys.stdout.write(f"\x1b[{self._drawn}F")
            sys.stdout.write("".join(f"\x1b[2K{text}\n" for text in lines.values()))
            self._drawn = len(lines)
        else:
            for name, text in lines.items():
                if self._last.get(name) != text:
                    logs.say(text, **(about or {}).get(name, {}))
        self._last = lines
        sys.stdout.flush()


def _resident_mb() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE >> 20
