"""The loop of a supervisor: it submits, follows, waits for a head that is away, and carries out what the policy decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from defi_platform.errors import UserError
from defi_platform.retry import Clock, RetryPolicy, retry
from defi_platform.supervise.attempts import Again, AttemptPolicy, Complete, Ended, Outcome, Submission
from defi_platform.supervise.ray_jobs import HeadUnreachable, Job

POLL_S = 1.0
"""Between two requests for the state of the attempt."""
SERVED_S = 600.0
"""A service that ran for so long has made progress."""

Answer = TypeVar("Answer")


class ClusterGone(UserError):
    """A cluster that did not answer for longer than the supervisor waits."""


class Jobs(Protocol):
    """The job API of a cluster; see `RayJobs`."""

    address: str

    def find(self, run: str) -> list[Job]:
        """The attempts of a run, oldest first."""
        ...

    def submit(self, submission_id: str, submission: Submission) -> None:
        """Submits an attempt."""
        ...

    def state(self, submission_id: str) -> Job:
        """The newest state of an attempt."""
        ...

    def show_logs(self, submission_id: str) -> None:
        """Prints an attempt's log as it grows."""
        ...

    def finish_logs(self) -> None:
        """Prints the rest of an ended attempt's log."""
        ...


class Work(Protocol):
    """The work that attempts leave; see `WorkSeen`."""

    def advanced(self) -> bool:
        """True when there is more than at the last call."""
        ...


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Limits of the waiting for a head."""

    first_s: float = 300.0
    """For the first answer: an address that is wrong is never answered."""
    outage_s: float = 24 * 3600.0
    """Once a head has answered."""
    max_pause_s: float = 15.0


class Supervisor:
    """Runs one job to its end.

    Args:
        jobs: of the cluster.
        submission: the job.
        work: what its attempts leave.
        policy: decides after each attempt.
        patience: with a head that is away.
        is_service: the job has no end: to have run for a while is its progress.
        clock: measures and waits.
    """

    def __init__(
        self,
        jobs: Jobs,
        submission: Submission,
        work: Work,
        policy: AttemptPolicy,
        *,
        patience: Patience | None = None,
        is_service: bool = False,
        clock: Clock = time,
    ):
        self._jobs, self._submission, self._work, self._policy = jobs, submission, work, policy
        self._patience, self._is_service, self._clock = patience or Patience(), is_service, clock
        self._answered = False
        self._number = 0
        self._current = ""
        self._began = clock.monotonic()

    def run(self) -> int:
        """Submits the job, or follows the attempt that is under way, until the run is complete or there is no use.

        Returns: the exit code: 0 complete, 2 the user has to mend something, 75 too many failures, 130 stopped.
        Raises: ClusterGone when no head answers; UserError for a wrong token or a job that is not accepted.
        """
        try:
            return self._run()
        except KeyboardInterrupt:
            if self._current:
                self._say(
                    "the job goes on by itself. The same command follows it again; "
                    f"`ray job stop {self._current}` stops it at a checkpoint."
                )
            raise

    def _run(self) -> int:
        self._work.advanced()  # what is there before is nobody's progress
        submission_id = self._attempt_under_way() or self._submit()
        while True:
            started = self._clock.monotonic()
            ended = self._follow(submission_id)
            now = self._clock.monotonic()
            progressed = self._work.advanced() or (self._is_service and now - started >= SERVED_S)
            decision = self._policy.decide(ended, progressed=progressed, now_s=now)
            if isinstance(decision, Complete):
                self._say(f"complete after {self._number} attempt(s), {now - self._began:.0f} s")
                return 0
            self._say(f"{submission_id} {ended.text()}")
            self._current = ""
            if not isinstance(decision, Again):
                self._say(f"not submitted again: {decision.reason}")
                return decision.exit_code
            self._say(f"submitting it again in {decision.pause_s:g} s ({decision.reason})")
            self._clock.sleep(decision.pause_s)
            submission_id = self._submit()
            self._say(f"{self._clock.monotonic() - now:.0f} s after the end of the attempt before it")

    def _attempt_under_way(self) -> str | None:
        known = self._ask(lambda: self._jobs.find(self._submission.run))
        self._number = max((_number_of(job.submission_id) for job in known), default=0)
        running = [job.submission_id for job in known if job.ended is None]
        if not running:
            return None
        self._current = running[-1]
        self._say(f"following {running[-1]}, which is under way on {self._jobs.address}")
        return running[-1]

    def _submit(self) -> str:
        self._number += 1
        submission_id = f"{self._submission.run}-{self._number}"
        self._ask(lambda: self._jobs.submit(submission_id, self._submission))
        self._current = submission_id
        self._say(f"submitted {submission_id} to {self._jobs.address}: {self._submission.entrypoint}")
        return submission_id

    def _follow(self, submission_id: str) -> Ended:
        while True:
            job = self._ask(lambda: self._jobs.state(submission_id))
            if job.ended is not None and job.ended.outcome is Outcome.LOST:
                return job.ended
            self._jobs.show_logs(submission_id)
            if job.ended is not None:
                self._jobs.finish_logs()
                return job.ended
            self._clock.sleep(POLL_S)

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """Makes a request to the head; waits for one that is away."""
        began = self._clock.monotonic()
        limit_s = self._patience.outage_s if self._answered else self._patience.first_s
        away = False

        def report(error: Exception) -> None:
            nonlocal away
            if not away:
                self._say(f"no head answers at {self._jobs.address}, waiting for one: {error}")
            away = True

        policy = RetryPolicy(timeout_s=limit_s, first_pause_s=1.0, max_pause_s=self._patience.max_pause_s)
        try:
            answer = retry(
                request,
                policy,
                is_transient=lambda error: isinstance(error, HeadUnreachable),
                before_retry=report,
                clock=self._clock,
            )
        except HeadUnreachable as error:
            raise ClusterGone(
                f"no Ray head answered at {self._jobs.address} for {limit_s:.0f} s: {error}. Start the cluster, or "
                "set --address to its dashboard (http://HEAD:8265)."
            ) from error
        if away:
            self._say(f"the head answers again after {self._clock.monotonic() - began:.0f} s")
        self._answered = True
        return answer

    def _say(self, text: str) -> None:
        print(f"supervise: {text}", flush=True)


def _number_of(submission_id: str) -> int:
    number = submission_id.rpartition("-")[2]
    return int(number) if number.isdecimal() else 0
