"""Safety limits: the last thing between an answer and the robot.

All are per action dimension, A numbers each, in the units of the actions; infinity where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from defi_client.errors import FitError, UnsafeActionError

CLIP, REFUSE = "clip", "refuse"


@dataclass(frozen=True)
class Limits:
    """Limits of a robot's actions. NaN, infinity and another width are always refused.

    For absolute actions (targets) the step from the last target, or from where the robot is, is limited by
    `speed` and the target by the box. For relative ones (displacements per step) the displacement is limited by
    `speed`, and the place that it leads to by the box.
    """

    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """Range of the actions."""
    speed: Sequence[float] | None = None
    """Largest change per second."""
    box_low: Sequence[float] | None = None
    box_high: Sequence[float] | None = None
    """Workspace. A robot that is outside may move towards it, not farther away."""
    relative: bool = False
    """Actions are displacements per step, not targets."""
    position: Sequence[int | None] | None = None
    """For each action dimension the entry of the state that holds where the robot is, None where there is none.
    Relative boxes and absolute speeds need it."""
    scale: float = 1.0
    """Units of the state per unit of a relative action, e.g. 0.05 where 1.0 moves the hand by 5 cm."""
    outside: str = CLIP
    """What happens to an action outside: "clip" it, or "refuse" it and the rest of its chunk."""

    def __post_init__(self) -> None:
        if self.outside not in (CLIP, REFUSE):
            raise ValueError(f"outside is '{self.outside}'; it is '{CLIP}' or '{REFUSE}'.")
        box = self.box_low is not None or self.box_high is not None
        if self.position is None and (
            (box and self.relative) or (self.speed is not None and not self.relative)
        ):
            kind = "a workspace box of relative actions" if self.relative else "a speed of absolute actions"
            raise ValueError(f"{kind} needs `position`: the state's entry for each action dimension.")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"scale is {self.scale}; it is a number other than 0.")
        for name in ("low", "high", "speed", "box_low", "box_high"):
            values = getattr(self, name)
            # A comparison with NaN is never true, so it would limit nothing.
            if values is not None and not all(-math.inf <= value <= math.inf for value in values):
                raise ValueError(f"{name} is {list(values)}; write inf or -inf where there is no limit.")
        if any(entry is not None and entry < 0 for entry in self.position or ()):
            raise ValueError(f"position is {list(self.position or ())}; entries of the state count from 0.")
        given = {
            name: len(values)
            for name in ("low", "high", "speed", "box_low", "box_high", "position")
            for values in [getattr(self, name)]
            if values is not None
        }
        if len(set(given.values())) > 1:
            raise ValueError(f"limits are of different widths: {given}.")
        for lower, upper in ((self.low, self.high), (self.box_low, self.box_high)):
            if lower is not None and upper is not None and not np.all(np.asarray(lower) <= np.asarray(upper)):
                raise ValueError(f"limits {list(lower)} to {list(upper)} hold nothing.")
        if self.speed is not None and not np.all(np.asarray(self.speed) >= 0):
            raise ValueError(f"speed is {list(self.speed)}; it is 0 or more.")

    def applied(
        self,
        action: np.ndarray[Any, Any],
        state: np.ndarray[Any, Any],
        last: np.ndarray[Any, Any] | None,
        period_s: float,
    ) -> tuple[np.ndarray[Any, Any], tuple[str, ...]]:
        """An action as the robot may carry it out.

        Args:
            action: (A,).
            state: (S,) of the robot, now.
            last: (A,) that was executed before, as `after_hold` leaves it where the robot has held since; None before
                the first.
            period_s: seconds of a control step.

        Returns:
            The action, and which limits changed it: "range", "box", "speed".

        Raises:
            UnsafeActionError: not finite, or of another width; with `outside="refuse"` also an action outside.
        """
        wanted = np.asarray(action, np.float64)
        width = next(
            (len(v) for v in (self.low, self.high, self.speed, self.box_low, self.box_high) if v is not None),
            None,
        )
        if wanted.ndim != 1 or (width is not None and len(wanted) != width):
            raise UnsafeActionError(f"an action is {wanted.shape}, the limits are for {width} numbers.")
        if not np.isfinite(wanted).all():
            raise UnsafeActionError(f"an action is not finite: {wanted.tolist()}.")
        if self.position is not None and not np.isfinite(state).all():
            raise UnsafeActionError(f"the robot's state is not finite: {np.asarray(state).tolist()}.")
        safe, changed = wanted, []
        for name, limit in (("range", self._in_range), ("box", self._in_box), ("speed", self._at_speed)):
            limited = limit(safe, state, last, period_s)
            if not np.allclose(limited, safe, rtol=0, atol=1e-9):
                if self.outside == REFUSE:
                    dim = int(np.argmax(np.abs(limited - safe)))
                    raise UnsafeActionError(
                        f"action dimension {dim} is {safe[dim]:.6g}; the limit ({name}) is {limited[dim]:.6g}."
                    )
                changed.append(name)
            safe = limited
        if not np.isfinite(safe).all():
            raise UnsafeActionError(f"an action is not finite after its limits: {safe.tolist()}.")
        return safe, tuple(changed)

    def check_fits(self, action_dim: int, state_dim: int) -> None:
        """Checks the limits against a robot.

        Raises:
            FitError: they are for actions of another width, or `position` names an entry that its state lacks.
        """
        for name in ("low", "high", "speed", "box_low", "box_high", "position"):
            values = getattr(self, name)
            if values is not None and len(values) != action_dim:
                raise FitError(
                    f"the limits' {name} is for {len(values)} action dims, the robot takes {action_dim}."
                )
        outside = [entry for entry in self.position or () if entry is not None and entry >= state_dim]
        if outside:
            raise FitError(
                f"the limits' position names entry {outside[0]} of the state, which has {state_dim} (0 to {state_dim - 1})."
            )

    def after_hold(self, last: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Start of `speed` once the robot has held: NaN, the place in its state, where that is known.

        A dimension without a place in the state, often the gripper, stays where the last action left it.

        Args:
            last: (A,) that was executed.
        """
        entries = self.position or [None] * len(last)
        return np.where([entry is None for entry in entries], last, np.nan)

    def _in_range(self, action: Any, state: Any, last: Any, period_s: float) -> np.ndarray[Any, Any]:
        return _clipped(action, self.low, self.high)

    def _in_box(self, action: Any, state: Any, last: Any, period_s: float) -> np.ndarray[Any, Any]:
        if self.box_low is None and self.box_high is None:
            return np.asarray(action)
        here = self._here(state, len(action))
        known = np.isfinite(here)
        target = np.where(known, here, 0.0) + self.scale * action if self.relative else action
        low = np.full(len(action), -np.inf) if self.box_low is None else np.asarray(self.box_low, np.float64)
        high = (
            np.full(len(action), np.inf) if self.box_high is None else np.asarray(self.box_high, np.float64)
        )
        if self.relative:
            # From outside, staying is allowed. A dimension without a position has no box.
            low = np.where(known, np.minimum(low, here), -np.inf)
            high = np.where(known, np.maximum(high, here), np.inf)
        inside = _clipped(target, low, high)
        if not self.relative:
            return inside
        return np.where(inside == target, action, (inside - np.where(known, here, 0.0)) / self.scale)

    def _at_speed(self, action: Any, state: Any, last: Any, period_s: float) -> np.ndarray[Any, Any]:
        if self.speed is None:
            return np.asarray(action)
        most = np.asarray(self.speed, np.float64) * period_s
        if self.relative:
            return _clipped(action, -most, most)
        start = self._here(state, len(action))
        start = start if last is None else np.where(np.isfinite(last), last, start)
        start = np.where(np.isfinite(start), start, action)  # no place known: nothing to compare with
        return _clipped(action, start - most, start + most)

    def _here(self, state: Any, width: int) -> np.ndarray[Any, Any]:
        entries = [None] * width if self.position is None else self.position
        return np.asarray([np.nan if entry is None else float(state[entry]) for entry in entries])


def _clipped(values: Any, low: Any, high: Any) -> np.ndarray[Any, Any]:
    """Values between two bounds, either of which may be None."""
    values = values if low is None else np.maximum(values, np.asarray(low, np.float64))
    return np.asarray(values if high is None else np.minimum(values, np.asarray(high, np.float64)))
