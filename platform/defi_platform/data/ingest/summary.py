"""A summary of an ingest as text: per corpus its videos and hours, and what was rejected and why."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from defi_platform.data.manifest.commit_marker import read_committed
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import REASONS


def ingest_table(folder: str, names: Sequence[str]) -> str:
    """Makes the table of the corpora `names` in the manifest at `folder`."""
    lines = [("corpus", "format", "videos", "hours", "rejected", "reason", "")]
    for name in names:
        committed = read_committed(folder, name)
        assert committed is not None
        rejected = sorted((k, n) for k, n in committed.counts.items() if k != "videos")
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
        if not rejected:
            lines.append((*head, "0", "", ""))
        for number, (reason, count) in enumerate(rejected):
            start = ("", "", "", "") if number else head
            lines.append((*start, f"{count:,}", reason, REASONS[reason]))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    text = [
        "  ".join(
            cell.rjust(width) if column in (2, 3, 4) else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, [*widths, 0], strict=True))
        ).rstrip()
        for line in lines
    ]
    hint = "; --retry-quarantined opens the rejected again" if any(line[5] for line in lines[1:]) else ""
    return "\n".join([*text, f"manifest and quarantine: {folder}{hint}"])
