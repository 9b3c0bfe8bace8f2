"""Wall time of a run over all its attempts."""

from __future__ import annotations

import time
from dataclasses import dataclass

from defi_platform.train.checkpoint.format import Position


@dataclass(frozen=True)
class RunClock:
    """Counts the time of one driver and those before it."""

    started: float
    """Unix time at which this driver started."""
    before_s: float = 0.0
    """Seconds of the drivers before it."""

    @classmethod
    def resume(cls, started: float, position: Position | None) -> RunClock:
        """The clock of an attempt that starts at a checkpoint, or at the beginning."""
        if position is None:
            return cls(started)
        # Workers that died and came back under the same driver have one start; its time counts once.
        same_driver = position.clock["started"] == started
        return cls(started, position.clock["before_s"] if same_driver else position.wall_s)

    def wall_s(self) -> float:
        """Seconds of training so far, over all attempts."""
        return self.before_s + time.time() - self.started

    def state(self) -> dict[str, float]:
        """The clock as a checkpoint stores it."""
        return {"started": self.started, "before_s": self.before_s}
