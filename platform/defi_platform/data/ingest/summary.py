"""A summary of an ingest as text: per corpus its videos and hours, what was rejected and why, and what else to know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from defi_platform.data.manifest.commit_marker import read_committed
from defi_platform.data.manifest.notes import warnings
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import NOTES, REASONS


def ingest_table(folder: str, names: Sequence[str]) -> str:
    """Makes the table of the corpora `names` in the manifest at `folder`, and a warning per kind of note."""
    lines = [("corpus", "format", "videos", "hours", "number", "reason", "")]
    warned, any_rejected = [], False
    for name in names:
        committed = read_committed(folder, name)
        assert committed is not None
        manifest = Manifest.open(folder, [name])
        hours = (
            float(np.sum(manifest.numbers("num_frames") / np.maximum(manifest.numbers("fps"), 1e-6))) / 3600
        )
        head = (
            name,
            str(committed.settings["format"]),
            f"{committed.counts['videos']:,}",
            f"{hours:,.3f}",
        )
        rejected = sorted((k, n) for k, n in committed.counts.items() if k != "videos")
        numbers = [(n, reason, f"rejected: {REASONS[reason]}") for reason, n in rejected]
        numbers += [(n, kind, NOTES[kind]) for kind, (n, _) in sorted(committed.notes.items())]
        any_rejected |= bool(rejected)
        warned += warnings(name, committed.notes)
        if not numbers:
            lines.append((*head, "0", "", ""))
        for position, (count, reason, meaning) in enumerate(numbers):
            start = ("", "", "", "") if position else head
            lines.append((*start, f"{count:,}", reason, meaning))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    text = [
        "  ".join(
            cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, [*widths, 0], strict=True))
        ).rstrip()
        for line in lines
    ]
    hint = "; --retry-quarantined opens the rejected again" if any_rejected else ""
    return "\n".join([*text, *warned, f"manifest and quarantine: {folder}{hint}"])
