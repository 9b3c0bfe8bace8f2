"""Statistics of the actions and states of a corpus, for its page: ranges, jumps, constants and outliers per entry."""

# n steps, D entries

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from defi_platform.evaluate.html import corpus_figures as figures
from defi_platform.evaluate.html.page import Table

MOST_STEPS = 500_000
"""Steps that are looked at; of more, whole episodes spread evenly over the corpus."""
FAR = 3.0
"""A value is an outlier from this many widths of the middle 98 % beyond their ends on."""
TURN = 2 * np.pi
PER_ROW = 6
"""Histograms side by side."""


@dataclass(frozen=True)
class SignalSection:
    """Actions or states of one corpus."""

    title: str
    histograms: list[Markup]
    entries: Table
    remarks: list[str]
    """What a reader should know before training on them."""


def spread(lengths: Sequence[int], most: int = MOST_STEPS) -> list[int]:
    """Numbers of the episodes to look at: all of them, or as many as have about `most` steps."""
    total = sum(lengths)
    if total <= most:
        return list(range(len(lengths)))
    count = max(1, int(len(lengths) * most / total))
    return [int(number) for number in np.linspace(0, len(lengths) - 1, count).round()]


def signal_section(
    title: str, episodes: Sequence[NDArray[np.float32]], names: Sequence[str], whole: int
) -> SignalSection:
    """Statistics of one kind of signal.

    Args:
        title: such as "Actions".
        episodes: (n, D) each; those that were looked at, at least one.
        names: of the entries; () numbers them.
        whole: episodes of the corpus.
    """
    values = np.concatenate(episodes)
    width = values.shape[1]
    labels = [f"{number} {name}" for number, name in enumerate(names)] if names else [*map(str, range(width))]
    jumps = sum((_turns(one) for one in episodes), np.zeros(width, np.int64))
    low, middle, high = np.quantile(values, [0.01, 0.5, 0.99], axis=0)
    constant = values.min(axis=0) == values.max(axis=0)
    beyond = FAR * (high - low)
    outliers = ((values < low - beyond) | (values > high + beyond)).sum(axis=0)
    rows = [
        [
            labels[entry],
            *(f"{number:.4g}" for number in (values[:, entry].min(), low[entry], middle[entry], high[entry])),
            *(f"{number:.4g}" for number in (values[:, entry].max(), values[:, entry].std())),
            f"{jumps[entry]:,}" if jumps[entry] else "",
            "yes" if constant[entry] else "",
            f"{outliers[entry]:,}" if outliers[entry] else "",
        ]
        for entry in range(width)
    ]
    head = ["entry", "min", "1 %", "median", "99 %", "max", "std", "jumps by 2 pi", "constant", "outliers"]
    looked = f"{len(values):,} steps of {len(episodes):,} episodes"
    remarks = [looked if len(episodes) == whole else f"{looked} out of {whole:,}, evenly spread"]
    remarks += _remarks(labels, jumps, constant, outliers)
    histograms = [
        figures.histograms(
            {labels[entry]: values[:, entry] for entry in range(start, min(start + PER_ROW, width))},
            counted="steps",
        )
        for start in range(0, width, PER_ROW)
    ]
    return SignalSection(title, histograms, Table(head, rows), remarks)


def _turns(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Steps (D,) from which an entry comes to another side of a circle, as angles do that are kept within one turn."""
    steps = np.abs(np.diff(values, axis=0))
    within = np.abs(values).max(axis=0) <= TURN * 1.01
    turned: NDArray[np.int64] = ((np.abs(steps - TURN) < TURN / 6) & within).sum(axis=0)
    return turned


def _remarks(
    labels: Sequence[str],
    jumps: NDArray[np.int64],
    constant: NDArray[np.bool_],
    outliers: NDArray[np.int64],
) -> Iterator[str]:
    if jumps.any():
        yield f"{_listed(labels, jumps > 0)}: angles that jump by 2 pi; a mean over such a jump is of no use."
    if constant.any():
        yield f"{_listed(labels, constant)}: one value in every step."
    if outliers.any():
        yield (
            f"{_listed(labels, outliers > 0)}: values further than {FAR:g} times the width of the middle 98 % beyond "
            "its ends; they stretch the range that min_max normalises by."
        )


def _listed(labels: Sequence[str], chosen: Iterable[bool]) -> str:
    return ", ".join(label for label, take in zip(labels, chosen, strict=True) if take)
