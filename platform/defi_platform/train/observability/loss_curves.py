"""Loss curves of a run: the plot of training and validation loss over steps, and curves.png."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from defi_platform import storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"train": "#9dbbe0", "validation": "#c2410c"}
_STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 1.0},
    "validation": {"linewidth": 1.8, "marker": "o", "markersize": 3},
}


def plot_losses(axes: Axes, rows: Sequence[Mapping[str, Any]], *, log_scale: bool = False) -> None:
    """Plots training loss, and validation loss where it was measured, with a legend.

    Args:
        axes: to draw on.
        rows: as in metrics.jsonl; those with a `loss` have `step` and `split`.
        log_scale: a logarithmic axis where every loss is positive; else the axis starts at zero, so that a
            small improvement does not look like a large one.
    """
    rows = [row for row in rows if "loss" in row]
    for split, style in _STYLES.items():
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOURS[split], label=split, **style)
    axes.set_xlabel("step", fontsize=8)
    if not log_scale:
        axes.set_ylim(bottom=0)
    elif rows and min(row["loss"] for row in rows) > 0:
        axes.set_yscale("log")
    if rows:
        axes.legend(frameon=False, fontsize=8)


def write_curves(rows: Sequence[Mapping[str, Any]], path: str, title: str) -> None:
    """Writes the loss curves of a run as a picture.

    Args:
        rows: as in metrics.jsonl.
        path: PNG file, local or remote.
        title: above the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    plot_losses(axes, rows, log_scale=True)
    axes.set_ylabel("loss", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    storage.write_bytes(path, picture.getvalue())
