"""The decision after an attempt has ended: complete, again after a pause, or not again. Nothing is carried out here."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from defi_platform.errors import MEND, TRY_AGAIN

_NO_MODULE = "ModuleNotFoundError"
"""In the last words of a job. Once it may come from code that was being unpacked, twice from the image."""

INTERRUPTED = 130
"""Exit code of what the user has stopped."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The job that is submitted at each attempt of a run."""

    run: str
    """Name of the run, the same at each attempt and after a restart of the supervisor."""
    entrypoint: str
    runtime_env: Mapping[str, Any] = field(default_factory=dict)


class Outcome(Enum):
    """The way in which an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "was stopped"
    LOST = "is unknown to the cluster"
    """The head that knew the job is gone, and with it the job's driver."""


@dataclass(frozen=True)
class Ended:
    """An attempt that is over."""

    outcome: Outcome
    exit_code: int | None = None
    """Of the job's driver; None when it did not come to an end of its own."""
    message: str = ""

    def text(self) -> str:
        """The end of the attempt in one line."""
        code = f" with exit code {self.exit_code}" if self.exit_code else ""
        said = f": {self.message}" if self.message else ""
        return f"{self.outcome.value}{code}{said}"


@dataclass(frozen=True)
class Complete:
    """The run is complete."""


@dataclass(frozen=True)
class Again:
    """The job is to be submitted again."""

    pause_s: float
    reason: str


@dataclass(frozen=True)
class GiveUp:
    """The job is not to be submitted again."""

    exit_code: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of the attempts."""

    failures: int = 8
    """Failed attempts without progress, within `hours`, after which there is no other."""
    hours: float = 24.0
    first_pause_s: float = 5.0
    max_pause_s: float = 300.0


class AttemptPolicy:
    """Decides after each attempt.

    A failure that only the user can mend ends the run at once. Others are counted until one is followed by progress:
    a run that advances between two failures goes on for ever, one that does not stops after `Budget.failures`.

    Args:
        budget: the limits.
    """

    def __init__(self, budget: Budget):
        self._budget = budget
        self._failures: deque[float] = deque()

    def decide(self, ended: Ended, *, progressed: bool, now_s: float) -> Complete | Again | GiveUp:
        """Decides about what follows an attempt.

        Args:
            ended: the attempt.
            progressed: it has left more than the attempts before it.
            now_s: seconds since some moment.
        """
        if ended.outcome is Outcome.SUCCEEDED:
            return Complete()
        if ended.outcome is Outcome.STOPPED:
            return GiveUp(INTERRUPTED, "it was stopped; the same command goes on from there")
        if ended.exit_code == MEND:
            return GiveUp(MEND, "another try would end in the same way; mend what the message names")
        if _NO_MODULE in ended.message and self._failures and not progressed:
            return GiveUp(
                MEND,
                "the Python of the cluster's image lacks a package; build the image, start Ray with the right `python` "
                "first in its PATH, or send the platform along with --working-dir .",
            )
        if progressed:
            self._failures.clear()
        self._failures.append(now_s)
        while now_s - self._failures[0] > self._budget.hours * 3600:
            self._failures.popleft()
        count = len(self._failures)
        if count > self._budget.failures:
            return GiveUp(
                TRY_AGAIN,
                f"{count} failures within {self._budget.hours:g} h without progress between them "
                f"(--failures {self._budget.failures})",
            )
        pause = min(self._budget.max_pause_s, self._budget.first_pause_s * 2.0 ** (count - 1))
        since = "after progress" if progressed else f"{count} of {self._budget.failures} without progress"
        return Again(pause, since)
