"""Power of McNemar's exact test, and the smallest difference that it can see with a number of pairs."""

from __future__ import annotations

import numpy as np


def power(pairs: int, difference: float, discordant: float, level: float = 0.05) -> float:
    """Probability that McNemar's exact test finds a true difference.

    Args:
        pairs: number of episodes that both policies run.
        difference: of the two rates, in [0, 1].
        discordant: share of pairs that one policy alone solves, from `difference` to 1.
        level: of the two-sided test.
    """
    from scipy.stats import binom

    if discordant <= 0:
        return 0.0
    numbers = np.arange(pairs + 1)
    # With m discordant pairs the test rejects at c or fewer in the rarer direction: 2 P(Bin(m, 1/2) <= c) <= level.
    critical = binom.ppf(level / 2, numbers, 0.5)
    critical -= binom.cdf(critical, numbers, 0.5) > level / 2
    better = min(1.0, (1 + difference / discordant) / 2)
    rejected = binom.cdf(critical, numbers, better) + binom.cdf(critical, numbers, 1 - better)
    return float(np.sum(binom.pmf(numbers, pairs, discordant) * np.where(critical >= 0, rejected, 0.0)))


def smallest_visible(pairs: int, discordant: float, level: float = 0.05, wanted: float = 0.8) -> float | None:
    """The smallest true difference of two rates that McNemar's exact test finds with the wanted power.

    Args:
        pairs: number of episodes that both policies run.
        discordant: share of pairs that one policy alone solves, as observed; a larger difference than that raises it.
        level: of the two-sided test; divided by the number of comparisons where there are several.
        wanted: power, in (0, 1).

    Returns:
        In (0, 1], rounded up to a thousandth; None where no difference can be seen with so few pairs.
    """
    low, high = 0, 1000  # thousandths; at `high` it is seen, if it ever is
    if power(pairs, 1.0, 1.0, level) < wanted:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        difference = middle / 1000
        if power(pairs, difference, max(discordant, difference), level) >= wanted:
            high = middle
        else:
            low = middle
    return high / 1000
