"""Policy for updates whose loss or gradient is not finite: keep, skip or stop. It decides and carries out nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import Enum

from defi_platform.config import TrainConfig
from defi_platform.errors import UserError

MAX_SKIPPED = {"fp32": 3, "bf16": 3, "fp16": 50}
"""Consecutive skipped updates after which a run stops, by precision. fp16 skips some as a matter of course, each time
with half the loss scale of the time before."""


class Diverged(UserError):
    """A run whose loss or gradient is not finite and will not become so again."""


class UpdateDecision(Enum):
    """The decision about an update."""

    KEEP = "keep"
    SKIP = "skip"
    """DeepSpeed has left it out; the weights are unchanged."""
    STOP = "stop"


class DivergencePolicy:
    """Decides about one update after the other.

    Args:
        precision: "fp32", "bf16" or "fp16".
        max_skipped: consecutive skipped updates that end the run; None: MAX_SKIPPED of the precision.
    """

    def __init__(self, precision: str, max_skipped: int | None = None):
        self.consecutive_skips = 0
        """Updates skipped since the last one that was applied."""
        self._skips_at_lowest_scale = 0
        self._max_skipped = MAX_SKIPPED[precision] if max_skipped is None else max_skipped
        self._max_at_lowest_scale = MAX_SKIPPED["fp32"] if max_skipped is None else max_skipped

    def decide(
        self, applied: bool, loss: float, grad_norm: float | None, *, lowest_scale: bool = False
    ) -> UpdateDecision:
        """Decides about one update.

        Args:
            applied: False when DeepSpeed left the update out because of its gradient.
            loss: mean loss of the update.
            grad_norm: norm of its gradient; None where it is not computed.
            lowest_scale: the loss scale of fp16 can become no lower, so that another skipped update is as bad as under
                the other precisions.
        """
        if applied:
            self.consecutive_skips = self._skips_at_lowest_scale = 0
            finite = math.isfinite(loss) and (grad_norm is None or math.isfinite(grad_norm))
            return UpdateDecision.KEEP if finite else UpdateDecision.STOP
        self.consecutive_skips += 1
        self._skips_at_lowest_scale += lowest_scale
        too_many = (
            self.consecutive_skips >= self._max_skipped
            or self._skips_at_lowest_scale >= self._max_at_lowest_scale
        )
        return UpdateDecision.STOP if too_many else UpdateDecision.SKIP


def divergence_message(
    kind: str,
    train: TrainConfig,
    step: int,
    samples: tuple[int, int],
    row: Mapping[str, float],
    checkpoint: int | None,
) -> str:
    """Message of a run that stops because it has diverged.

    Args:
        kind: of the recipe.
        train: its settings.
        step: of the last bad update.
        samples: first and last sample of all consecutive bad updates.
        row: loss and gradient norm of the last of them.
        checkpoint: step of the newest checkpoint, which is from before them; None where there is none.
    """
    found = (
        f"{kind}: loss {row['loss']}, gradient norm {row.get('grad_norm')} in step {step}, samples {samples[0]} to "
        f"{samples[1]}. "
    )
    settings = f"train.learning_rate ({train.learning_rate:g}) lower, or train.clip_grad_norm ({train.clip_grad_norm:g})"
    if checkpoint is None:
        return f"{found}There is no checkpoint from before them. Set {settings}, and start again."
    return (
        f"{found}The last checkpoint, of step {checkpoint}, is from before them. Set {settings}, and go on from there with "
        f"train.restart_from={checkpoint}; from an earlier one where its loss was rising already."
    )
