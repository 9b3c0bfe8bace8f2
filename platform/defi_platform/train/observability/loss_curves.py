"""curves.png: training and validation loss of a run over its steps."""

from __future__ import annotations

import io
from typing import Any

from defi_platform import storage


def write_curves(rows: list[dict[str, Any]], path: str, title: str) -> None:
    """Draws every `loss` of a metrics file.

    Args:
        rows: as in metrics.jsonl.
        path: PNG file, local or remote.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for split, style in (("train", {"alpha": 0.6, "linewidth": 1}), ("validation", {"marker": "o"})):
        points = [(row["step"], row["loss"]) for row in rows if row["split"] == split and "loss" in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=split, **style)
    positive = [row["loss"] for row in rows if "loss" in row]
    if positive and min(positive) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    if positive:
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    plt.close(figure)
    storage.write_bytes(path, picture.getvalue())
