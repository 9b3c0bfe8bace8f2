"""What a conversion did with every key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Report:
    """What became of every key."""

    used: list[tuple[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """Frozen parts that neither the source nor an option provides."""

    def lines(self) -> Iterable[str]:
        yield from (f"used    {source} -> {target}" for source, target in self.used)
        yield from (f"left    {name}" for name in self.left)
        yield from (f"missed  {name}" for name in self.missed)
        yield from (f"absent  {name}: the folder cannot run without it" for name in self.absent)
        yield f"{len(self.used)} used, {len(self.left)} left, {len(self.missed)} missed, {len(self.absent)} absent"
