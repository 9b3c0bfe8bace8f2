"""Failures of a run's attempts, kept in its folder, and whether the newest is the one that comes every time."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from defi_platform import logs, storage
from defi_platform.errors import UserError, one_line
from defi_platform.storage import StorageError
from defi_platform.storage.outage import is_outage
from defi_platform.train.ray_errors import format_error, is_collateral, root_cause

FILE = "failures.json"
IN_A_ROW = 3
"""Failures of one kind at one step after which a run ends, whatever `max_failures` says."""
KEPT = 200
"""Newest failures in the file."""
CHECKPOINT = re.compile(r"step_(\d+)_.*")
"""Names of checkpoints, whole or not; the first group is the step."""
DIED = "worker died"
NOT_ITS_OWN = ("node has died", "node was preempted", "node was terminated")
"""In Ray's words about a worker that died because of its node."""


class RepeatedFailure(UserError):
    """A run that fails in the same way at the same step each time."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The end of one attempt."""

    kind: str
    """Type of the error; DIED for a process that ended without one."""
    step: int | None
    """Last update before it; None where it came before the first, or nobody knows."""
    checkpoint: int | None
    """Step of the newest checkpoint then, whole or not."""
    rank: int
    message: str
    counts: bool
    """Another try may well end in the same way: no node was lost and no store was away."""
    settings: str
    """Digest of the run's configuration."""
    time: float = field(default_factory=time.time)

    def is_like(self, other: Failure) -> bool:
        """True when both come from one cause, as far as can be seen."""
        same = self.counts and other.counts and (self.kind, self.settings) == (other.kind, other.settings)
        if self.step is None or other.step is None:
            return same and self.checkpoint == other.checkpoint
        return same and self.step == other.step

    def where(self) -> str:
        """The place in the run, in words."""
        if self.step is not None:
            return f"after step {self.step}"
        return (
            f"after the checkpoint of step {self.checkpoint}"
            if self.checkpoint
            else "before a first checkpoint"
        )


@dataclass(frozen=True)
class FailureLog:
    """The file of one run."""

    run: str
    """Run folder."""
    name: str
    """Of the run, for messages."""
    settings: str
    """Digest of the run's configuration: a change of it may be the cure, and the count begins anew."""

    def add(self, worker_errors: Mapping[int, BaseException], *, preempted: bool = False) -> str | None:
        """Records the end of an attempt.

        Args:
            worker_errors: rank -> error.
            preempted: the attempt ended with an announced node.

        Returns: None, or the reason why there is no use in another attempt.
        """
        try:
            failures = self._read()
            failures.append(self._failure(worker_errors, preempted))
            content = json.dumps([asdict(failure) for failure in failures[-KEPT:]], indent=1)
            storage.write_text(storage.join(self.run, FILE), content)
        except (OSError, StorageError) as error:
            logs.say(
                f"{self.name}: a failure could not be recorded in {self.run}: {one_line(error)}", run=self.run
            )
            return None
        return self._reason(failures)

    def newest(self) -> Failure | None:
        """The last recorded failure; None where there is none, or the store is away."""
        try:
            return next(reversed(self._read()), None)
        except (OSError, StorageError):
            return None

    def reason(self, before: Failure | None) -> str | None:
        """The reason why there is no use in another attempt after the last recorded one; None when there is.

        Args:
            before: what `newest` was when the job began: an older job's reason is none of this one.
        """
        try:
            failures = self._read()
        except (OSError, StorageError):
            return None
        return self._reason(failures) if failures and failures[-1] != before else None

    def _reason(self, failures: list[Failure]) -> str | None:
        last = failures[-IN_A_ROW:]
        if len(last) < IN_A_ROW or not all(failure.is_like(last[-1]) for failure in last):
            return None
        newest = last[-1]
        advice = "Mend the cause"
        if "OutOfMemory" in newest.kind or newest.kind == DIED:
            advice = (
                "If memory is short, set train.micro_batch lower or train.recompute=true; else mend the cause"
            )
        return (
            f"{self.name}: {IN_A_ROW} attempts in a row failed in the same way {newest.where()}: {newest.message.rstrip('.')}. Another "
            f"would too. {advice}; the same command then goes on from the last checkpoint. All failures are in "
            f"{storage.join(self.run, FILE)}."
        )

    def _read(self) -> list[Failure]:
        try:
            return [Failure(**entry) for entry in json.loads(storage.read_text(storage.join(self.run, FILE)))]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:
            logs.say(
                f"{storage.join(self.run, FILE)} is damaged and begun anew: {one_line(error)}", run=self.run
            )
            return []

    def _failure(self, worker_errors: Mapping[int, BaseException], preempted: bool) -> Failure:
        rank, error = root_cause(worker_errors) if worker_errors else (0, None)
        died = error is None or isinstance(error, RayActorError) or is_collateral(error)
        step = step_of(error)
        if died:
            # The others were in the same step: they wait for each other in each one.
            known = [found for one in worker_errors.values() if (found := step_of(one)) is not None]
            step = max(known, default=None)
        return Failure(
            kind=DIED if died else type(error).__name__,
            step=step,
            checkpoint=self._checkpoint(),
            rank=rank,
            message=format_error(error) if error else "its node was taken away",
            counts=not preempted and error is not None and _may_come_again(error, step),
            settings=self.settings,
        )

    def _checkpoint(self) -> int | None:
        found = [CHECKPOINT.fullmatch(name) for name in storage.names(storage.join(self.run, "checkpoints"))]
        return max((int(match[1]) for match in found if match), default=None)


def _may_come_again(error: BaseException, step: int | None) -> bool:
    """True unless a node, a store or a network is to blame, as far as the error says."""
    if isinstance(error, RayActorError):
        lost = any(words in str(error) for words in NOT_ITS_OWN)
        return not (lost or error.preempted or isinstance(error, ActorUnavailableError))
    if isinstance(error, RayError) and not isinstance(error, RayTaskError | OutOfMemoryError):
        return False
    if is_collateral(error):
        # A node that is lost looks the same, but hardly three times in one step.
        return step is not None
    return not (isinstance(error, Exception) and is_outage(error))


def mark_step(error: BaseException, step: int) -> None:
    """Notes on an error that is about to be raised the last update before it."""
    error.training_step = step  # type: ignore[attr-defined]


def step_of(error: BaseException | None) -> int | None:
    """The last update before an error; None where nobody noted it."""
    step = getattr(error, "training_step", None)
    return step if isinstance(step, int) else None
