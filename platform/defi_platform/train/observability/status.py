"""status.json of a run, its progress while it trains, and the lines that show it."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from defi_platform import storage
from defi_platform.progress import StatusLines
from defi_platform.storage import StorageError
from defi_platform.train.observability.background_writer import BackgroundWriter

FILE = "status.json"
LOCAL_INTERVAL_S, REMOTE_INTERVAL_S = 1.0, 15.0
FLUSH_S = 30.0
LOGGED = frozenset(
    {"step", "steps", "samples", "loss", "samples_per_s", "data_wait", "checkpoint_step", "eta_s"}
)
"""Figures of the state that are fields of a JSON log."""
SPEED_WINDOW_S = 30.0
"""The rate shown is that of about the last half minute."""


class StatusWriter:
    """Writes the newest state now and then, atomically, in the background; on rank 0.

    Args:
        run: run folder.
        kind: of the recipe.
        steps: of the whole run.
    """

    def __init__(self, run: str, kind: str, steps: int):
        self._path = storage.join(run, FILE)
        self._interval = REMOTE_INTERVAL_S if storage.is_remote(run) else LOCAL_INTERVAL_S
        self._state: dict[str, Any] = {"kind": kind, "steps": steps}
        self._written = 0.0
        self._background = BackgroundWriter()
        self._marks: list[tuple[float, int]] = []

    def update(self, force: bool = False, **values: Any) -> None:
        """Merges `values` into the state; `samples` also feeds the rate and the expected end."""
        self._state.update(values)
        now = time.monotonic()
        if not force and now - self._written < self._interval:
            return
        if "samples" in self._state:
            self._rate(now)
        self._written = now
        self._state["time"] = time.time()
        self._background.write(self._path, json.dumps(self._state))

    def flush(self) -> None:
        """Waits up to FLUSH_S until the newest state is written, which no result depends on."""
        with contextlib.suppress(StorageError):
            self._background.flush(FLUSH_S)

    def _rate(self, now: float) -> None:
        self._marks.append((now, self._state["samples"]))
        while len(self._marks) > 2 and now - self._marks[0][0] > SPEED_WINDOW_S:
            self._marks.pop(0)
        (then, first), (_, last) = self._marks[0], self._marks[-1]
        if now > then and last > first and self._state.get("step"):
            rate = (last - first) / (now - then)
            per_step = last / self._state["step"]
            self._state["samples_per_s"] = round(rate, 3)
            self._state["eta_s"] = round((self._state["steps"] - self._state["step"]) * per_step / rate, 1)


def read_status(run: str) -> dict[str, Any] | None:
    """The newest state of a run, None before its first."""
    path = storage.join(run, FILE)
    try:
        status: dict[str, Any] = json.loads(storage.read_text(path))
        return status
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def line(name: str, status: dict[str, Any] | None) -> str:
    """One line of progress: `gfdm step 120/600 | loss 0.4211 | 24.1 samples/s | data wait 3 % | ETA 2:31`."""
    if status is None:
        return f"{name} starting"
    if status.get("phase") != "training":
        return f"{name} {status.get('phase', 'starting')}"
    parts = [f"{name} step {status['step']}/{status['steps']}"]
    if "loss" in status:
        parts.append(f"loss {status['loss']:.4f}")
    if "samples_per_s" in status:
        parts.append(f"{status['samples_per_s']:.1f} samples/s")
    if "data_wait" in status:
        parts.append(f"data wait {100 * status['data_wait']:.0f} %")
    if status.get("checkpoint_step") is not None:
        parts.append(f"checkpoint {status['checkpoint_step']}")
    if "eta_s" in status:
        minutes, seconds = divmod(int(status["eta_s"]), 60)
        parts.append(f"ETA {minutes}:{seconds:02d}")
    return " | ".join(parts)


def _newest(name: str, run: str) -> tuple[str, dict[str, Any]]:
    """Returns: the line of a run, and the fields of it in a JSON log."""
    about: dict[str, Any] = {"run": run, "kind": name}
    try:
        status = read_status(run)
    except (OSError, StorageError):
        # The workers outlast a store that is away, and so does the view of them.
        return f"{name}: its status cannot be read for now, {run} does not answer", about
    return line(name, status), about | {key: value for key, value in (status or {}).items() if key in LOGGED}


class StatusView:
    """The driver's view of all runs that train at the same time.

    Args:
        runs: name -> run folder.
        interval_s: between lines of one run, where the output is a log.
    """

    def __init__(self, runs: dict[str, str], interval_s: float = 10.0):
        self._runs = runs
        self._lines = StatusLines(interval_s)

    def refresh(self) -> None:
        """Shows what has changed, when it is time to."""
        if self._lines.due():
            newest = {name: _newest(name, run) for name, run in self._runs.items()}
            self._lines.show(
                {name: text for name, (text, _) in newest.items()},
                {name: about for name, (_, about) in newest.items()},
            )
