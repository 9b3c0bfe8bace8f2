"""Leases of units of work among the drivers that share an output: one unit, one driver, until that one is gone.

A lease is a file `<unit>-<generation>.json` that names its owner and is never changed. It is created where there is
none, which the store grants to one driver alone; to take over from an owner that is gone is to create the next
generation. So nothing has to be replaced or deleted at the right moment, and disks and S3 need the same two requests.

An owner proves that it lives by a file of its own that it renews. Others go by their own clocks: it is gone when its file
is (it has ended), when it has not changed for `dead_after_s`, and at once when it ran on this machine and its process
is no more. One that was held up and comes back finds its episodes finished by another: the first one stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from defi_platform import logs, storage
from defi_platform.errors import UserError, one_line
from defi_platform.evaluate.store.whole_json import read_json
from defi_platform.retry import Clock
from defi_platform.storage.exclusive import create_bytes

LEASES, DRIVERS = "leases", "drivers"
DEAD_AFTER_S = 60.0
"""Seconds without a sign of life."""


@dataclass
class _Sign:
    """The last sign of life that was seen of a driver."""

    content: str
    at: float
    """By this process's clock."""


class Leases:
    """The leases of one driver; a context manager, inside of which it renews its sign of life."""

    def __init__(self, output: str, *, dead_after_s: float = DEAD_AFTER_S, clock: Clock = time):
        """Prepares a driver.

        Args:
            output: that drivers share.
            dead_after_s: seconds without a sign of life after which another driver's leases are taken over.
            clock: by which they are counted.
        """
        self.owner = uuid.uuid4().hex[:16]
        """Names this driver."""
        self._output, self._dead_after_s, self._clock = output, dead_after_s, clock
        self._signs: dict[str, _Sign] = {}
        self._mine: set[str] = set()
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="leases", daemon=True)

    def __enter__(self) -> Leases:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives everything back: who has no file owns nothing."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(UserError, OSError):  # else they are given back when it counts as dead
            storage.delete(self._driver(self.owner))

    def take(self, unit: str) -> bool:
        """Takes the lease of a unit; again and again is as good as once.

        The unit may have been finished before: look after taking, not before.

        Args:
            unit: name of the unit, of characters that a file name may have.

        Returns: whether this driver owns it now.

        Raises: StorageError.
        """
        content = json.dumps({"owner": self.owner}).encode()
        generation = 0
        while unit not in self._mine:
            path = storage.join(self._output, LEASES, f"{unit}-{generation}.json")
            # After an answer that was lost the file is there and names this driver.
            if create_bytes(path, content) or (owner := _owner(path)) == self.owner:
                self._mine.add(unit)
            elif self._lives(owner):
                return False
            generation += 1
        return True

    def _lives(self, owner: str) -> bool:
        try:
            content = storage.read_text(self._driver(owner))
        except FileNotFoundError:
            return False
        sign = self._signs.get(owner)
        if sign is None or sign.content != content:
            self._signs[owner] = sign = _Sign(content, self._clock.monotonic())
        process = json.loads(content)["process"]
        if process["machine"] == _machine() and _started(process["pid"]) != process["started"]:
            return False
        return self._clock.monotonic() - sign.at < self._dead_after_s

    def _driver(self, owner: str) -> str:
        return storage.join(self._output, DRIVERS, f"{owner}.json")

    def _beat(self) -> None:
        self._beats += 1
        pid = os.getpid()
        process = {"machine": _machine(), "pid": pid, "started": _started(pid)}
        content = {"beat": self._beats, "host": os.uname().nodename, "process": process}
        storage.write_text(self._driver(self.owner), json.dumps(content))

    def _renew(self) -> None:
        while not self._ended.wait(self._dead_after_s / 6):
            try:
                self._beat()
            except (UserError, OSError) as error:
                logs.say(f"{self._output}: no sign of life could be written: {one_line(error)}")


def _owner(path: str) -> str:
    return str(read_json(path)["owner"])


def _machine() -> str:
    """Names the running kernel and the namespace in which its process numbers mean something."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """Start of a process of this machine, in the kernel's ticks; None when there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
