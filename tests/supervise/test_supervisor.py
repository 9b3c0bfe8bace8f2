"""A supervisor follows attempts, waits for heads, and submits again, without a cluster and without wall time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from defi_platform.errors import MEND, TRY_AGAIN
from defi_platform.supervise.attempts import INTERRUPTED, AttemptPolicy, Budget, Ended, Outcome, Submission
from defi_platform.supervise.ray_jobs import HeadUnreachable, Job
from defi_platform.supervise.supervisor import ClusterGone, Patience, Supervisor

KILLED = Ended(Outcome.FAILED, -9, "killed")
DONE = Ended(Outcome.SUCCEEDED, 0)
LOST = Ended(Outcome.LOST)


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Cluster:
    """A job API whose attempts take so many seconds and then end so; `down` holds the times without a head."""

    address = "http://head:8265"

    def __init__(self, clock: Clock, ends: list[tuple[float, Ended]], down: list[tuple[float, float]] = []):  # noqa: B006
        self.clock, self.ends, self.down = clock, ends, down
        self.jobs: dict[str, tuple[float, float, Ended]] = {}
        self.submitted: list[str] = []

    def _check(self) -> None:
        if any(start <= self.clock.now < end for start, end in self.down):
            raise HeadUnreachable("connection refused")

    def find(self, run: str) -> list[Job]:
        self._check()
        return [self.state(name) for name in self.jobs if name.startswith(run)]

    def submit(self, submission_id: str, submission: Submission) -> None:
        self._check()
        self.submitted.append(submission_id)
        if submission_id not in self.jobs:
            lasts, ended = self.ends.pop(0)
            self.jobs[submission_id] = (self.clock.now, self.clock.now + lasts, ended)

    def state(self, submission_id: str) -> Job:
        self._check()
        start, end, ended = self.jobs[submission_id]
        over = self.clock.now >= end
        return Job(submission_id, ended if over else None, not over, start)

    def show_logs(self, submission_id: str) -> None: ...

    def finish_logs(self) -> None: ...


class Advancing:
    """Work of which each answer is the next of `answers`, the last one for ever."""

    def __init__(self, *answers: bool):
        # The first call counts what is there before.
        self.answers = [True, *answers]

    def advanced(self) -> bool:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def supervisor(
    cluster: Cluster, work: Advancing, *, is_service: bool = False, failures: int = 3
) -> Supervisor:
    return Supervisor(
        cluster,
        Submission(run="pretrain-1", entrypoint="python jobs/pretrain.py"),
        work,
        AttemptPolicy(Budget(failures=failures, hours=1)),
        patience=Patience(first_s=60, outage_s=3600),
        is_service=is_service,
        clock=cluster.clock,
    )


@pytest.fixture
def make() -> Iterator[Callable[..., Cluster]]:
    yield lambda ends, down=[]: Cluster(Clock(), ends, down)


def test_a_run_whose_driver_and_then_head_die_is_submitted_again_until_it_is_complete(
    make: Callable[..., Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = make([(30, KILLED), (30, LOST), (30, DONE)], down=[(60, 200)])
    assert supervisor(cluster, Advancing(False)).run() == 0
    assert cluster.submitted == ["pretrain-1-1", "pretrain-1-2", "pretrain-1-3"]
    said = capsys.readouterr().out
    assert "no head answers" in said and "the head answers again" in said
    assert "complete after 3 attempt(s)" in said


def test_an_image_without_a_package_is_tried_once_more(make: Callable[..., Cluster]) -> None:
    absent = Ended(Outcome.FAILED, 1, "ModuleNotFoundError: No module named 'defi_platform'")
    cluster = make([(1, absent), (1, absent)])
    assert supervisor(cluster, Advancing(False)).run() == MEND
    assert len(cluster.submitted) == 2


def test_an_error_that_the_user_has_to_mend_ends_it_at_once(make: Callable[..., Cluster]) -> None:
    cluster = make([(1, Ended(Outcome.FAILED, MEND, "ConfigError: no such key"))])
    assert supervisor(cluster, Advancing(True)).run() == MEND
    assert len(cluster.submitted) == 1


def test_a_job_that_somebody_stops_stays_stopped(make: Callable[..., Cluster]) -> None:
    cluster = make([(1, Ended(Outcome.STOPPED))])
    assert supervisor(cluster, Advancing(True)).run() == INTERRUPTED


def test_failures_without_progress_use_up_the_budget(make: Callable[..., Cluster]) -> None:
    cluster = make([(1, KILLED)] * 9)
    assert supervisor(cluster, Advancing(False), failures=3).run() == TRY_AGAIN
    assert len(cluster.submitted) == 4


def test_progress_between_failures_restores_the_budget(make: Callable[..., Cluster]) -> None:
    cluster = make([(1, KILLED)] * 9 + [(1, DONE)])
    assert supervisor(cluster, Advancing(True), failures=3).run() == 0
    assert len(cluster.submitted) == 10


def test_failures_that_lie_far_apart_do_not_use_up_the_budget(make: Callable[..., Cluster]) -> None:
    cluster = make([(1800, KILLED)] * 9 + [(1, DONE)])
    assert supervisor(cluster, Advancing(False), failures=3).run() == 0


def test_a_service_that_served_for_a_while_has_made_progress(make: Callable[..., Cluster]) -> None:
    cluster = make([(700, KILLED)] * 9 + [(1, Ended(Outcome.STOPPED))])
    assert supervisor(cluster, Advancing(False), is_service=True, failures=3).run() == INTERRUPTED


def test_pauses_grow_with_failures_up_to_the_longest() -> None:
    policy = AttemptPolicy(Budget(failures=100, first_pause_s=5, max_pause_s=60))
    decisions = [policy.decide(KILLED, progressed=False, now_s=n) for n in range(6)]
    assert [decision.pause_s for decision in decisions] == [5, 10, 20, 40, 60, 60]  # type: ignore[union-attr]


def test_a_second_supervisor_follows_the_attempt_that_is_under_way(make: Callable[..., Cluster]) -> None:
    cluster = make([(30, DONE)])
    cluster.submit("pretrain-1-4", Submission(run="pretrain-1", entrypoint=""))
    assert supervisor(cluster, Advancing(False)).run() == 0
    assert cluster.submitted == ["pretrain-1-4"]


def test_attempts_are_numbered_on_from_those_that_the_cluster_knows(make: Callable[..., Cluster]) -> None:
    cluster = make([(0, KILLED), (1, DONE)])
    cluster.submit("pretrain-1-4", Submission(run="pretrain-1", entrypoint=""))
    assert supervisor(cluster, Advancing(False)).run() == 0
    assert cluster.submitted == ["pretrain-1-4", "pretrain-1-5"]


def test_an_address_at_which_nobody_answers_is_an_error_that_names_it(make: Callable[..., Cluster]) -> None:
    cluster = make([], down=[(0, 1e9)])
    with pytest.raises(ClusterGone, match=r"head:8265 for 60 s.*--address"):
        supervisor(cluster, Advancing(False)).run()
    assert cluster.clock.now < 90


def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(
    make: Callable[..., Cluster], capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = make([(30, DONE)])

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    cluster.clock.sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        supervisor(cluster, Advancing(False)).run()
    assert "ray job stop pretrain-1-1" in capsys.readouterr().out
