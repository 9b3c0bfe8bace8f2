"""Segments of a run: from which update on it has had which settings, and the learning rate that follows.

A run has one segment; another begins where it is made longer or shorter (`train.steps`) or is taken up again from an
earlier checkpoint with other settings (`train.restart_from`). Every checkpoint holds the segments up to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from defi_platform.config import TrainConfig
from defi_platform.config.fields import RESTART, resume_rule
from defi_platform.errors import ConfigError
from defi_platform.train.engine.lr_schedule import SCHEDULES, learning_rate

STRETCH, REWARM = "stretch", "rewarm"
EXTENSIONS: Final = (STRETCH, REWARM)
RESTARTED = "restart_from"
WITHOUT_END: Final = ("constant", "as_run")
"""Schedules whose rate does not depend on the number of steps."""
SETTINGS: Final = tuple(
    field.name for field in dataclasses.fields(TrainConfig) if resume_rule(field) == RESTART
)
"""Keys of `train` that a new segment may change."""


@dataclass(frozen=True)
class Segment:
    """The settings of the updates from one on."""

    start: int
    """Its first update."""
    origin: int
    """Update that its schedule is counted from."""
    steps: int
    """Updates of the whole run."""
    begun_by: str
    """start | steps | extend=stretch | extend=rewarm | restart_from"""
    settings: dict[str, Any]
    """Value of each of SETTINGS."""

    @classmethod
    def first(cls, train: TrainConfig) -> Segment:
        """That of a run which begins."""
        return cls(0, 0, train.steps, "start", settings_of(train))

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> Segment:
        """One as a checkpoint holds it; a setting that was not there yet had its default."""
        usual = settings_of(TrainConfig(output=""))
        return cls(**{**values, "settings": {**usual, **values["settings"]}})

    def rate(self, step: int) -> float:
        """Learning rate of an update, which is not before `start`. Raises: ValueError for a schedule that is gone."""
        return learning_rate(
            self.settings["schedule"],
            self.settings["learning_rate"],
            step - self.origin,
            self.steps - self.origin,
            self.settings["warmup_steps"],
        )


def settings_of(train: TrainConfig) -> dict[str, Any]:
    """Value of each of SETTINGS, as plain values."""
    return {
        name: list(value) if isinstance(value, list | tuple) else value
        for name, value in ((name, getattr(train, name)) for name in SETTINGS)
    }


def rate_of(segments: Sequence[Segment], step: int) -> float:
    """Learning rate of an update of a run: by the last segment that has begun at it."""
    return [one for one in segments if one.start <= step][-1].rate(step)


def restarted(segments: Sequence[Segment], train: TrainConfig) -> bool:
    """Whether a run has already been taken up again as `train.restart_from` and the settings of now say."""
    settings = settings_of(train)
    return any(
        (one.begun_by, one.start, one.settings) == (RESTARTED, train.restart_from, settings)
        for one in segments
    )


def continued(segments: Sequence[Segment], train: TrainConfig, step: int) -> list[Segment]:
    """The segments of a run that goes on from a checkpoint.

    Args:
        segments: up to that checkpoint.
        train: settings of now; other ones of SETTINGS than those of the last segment only with `restart_from`.
        step: of the checkpoint.

    Raises: ConfigError for a number of steps that the run cannot go on to, naming what would happen to the rate.
    """
    last, settings = segments[-1], settings_of(train)
    if train.steps < step:
        raise ConfigError(
            f"{train.output} has reached step {step}, train.steps is {train.steps}. Set train.steps={step} or more, or "
            "train.restart_from to an earlier checkpoint."
        )
    restart = train.restart_from is not None and not restarted(segments, train)
    origin, begun_by = last.origin, RESTARTED if restart else "steps"
    if train.steps != last.steps and settings["schedule"] == last.settings["schedule"]:
        origin, begun_by = _extended(last, train, step, begun_by)
    elif not restart and train.steps == last.steps:
        return list(segments)
    return [*segments, Segment(step, origin, train.steps, begun_by, settings)]


def _extended(last: Segment, train: TrainConfig, step: int, begun_by: str) -> tuple[int, str]:
    """Origin of the schedule with another number of steps, and by what its segment is begun."""
    if train.schedule in WITHOUT_END:
        return last.origin, begun_by
    if train.extend is None:
        now = last.rate(step) if last.settings["schedule"] in SCHEDULES else float("nan")
        stretched = Segment(step, last.origin, train.steps, STRETCH, settings_of(train))
        then = stretched.rate(step)
        same = math.isclose(now, then)  # in the warm-up, which does not depend on the end
        changes = "would take another way to its end" if same else f"would jump from {now:.3g} to {then:.3g}"
        raise ConfigError(
            f"{train.output} is at step {step} of {last.steps} with train.schedule={train.schedule}, train.steps is now "
            f"{train.steps}: its learning rate {changes}. Set train.steps={last.steps}, or say what is meant: "
            f"train.extend={STRETCH} (that: the schedule of a run of {train.steps} steps from the beginning) or train.extend={REWARM} (the schedule begins anew at step {step}, with "
            f"{train.warmup_steps} steps of warm-up to {train.learning_rate:g})."
        )
    begun_by = begun_by if begun_by == RESTARTED else f"extend={train.extend}"
    return (step if train.extend == REWARM else last.origin), begun_by
