"""Charts of the corpus page, each a self-contained SVG element."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from defi_platform.evaluate.html.report_figures import panels, svg

COLOUR = "#2563a8"
WANTED, REALISED = "#9aa3ad", "#2563a8"


def histograms(values: Mapping[str, NDArray[Any]], bins: int = 24, counted: str = "videos") -> Markup:
    """A figure with the histogram of each quantity.

    Args:
        values: axis title -> numbers (N,), at least one.
        bins: of equal width over the range of the numbers.
        counted: plural of what has one number each.
    """
    figure, axes = panels(len(values), width=3.1, height=2.0)
    for axis, (title, numbers) in zip(axes, values.items(), strict=True):
        low, high = float(numbers.min()), float(numbers.max())
        if high - low > 0.01 * abs(high):
            axis.hist(numbers, bins=bins, range=(low, high), color=COLOUR)
        else:  # one value, which a histogram would spread over an arbitrary range
            axis.bar([0], [len(numbers)], 0.12, color=COLOUR)
            axis.set_xlim(-1, 1)
            axis.set_xticks([0], [f"{numbers.mean():.4g}"])
        axis.set_xlabel(title, fontsize=8)
        axis.set_ylabel(counted, fontsize=8)
        axis.yaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    return svg(figure, "Histograms: " + ", ".join(values))


def mixture_bars(names: Sequence[str], wanted: Sequence[float], realised: Sequence[float]) -> Markup:
    """Bars of the configured and the realised share of each corpus.

    Args:
        names: of the corpora.
        wanted: configured share of each, 0 to 1.
        realised: share of each among the samples of the plan, 0 to 1.
    """
    figure, (axis,) = panels(1, width=max(4.5, 1.3 * len(names) + 1), height=2.2)
    positions = np.arange(len(names))
    axis.bar(positions - 0.2, wanted, 0.38, color=WANTED, label="asked for")
    axis.bar(positions + 0.2, realised, 0.38, color=REALISED, label="realised")
    axis.set_xticks(positions, names, fontsize=8)
    axis.set_ylabel("share of samples", fontsize=8)
    axis.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return svg(figure, "Mixture of corpora, asked for and realised")
