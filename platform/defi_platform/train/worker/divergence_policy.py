"""Losses and gradients that are no number: what is left out, and when a run stops. Decides, does nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

from defi_platform.config import TrainConfig
from defi_platform.errors import UserError

MOST_SKIPPED = {"fp32": 3, "bf16": 3, "fp16": 50}
"""Updates left out in a row after which a run stops, by precision. fp16 leaves some out as a matter of course,
each time with half the loss scale of the time before."""


class Diverged(UserError):
    """A run whose loss or gradient is no number and will not become one again."""


class UpdateDecision(Enum):
    """What an update came to."""

    KEEP = "keep"
    SKIP = "skip"
    """It was left out; the weights are what they were before."""
    STOP = "stop"


class UpdateJudge:
    """Judges one update after the other."""

    def __init__(self, precision: str, most: int | None = None):
        """
        Args:
            most: updates left out in a row that end the run; None: MOST_SKIPPED of the precision.
        """
        self.in_a_row = 0
        """Updates left out since the last one that was not."""
        self._most = MOST_SKIPPED[precision] if most is None else most

    def judge(self, applied: bool, loss: float, grad_norm: float | None) -> UpdateDecision:
        """
        Args:
            applied: False when DeepSpeed left the update out because of its gradient.
            loss, grad_norm: of this update; the norm is None where it is not computed.
        """
        if applied:
            self.in_a_row = 0
            finite = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
            return UpdateDecision.KEEP if finite else UpdateDecision.STOP
        self.in_a_row += 1
        return UpdateDecision.SKIP if self.in_a_row < self._most else UpdateDecision.STOP


def divergence_told(
    kind: str, train: TrainConfig, step: int, samples: tuple[int, int], row: Mapping[str, float]
) -> str:
    """What a user reads when a run stops.

    Args:
        samples: first and last of all updates in a row that were bad.
        row: loss and gradient norm of the last of them.
    """
    return (
        f"{kind}: loss {row['loss']}, gradient norm {row.get('grad_norm')} in step {step}, samples {samples[0]} to "
        f"{samples[1]}. The last checkpoint is from before them. Lower train.learning_rate "
        f"({train.learning_rate:g}) or set train.clip_grad_norm ({train.clip_grad_norm:g}), and start again."
    )
