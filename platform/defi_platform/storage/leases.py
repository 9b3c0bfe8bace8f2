"""Leases among the processes that share a folder: of units of work, or of the folder; one holder until that one is gone.

A lease is a file `<unit>-<generation>.json` that names its owner and is never changed. It is created where there is
none, which the store grants to one process alone; to take over from an owner that is gone is to create the next
generation. So nothing has to be replaced or deleted at the right moment, and disks and S3 need the same two requests.

An owner proves that it lives by a file of its own that it renews. Others go by their own clocks: it is gone when its file
is (it has ended), when it has not changed for `dead_after_s`, and at once when it ran on this machine and its process
is no more. One that was held up and comes back finds a unit finished by another, or the next generation of a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from defi_platform import logs
from defi_platform.errors import TRY_AGAIN, ConfigError, UserError, one_line
from defi_platform.retry import Clock
from defi_platform.storage.exclusive import create_bytes
from defi_platform.storage.filesystem import delete, exists, join, names, read_bytes, read_text, write_text

LEASES, DRIVERS = "leases", "drivers"
DEAD_AFTER_S = 60.0
"""Seconds without a sign of life."""
IN_USE = "in_use"
"""Folder below a folder that has a lease of its own."""
FOLDER = "folder"
"""Name of the only unit there."""
POLL_S = 1.0
"""Between two looks at an owner of whom it is not known whether it lives."""


class FolderInUse(UserError):
    """A folder that another job writes to."""

    exit_code = TRY_AGAIN


@dataclass
class _Sign:
    """The last sign of life that was seen of a driver."""

    content: bytes
    at: float
    """By this process's clock."""
    moved: bool = False
    """It has been seen to change."""


class Leases:
    """The leases of one driver; a context manager, inside of which it renews its sign of life."""

    def __init__(
        self,
        output: str,
        *,
        dead_after_s: float = DEAD_AFTER_S,
        clock: Clock = time,
        after_beat: Callable[[], None] = lambda: None,
    ):
        """Prepares a driver.

        Args:
            output: that drivers share.
            dead_after_s: seconds without a sign of life after which another driver's leases are taken over.
            clock: by which they are counted.
            after_beat: called after each sign of life but the first, in another thread.
        """
        self.owner = uuid.uuid4().hex[:16]
        """Names this driver."""
        self._output, self._dead_after_s, self._clock = output, dead_after_s, clock
        self._after_beat = after_beat
        self._signs: dict[str, _Sign] = {}
        self._mine: set[str] = set()
        self._generations: dict[str, int] = {}
        """Unit -> the oldest generation that may be the newest."""
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
            delete(self._driver(self.owner))

    def take(self, unit: str) -> bool:
        """Takes the lease of a unit; again and again is as good as once.

        The unit may have been finished before: look after taking, not before.

        Args:
            unit: name of the unit, of characters that a file name may have.

        Returns: whether this driver owns it now.

        Raises: StorageError.
        """
        content = json.dumps({"owner": self.owner}).encode()
        while unit not in self._mine:
            path = self.path(unit)
            # After an answer that was lost the file is there and names this driver.
            if create_bytes(path, content) or (owner := _owner(path)) == self.owner:
                self._mine.add(unit)
            elif self._lives(owner):
                return False
            else:
                self._generations[unit] = self._generations.get(unit, 0) + 1
        return True

    def skip_old(self, unit: str) -> None:
        """Lets `take` begin with the newest generation, of a unit that has changed hands often."""
        pattern = re.compile(re.escape(unit) + r"-(\d+)\.json")
        found = [
            int(match[1]) for name in names(join(self._output, LEASES)) if (match := pattern.fullmatch(name))
        ]
        self._generations[unit] = max(found, default=0)

    def path(self, unit: str, later: int = 0) -> str:
        """The lease that this driver has, or waits for.

        Args:
            unit: name of the unit.
            later: generations after it.
        """
        return join(self._output, LEASES, f"{unit}-{self._generations.get(unit, 0) + later}.json")

    def holder(self, unit: str) -> tuple[str, bool]:
        """The driver for whose end `take` waits.

        Returns: (host and process, whether it is certain that it lives and not only that it did a while ago).
        """
        sign = self._signs.get(_owner(self.path(unit)))
        if sign is None:
            return "a job that has just ended", False
        found = _said(sign.content)
        if not found:
            return "a job whose sign of life is damaged", sign.moved
        where = f"process {found['process']['pid']} on {found['host']}"
        # In a copy of the folder the process is at work elsewhere, and the sign of life stands still.
        is_here = found.get("folder") == self._output and _is_here(found["process"])
        return where, sign.moved or is_here

    def _lives(self, owner: str) -> bool:
        try:
            content = read_bytes(self._driver(owner))
        except FileNotFoundError:
            return False
        sign = self._signs.get(owner)
        if sign is None or sign.content != content:
            self._signs[owner] = sign = _Sign(content, self._clock.monotonic(), moved=sign is not None)
        if (found := _said(content)) and _is_gone(found["process"]):
            return False
        return self._clock.monotonic() - sign.at < self._dead_after_s

    def _driver(self, owner: str) -> str:
        return join(self._output, DRIVERS, f"{owner}.json")

    def _beat(self) -> None:
        self._beats += 1
        pid = os.getpid()
        process = {"machine": _machine(), "pid": pid, "started": _started(pid)}
        host = os.uname().nodename
        content = {"beat": self._beats, "host": host, "folder": self._output, "process": process}
        write_text(self._driver(self.owner), json.dumps(content))

    def _renew(self) -> None:
        while not self._ended.wait(self._dead_after_s / 6):
            try:
                self._beat()
                self._after_beat()
            except (UserError, OSError) as error:
                logs.say(f"{self._output}: no sign of life could be written: {one_line(error)}")


