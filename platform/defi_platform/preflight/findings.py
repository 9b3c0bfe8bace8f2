"""Findings of the checks: one line each, the same for all nodes or about those that differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL", "skip"]

CLIENT = "this client"
"""Name of the process that makes the checks, among those of nodes."""
MAX_NAMED = 4
"""Nodes that a line names; it counts the others."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    """One word, such as `storage`."""
    level: Level
    text: str
    """What was found, and the fix unless all is well; on one line."""

    def line(self) -> str:
        """The line as it is printed."""
        return f"{self.level:<4}  {self.check:<9}  {' '.join(self.text.split())}"


def ok(check: str, text: str) -> Finding:
    """A check that all nodes have passed."""
    return Finding(check, "ok", text)


def warn(check: str, text: str) -> Finding:
    """Something that will do, but not well."""
    return Finding(check, "warn", text)


def fail(check: str, text: str) -> Finding:
    """Something that a job would run into."""
    return Finding(check, "FAIL", text)


def skip(check: str, text: str) -> Finding:
    """A check that there was nothing for, or that could not be made; the text says why."""
    return Finding(check, "skip", text)


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether any check failed."""
    return any(finding.level == "FAIL" for finding in findings)


def summary(findings: Sequence[Finding], nodes: int) -> str:
    """The last line of a report: how many checks passed, and how many did not."""
    levels = [finding.level for finding in findings]
    counts = ", ".join(
        f"{levels.count(level)} {word}"
        for level, word in (("ok", "ok"), ("warn", "warned"), ("FAIL", "failed"), ("skip", "skipped"))
        if level in levels
    )
    return f"{number(nodes, 'node')}: {counts or 'nothing was checked'}"


def number(count: int, noun: str) -> str:
    """`1 node`, `3 nodes`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def named(nodes: Iterable[str], of: int | None = None) -> str:
    """Nodes by name, the first few of many.

    Args:
        nodes: their names.
        of: how many nodes there are; where it is all of several, they are not named.
    """
    names = sorted(nodes)
    if of is not None and len(names) == of > 1:
        return f"all {of} nodes"
    more = len(names) - MAX_NAMED
    shown = ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f"node {shown}" if len(names) == 1 else f"nodes {shown}"


def by_value(values: Mapping[str, object]) -> dict[object, list[str]]:
    """Nodes by what they have, the most frequent first."""
    groups: dict[object, list[str]] = {}
    for node, value in values.items():
        groups.setdefault(value, []).append(node)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def span(numbers: Iterable[float], unit: str = "", digits: int = 0) -> str:
    """Least and greatest of some numbers, as `12 to 40 MB/s`.

    Args:
        numbers: at least one.
        unit: behind them.
        digits: after the decimal point.
    """
    low, high = min(found := list(numbers)), max(found)
    first, last = f"{low:,.{digits}f}", f"{high:,.{digits}f}"
    return (first if first == last else f"{first} to {last}") + (f" {unit}" if unit else "")
