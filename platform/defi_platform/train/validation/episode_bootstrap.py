"""Means over samples with intervals over episodes: clips of one episode resemble each other, so episodes are drawn.

The interval is the percentile bootstrap: as many episodes as there are, drawn again and again with replacement, each with
all its samples; its ends are the 2.5th and 97.5th percentile of the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

RESAMPLES = 2000
_SEED = 0
"""Of the draws: the same samples give the same interval."""


def means_with_intervals(
    values: Mapping[str, Tensor], episodes: Sequence[str]
) -> dict[str, tuple[float, float | None, float | None]]:
    """(mean, low, high) of each measure; low and high are None where there is one episode alone, which says nothing.

    Args:
        values: name -> (N,) one figure per sample.
        episodes: of each of the N samples.
    """
    names, of = np.unique(np.asarray(episodes), return_inverse=True)
    sizes = np.bincount(of, minlength=len(names)).astype(np.float64)
    draws = (
        np.random.default_rng(_SEED)
        .multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
        .astype(np.float64)
    )
    found: dict[str, tuple[float, float | None, float | None]] = {}
    for name, figures in values.items():
        each = figures.double().cpu().numpy()
        mean = float(each.mean())
        if len(names) == 1:
            found[name] = mean, None, None
            continue
        sums = np.bincount(of, weights=each, minlength=len(names))
        low, high = np.percentile((draws @ sums) / (draws @ sizes), [2.5, 97.5])
        found[name] = mean, float(low), float(high)
    return found
