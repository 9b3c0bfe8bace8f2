"""The report of a conversion: every key, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Report:
    """Every key of a conversion by what became of it, in PyTorch's terms."""

    used: list[tuple[str, str]] = field(default_factory=list)
    """(source name, target name)"""
    unexpected_keys: list[str] = field(default_factory=list)
    """Names in the source that the target does not have."""
    missing_parts: list[str] = field(default_factory=list)
    """Frozen parts that neither the source nor an option provides; a missing key of another part is an error."""

    def lines(self) -> Iterable[str]:
        """The report as text, a line per key, the sums last."""
        yield from (f"used        {source} -> {target}" for source, target in self.used)
        yield from (f"unexpected  {name}" for name in self.unexpected_keys)
        yield from (f"missing     {name}: the folder cannot run without it" for name in self.missing_parts)
        yield (
            f"{len(self.used)} used, {len(self.unexpected_keys)} unexpected, {len(self.missing_parts)} missing part(s)"
        )
