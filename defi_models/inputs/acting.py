"""Settings of acting: the steps of sampling, and what becomes of the actions before they leave."""

# B batch, H actions of a chunk, A action dims

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from defi_models.errors import ConfigurationError
from defi_models.inputs.normalization import FieldStatistics

CLIPS: Final = ("none", "statistics", "limits")
GRIPPERS: Final = ("none", "binary")


@dataclass(frozen=True, kw_only=True)
class Acting:
    """Settings of acting that change actions but no weight; a policy with others is another policy.

    Raises:
        ConfigurationError: For a value that cannot be, naming it.
    """

    steps: int = 10
    """Denoising steps."""
    sigma_min: float = 0.001
    """Noise level of the last step; training has its own."""
    clip: str = "none"
    """none | statistics: to the range of the training data | limits: to `limits_low` and `limits_high`."""
    limits_low: tuple[float, ...] = ()
    """One per entry of an action, raw units."""
    limits_high: tuple[float, ...] = ()
    """One per entry of an action, raw units."""
    gripper: str = "none"
    """none | binary: entries above `gripper_threshold` become `gripper_above`, the others `gripper_below`."""
    gripper_entries: tuple[int, ...] = (-1,)
    """Positions within an action; -1 is the last one."""
    gripper_threshold: float = 0.0
    """Raw units."""
    gripper_below: float = -1.0
    """Raw units."""
    gripper_above: float = 1.0
    """Raw units."""

    def __post_init__(self) -> None:
        for name, choices in (("clip", CLIPS), ("gripper", GRIPPERS)):
            value = getattr(self, name)
            if value not in choices:
                raise ConfigurationError(f"acting.{name} is '{value}'; choose {', '.join(choices)}.")
        if self.steps < 1:
            raise ConfigurationError(f"acting.steps is {self.steps}; at least 1 is needed.")
        if not 0 < self.sigma_min < float("inf"):
            raise ConfigurationError(
                f"acting.sigma_min is {self.sigma_min}; a noise level above 0 is expected."
            )
        given = bool(self.limits_low or self.limits_high)
        if given != (self.clip == "limits"):
            fix = (
                "give both, one number per entry of an action"
                if self.clip == "limits"
                else "set acting.clip=limits"
            )
            raise ConfigurationError(
                f"acting.clip is {self.clip}, limits_low and limits_high are for limits: {fix}."
            )
        if len(self.limits_low) != len(self.limits_high) or not all(
            low < high for low, high in zip(self.limits_low, self.limits_high, strict=True)
        ):
            raise ConfigurationError(
                f"acting.limits_low {list(self.limits_low)} and limits_high {list(self.limits_high)} must have one number "
                "per entry of an action each, the low one below the high one."
            )

    def check(self, action_dim: int, sigma_max: float, statistics: FieldStatistics | None) -> None:
        """Checks the settings against a policy.

        Args:
            action_dim: entries of an action.
            sigma_max: noise level of the first step.
            statistics: of the actions; None where the policy has none.

        Raises:
            ConfigurationError: Naming the setting that does not fit.
        """
        if self.sigma_min >= sigma_max:
            raise ConfigurationError(
                f"acting.sigma_min is {self.sigma_min:g}; the policy samples from {sigma_max:g} down to it, so it must be "
                "less."
            )
        if self.clip == "statistics" and statistics is None:
            raise ConfigurationError(
                "acting.clip=statistics, but the policy has no statistics of its actions. Use clip=limits, or train it "
                "with a normalization."
            )
        if self.clip == "limits" and len(self.limits_low) != action_dim:
            raise ConfigurationError(
                f"acting.limits_low and limits_high have {len(self.limits_low)} entries, an action has {action_dim}."
            )
        for entry in self.gripper_entries if self.gripper == "binary" else ():
            if not -action_dim <= entry < action_dim:
                raise ConfigurationError(
                    f"acting.gripper_entries has {entry}, an action has entries 0 to {action_dim - 1} (-1: the last)."
                )

    def applied(self, actions: Tensor, statistics: FieldStatistics | None) -> Tensor:
        """Actions as they leave: clipped, then with the gripper's entries made binary.

        Args:
            actions: float32 (B, H, A), raw units. What is not finite stays, so that whoever sends them sees it.
            statistics: of the actions, for clip=statistics.

        Returns:
            float32 (B, H, A).
        """
        if self.clip != "none":
            ends: tuple[Sequence[float], Sequence[float]] = (self.limits_low, self.limits_high)
            if self.clip == "statistics":
                assert statistics is not None  # by `check`
                ends = statistics.min, statistics.max
            low, high = (
                torch.as_tensor(list(end), dtype=actions.dtype, device=actions.device) for end in ends
            )
            actions = torch.where(actions.isfinite(), actions.clamp(low, high), actions)
        if self.gripper == "binary":
            actions = actions.clone()
            chosen = actions[..., list(self.gripper_entries)]
            binary = torch.where(chosen > self.gripper_threshold, self.gripper_above, self.gripper_below)
            actions[..., list(self.gripper_entries)] = torch.where(
                chosen.isfinite(), binary.to(actions.dtype), chosen
            )
        return actions

    def text(self) -> str:
        """One line about them."""
        clip = {
            "none": "not clipped",
            "statistics": "clipped to the range in training",
            "limits": "clipped to limits",
        }
        gripper = (
            "" if self.gripper == "none" else f", gripper {self.gripper_below:g} or {self.gripper_above:g}"
        )
        return f"{self.steps} denoising steps down to {self.sigma_min:g}, actions {clip[self.clip]}{gripper}"
