"""The last check before actions leave for a robot: numbers, and of a size that the policy was trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_models.inputs.action_contract import UNKNOWN
from defi_platform.serve.observation import PolicySpec
from defi_platform.serve.refusals import PolicyFailure


class ActionCheck:
    """Refuses chunks that no robot should carry out."""

    def __init__(self, spec: PolicySpec, margin: float | None) -> None:
        """Reads the ranges of the actions.

        Args:
            spec: `action` holds the range in the training data as min and max, or "unknown".
            margin: how far an action may lie outside that range, in its widths; None: anywhere.
        """
        self._shape = (spec.chunk, spec.action_dim)
        self._low = self._high = None
        low, high = spec.action.get("min", UNKNOWN), spec.action.get("max", UNKNOWN)
        self._names = spec.action.get("names", UNKNOWN)
        self._range = (low, high)
        if margin is None or UNKNOWN in (low, high):
            return
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if spec.action_scale is None:
            width = np.where(high > low, high - low, 2.0)
        else:
            # The normalizer leaves the scale of an action alone that was constant in training, or as good as: the head,
            # whose values are about -1 to 1, gives it in raw units.
            width = np.maximum(high - low, 2.0 * np.asarray(spec.action_scale, np.float64))
        self._low, self._high = low - margin * width, high + margin * width

    def __call__(self, actions: NDArray[Any]) -> None:
        """Checks one chunk (chunk, A).

        Raises:
            PolicyFailure: it holds NaN, infinity or a number far outside the range, or has another shape.
        """
        if actions.shape != self._shape:
            raise PolicyFailure(
                f"the policy gave actions of shape {actions.shape}; expected {self._shape}. None was sent."
            )
        if not np.isfinite(actions).all():
            step, entry = np.argwhere(~np.isfinite(actions))[0]
            raise PolicyFailure(
                f"the policy gave {actions[step, entry]} for {self._name(entry)} at step {step} of the chunk. "
                "No action was sent."
            )
        if self._low is None or self._high is None:
            return
        outside = (actions < self._low) | (actions > self._high)
        if outside.any():
            step, entry = np.argwhere(outside)[0]
            low, high = (float(ends[entry]) for ends in self._range)
            raise PolicyFailure(
                f"the policy gave {actions[step, entry]:.4g} for {self._name(entry)} at step {step} of the chunk, "
                f"far outside its range in the training data ({low:.4g} to {high:.4g}; limits.action_margin). "
                "No action was sent."
            )

    def _name(self, entry: int) -> str:
        return f"action {entry}" if self._names == UNKNOWN else f"'{self._names[entry]}'"