class FolderLease:
    """The lease of a whole folder, such as that of a run; a context manager."""

    def __init__(
        self, folder: str, name: str, *, dead_after_s: float = DEAD_AFTER_S, clock: Clock = time
    ) -> None:
        """Prepares it.

        Args:
            folder: that one job writes to at a time, local or remote.
            name: of the run, for messages.
            dead_after_s: seconds without a sign of life after which another job counts as dead.
            clock: by which they are counted.
        """
        self._folder, self._name, self._dead_after_s, self._clock = folder, name, dead_after_s, clock
        self._leases = Leases(
            join(folder, IN_USE), dead_after_s=dead_after_s, clock=clock, after_beat=self._look
        )
        self._lost = threading.Event()

    def __enter__(self) -> FolderLease:
        """Takes it, after a while where another job had it and nobody knows whether that one lives.

        Raises: FolderInUse: it does; StorageError.
        """
        self._leases.__enter__()
        try:
            self._take()
        except BaseException:
            self._leases.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives it back."""
        self._leases.__exit__(kind, error, trace)

    @property
    def successor(self) -> str:
        """File that appears when another job takes the folder over, because it has seen no sign of life of this one."""
        return self._leases.path(FOLDER, later=1)

    def is_lost(self) -> bool:
        """True after another job has taken the folder over, as soon as it is known."""
        return self._lost.is_set()

    def _take(self) -> None:
        self._leases.skip_old(FOLDER)
        began, waited = self._clock.monotonic(), False
        while not self._leases.take(FOLDER):
            where, is_certain = self._leases.holder(FOLDER)
            # Its sign of life was found between two looks, again and again: somebody else is faster.
            if is_certain or self._clock.monotonic() - began > 3 * self._dead_after_s:
                raise in_use(self._folder, self._name, where)
            if not waited:
                logs.say(
                    f"{self._name}: {self._folder} was last used by {where}; waiting at most "
                    f"{self._dead_after_s:.0f} s to see whether that still lives",
                    run=self._folder,
                )
            waited = True
            self._clock.sleep(POLL_S)

    def _look(self) -> None:
        if exists(self.successor):
            self._lost.set()


def in_use(folder: str, name: str, where: str = "another job") -> FolderInUse:
    """The error of a job that finds another one in its folder.

    Args:
        folder: that both write to.
        name: of the run.
        where: the other job is.
    """
    return FolderInUse(
        f"{name}: {folder} is being written to by {where}. Wait for its end or stop it, or choose another folder."
    )


def _owner(path: str) -> str:
    try:
        found: Any = json.loads(read_text(path))
        return str(found["owner"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is damaged ({one_line(error)}), which a job that is killed does not do, but a copy that ended early "
            "or a full disk. Make sure that no job writes there, delete the file and run the same command."
        ) from error


def _said(content: bytes) -> dict[str, Any]:
    """A sign of life; {} for a damaged one, of which can only be seen whether it changes."""
    try:
        found: dict[str, Any] = json.loads(content)
        if {"machine", "pid", "started"} <= found["process"].keys() and "host" in found:
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _machine() -> str | None:
    """Names the running kernel and the namespace in which its process numbers mean something; None without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_here(process: dict[str, Any]) -> bool:
    """True when a process runs on this machine now."""
    machine = _machine()
    return (
        machine is not None
        and process["machine"] == machine
        and _started(process["pid"]) == process["started"]
    )


def _is_gone(process: dict[str, Any]) -> bool:
    """True when a process ran on this machine and is no more; False too where nobody can see."""
    machine = _machine()
    if machine is None or process["machine"] != machine:
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass  # there, and another user's: /proc may hide it (hidepid)
    return _stat(process["pid"]) is not None and _started(process["pid"]) != process["started"]


def _started(pid: int) -> str | None:
    """Start of a process of this machine, in the kernel's ticks; None when there is none, or only its remains."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str] | None:
    """Fields of a process in /proc, from its state on; None when there is none, or it is hidden."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
