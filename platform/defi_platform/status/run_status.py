"""State of one run, whatever it does."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SILENT_S = 180.0
"""Seconds after which a run that should go on counts as silent; a training writes its status at every step."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """State of one run; "" and None where its kind has no such thing, or nothing is known."""

    kind: str
    """gfdm | gidm | policy | ingest | latents | evaluation | recording"""
    folder: str
    state: str
    """In words, such as `training` or `complete`."""
    progress: str = ""
    rate: str = ""
    data_wait: float | None = None
    """Share of the time in which training waited for data."""
    eta_s: float | None = None
    checkpoint: str = ""
    """The newest one."""
    failures: int | None = None
    """Times that it was started again after its workers or its driver died."""
    remarks: tuple[str, ...] = ()
    """What was skipped or left out, with counts."""
    hours: dict[str, float] = field(default_factory=dict)
    """Hours so far, by Ray resource, that its workers held."""
    updated: float | None = None
    """Unix time of its newest sign."""

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do."""
        return self.state.startswith("complete")


def silent_for(updated: float | None, now: float | None = None) -> str:
    """Says how long a run has been silent; "" while it need not be.

    Args:
        updated: Unix time of its newest sign; None: not known.
        now: Unix time; None: of this machine's clock.
    """
    if updated is None:
        return ""
    age = (time.time() if now is None else now) - updated
    return f"silent for {duration(age)}" if age > SILENT_S else ""


def duration(seconds: float) -> str:
    """Seconds as people say them: `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if minutes < 2:
        return f"{seconds:.0f} s"
    if hours < 2:
        return f"{minutes:.0f} min"
    if days < 2:
        return f"{int(hours)} h {int(minutes) % 60:02d} min"
    return f"{int(days)} d {int(hours) % 24} h"
