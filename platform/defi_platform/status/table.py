"""Runs as a table of text, and as plain values."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Sequence
from typing import Any

from defi_platform.status.prices import Prices
from defi_platform.status.run_status import RunStatus, duration

HEAD = ("run", "kind", "state", "progress", "rate", "data wait", "left", "checkpoint", "restarts", "cost")
MAX_REMARKS = 4


def table(runs: Sequence[RunStatus], prices: Prices | None) -> str:
    """Runs line by line; columns that are empty for all of them are left out.

    Args:
        runs: in their order.
        prices: of nodes; None: no cost is shown.
    """
    base = common_folder([run.folder for run in runs])
    rows = [_row(run, base, prices) for run in runs]
    columns = [number for number in range(len(HEAD)) if number < 3 or any(row[number] for row in rows)]
    cells = [[HEAD[number] for number in columns], *([row[number] for number in columns] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
    for number, run in reversed(list(enumerate(runs))):
        if run.remarks:
            more = len(run.remarks) - MAX_REMARKS
            text = ", ".join(run.remarks[:MAX_REMARKS]) + (f" and {more} more" if more > 0 else "")
            lines.insert(number + 2, f"    {text}")
    return "\n".join([f"in {base}", *lines] if base else lines)


def plain(run: RunStatus, prices: Prices | None) -> dict[str, Any]:
    """A run as JSON values, with its cost in dollars."""
    cost = prices.cost(run.hours) if prices else None
    return {**dataclasses.asdict(run), "remarks": list(run.remarks), "cost_usd": cost}


def common_folder(folders: Sequence[str]) -> str:
    """The longest folder that holds all of some folders and is none of them; "" for none."""
    parts = [folder.split("/")[:-1] for folder in folders]
    if not parts:
        return ""
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    found = "/".join(common)
    return "" if found.rstrip("/") in ("", "s3:") or found.endswith(":/") else found


def _row(run: RunStatus, base: str, prices: Prices | None) -> tuple[str, ...]:
    cost = prices.cost(run.hours) if prices and run.hours else None
    return (
        posixpath.relpath(run.folder, base)
        if base and "://" not in base
        else run.folder.removeprefix(f"{base}/"),
        run.kind,
        run.state,
        run.progress,
        run.rate,
        "" if run.data_wait is None else f"{run.data_wait:.0%}",
        "" if run.eta_s is None else duration(run.eta_s),
        run.checkpoint,
        "" if run.failures is None else str(run.failures),
        "" if cost is None else f"${cost:,.2f}",
    )
