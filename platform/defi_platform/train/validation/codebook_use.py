"""Use of a codebook, and the alarm when it has collapsed: few codes, one code, or codes that never change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

USAGE = (
    "codebook_fraction_used",
    "codebook_perplexity",
    "codes_used",
    "most_used_share",
    "constant_positions",
    "code_counts",
    "alarm",
)
"""Names of the figures."""

LEAST_USED = 0.25
"""Share of the codes in use below which the alarm is given."""
MOST_USED = 0.8
"""Share of all tokens that one code may have."""
CONSTANT = 0.99
"""A position is constant when one code has this share of its tokens."""
ENOUGH = 4
"""Tokens per code from which on an unused code says something."""


def position_counts(indices: Tensor, codes: int) -> Tensor:
    """Number of times that each code was chosen at each of the K positions of a latent action.

    Args:
        indices: int64 (B, K).
        codes: size of the codebook.

    Returns: int64 (K, codes).
    """
    return torch.stack([torch.bincount(of_position, minlength=codes) for of_position in indices.unbind(1)])


def code_usage(counts: Tensor) -> dict[str, Any]:
    """Usage of the codebook.

    Args:
        counts: (K, codes) number of times each was chosen at each position.

    Returns: `codebook_fraction_used` in 0..1, `codebook_perplexity` (the effective number of codes), `codes_used`,
        `most_used_share` (of all tokens, 0..1), `constant_positions` (of K), `code_counts` over all positions, and
        `alarm`, a sentence, where the codebook has collapsed.
    """
    from defi_models.layers.codebook import fraction_used, perplexity

    of_code, tokens = counts.sum(dim=0), int(counts.sum())
    of_position = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    usage = {
        "codebook_fraction_used": fraction_used(of_code),
        "codebook_perplexity": perplexity(of_code),
        "codes_used": int((of_code > 0).sum()),
        "most_used_share": float(of_code.max() / max(1, tokens)),
        "constant_positions": int((of_position.amax(dim=1) >= CONSTANT).sum()),
        "code_counts": [int(count) for count in of_code],
    }
    alarm = _alarm(usage, len(of_code), len(counts), tokens)
    return usage | ({"alarm": alarm} if alarm else {})


def _alarm(usage: dict[str, Any], codes: int, positions: int, tokens: int) -> str | None:
    used, share = usage["codes_used"], usage["most_used_share"]
    reasons = []
    if tokens >= ENOUGH * codes and used < LEAST_USED * codes:
        reasons.append(f"{used} of {codes} codes are in use")
    if tokens >= ENOUGH * positions and share > MOST_USED:
        reasons.append(f"one code is {share:.0%} of {tokens} tokens")
    if tokens >= ENOUGH * positions and usage["constant_positions"] == positions:
        reasons.append(f"each of the {positions} tokens has the same code for every pair of frames")
    if not reasons:
        return None
    return (
        f"the codebook has collapsed: {'; '.join(reasons)}. Such tokens say little about what happened. Try a lower "
        "train.learning_rate, a shorter train.restart_dead_codes_every, or other pairs (data.pair_interval_s)."
    )
