"""Sequential test of a success rate: an evaluation ends when its answer is certain enough, with stated errors.

Tested is H0 "the rate is at most p0" against H1 "the rate is at least p1". With S successes in n episodes the likelihood
ratio of p1 to p0 is R = (p1/p0)^S ((1-p1)/(1-p0))^(n-S). The test ends for H1 at R >= 1/alpha and for H0 at R <= beta.

Its errors hold at any number of looks, without Wald's approximation: under H0 R is a supermartingale, so it ever reaches
1/alpha with a probability of at most alpha (Ville's inequality); likewise 1/R under H1. Tasks may differ: with one
episode of each task per block and a mean rate of p0, the expected factor of a block is a product of factors whose mean
is 1, hence at most 1 (arithmetic and geometric mean). So the test looks at whole blocks (one seed of every task).

Episodes must be taken in a fixed order, not as they finish: successes end sooner than failures, and the first to finish are
not a fair sample. `decide` looks at the longest finished beginning of the order, which is also why the decision is the
same with any number of workers. An ordinary interval does not hold at a time that the data have chosen; `interval`
does: it is the set of rates that R's mixture over all p1 (uniform prior) never rejects.

Source: Wald, Sequential Analysis (1947); Robbins, Statistical methods related to the law of the iterated logarithm (1970).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StopRule:
    """The test: rates to tell apart, and the errors that are accepted."""

    p0: float
    p1: float
    alpha: float = 0.05
    """Probability, at most, to find `at least p1` where the rate is p0 or less."""
    beta: float = 0.05
    """Probability, at most, to find `at most p0` where the rate is p1 or more."""

    def log_ratio(self, successes: int, episodes: int) -> float:
        """Natural logarithm of the likelihood ratio R.

        Args:
            successes: 0 to `episodes`.
            episodes: finished.
        """
        failures = episodes - successes
        return successes * math.log(self.p1 / self.p0) + failures * math.log((1 - self.p1) / (1 - self.p0))

    def found(self, successes: int, episodes: int) -> str | None:
        """The answer after so many episodes: "at least p1", "at most p0" or None while it is open.

        Args:
            successes: 0 to `episodes`.
            episodes: finished, whole blocks.
        """
        ratio = self.log_ratio(successes, episodes)
        if ratio >= -math.log(self.alpha):
            return f"at least {self.p1:g}"
        return f"at most {self.p0:g}" if ratio <= math.log(self.beta) else None


@dataclass(frozen=True)
class Decision:
    """The state of a test."""

    blocks: int
    """Blocks that it has looked at: all before the answer."""
    successes: int
    episodes: int
    found: str | None
    """The answer; None while it is open."""

    def as_mapping(self, rule: StopRule) -> dict[str, Any]:
        """The test and its answer as a summary holds them; the interval holds in spite of the early end."""
        low, high = interval(self.successes, self.episodes)
        return {**vars(rule), **vars(self), "low": low, "high": high}


def decide(rule: StopRule, blocks: Sequence[Sequence[bool | None] | None]) -> Decision:
    """Looks at the longest finished beginning of an evaluation, block after block, up to the first answer.

    Args:
        rule: of the test.
        blocks: in the fixed order; per block the successes of its episodes, None for one that was left out. None in the place
            of a block: it is not finished.
    """
    successes = episodes = looked = 0
    for block in blocks:
        if block is None:
            break
        counted = [success for success in block if success is not None]
        successes, episodes, looked = successes + sum(counted), episodes + len(counted), looked + 1
        if found := rule.found(successes, episodes):
            return Decision(looked, successes, episodes, found)
    return Decision(looked, successes, episodes, None)


def interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """A confidence interval of a rate that holds at all times together, so also at one that the data have chosen.

    It is wider than Wilson's, by about a half.

    Args:
        successes: 0 to `episodes`.
        episodes: 0 or more; (0, 1) for none.
        confidence: level, in (0, 1).
    """
    failures = episodes - successes
    # log of the mixture over all p1: the Beta function of S + 1 and n - S + 1.
    mixture = math.lgamma(successes + 1) + math.lgamma(failures + 1) - math.lgamma(episodes + 2)
    bound = mixture + math.log(1 - confidence)

    def inside(rate: float) -> bool:
        likelihood = successes * math.log(rate) + failures * math.log1p(-rate)
        return likelihood > bound

    def edge(outside: float, within: float) -> float:
        for _ in range(60):
            middle = (outside + within) / 2
            outside, within = (outside, middle) if inside(middle) else (middle, within)
        return within

    if not episodes:
        return 0.0, 1.0
    tiny = 1e-12
    peak = min(max(successes / episodes, tiny), 1 - tiny)
    return (0.0 if not successes else edge(tiny, peak)), (1.0 if not failures else edge(1 - tiny, peak))


def stopped_line(stopped: Mapping[str, Any]) -> str:
    """Sentence about a test that was asked for.

    Args:
        stopped: see `Decision.as_mapping`.
    """
    found = stopped["found"] or f"not decided between [{stopped['p0']}, {stopped['p1']}]"
    return (
        f"sequential test after {stopped['episodes']} episodes: the policy's rate is {found} "
        f"(errors {stopped['alpha']:g} and {stopped['beta']:g}; interval valid in spite of the early end "
        f"{100 * stopped['low']:.0f}-{100 * stopped['high']:.0f} %)"
    )
