"""Retries, on a clock that stands still unless somebody sleeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from defi_platform.retry import RetryPolicy, retry
from defi_platform.storage import StorageError
from defi_platform.storage.outage import retry_storage


@dataclass
class StoppedClock:
    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)


@dataclass
class Failing:
    """Fails so many times, then answers with the number of its tries."""

    failures: float
    error: Exception = field(default_factory=lambda: OSError(28, "No space left on device"))
    tries: int = 0

    def __call__(self) -> int:
        self.tries += 1
        if self.tries <= self.failures:
            raise self.error
        return self.tries


def always(error: Exception) -> bool:
    return True


def test_pauses_double_up_to_the_longest_one() -> None:
    clock = StoppedClock()
    assert retry(Failing(7), RetryPolicy(), is_transient=always, clock=clock) == 8
    assert clock.pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


def test_the_last_error_comes_through_when_time_or_attempts_run_out() -> None:
    clock, request = StoppedClock(), Failing(math.inf)
    with pytest.raises(OSError, match="No space") as raised:
        retry(request, RetryPolicy(timeout_s=2.0), is_transient=always, clock=clock)
    assert raised.value is request.error
    # Tries at 0, 0.2, 0.6, 1.4 and 3.0 seconds: only the last one began after the two.
    assert request.tries == 5 and clock.now == pytest.approx(3.0)
    request = Failing(math.inf)
    with pytest.raises(OSError, match="No space"):
        retry(request, RetryPolicy(max_attempts=3), is_transient=always, clock=clock)
    assert request.tries == 3


def test_an_error_that_will_not_pass_is_not_tried_again() -> None:
    clock, request = StoppedClock(), Failing(1, ValueError("no number"))
    with pytest.raises(ValueError, match="no number"):
        retry(request, RetryPolicy(), is_transient=lambda error: isinstance(error, OSError), clock=clock)
    assert request.tries == 1 and clock.pauses == []


def test_jitter_keeps_a_pause_within_half_of_it() -> None:
    policy = RetryPolicy(first_pause_s=4.0, max_pause_s=4.0, jitter=True)
    pauses = [policy.pause_s(failures, 0.0) for failures in range(1, 50)]
    assert all(pause is not None and 2.0 <= pause <= 6.0 for pause in pauses) and len(set(pauses)) > 1


def test_what_may_help_is_done_only_where_another_try_follows() -> None:
    helped: list[Exception] = []
    with pytest.raises(OSError, match="No space"):
        retry(
            Failing(math.inf), RetryPolicy(max_attempts=3), is_transient=always, before_retry=helped.append,
            clock=StoppedClock(),
        )  # fmt: skip
    assert len(helped) == 2


def storage_request(request: Failing, clock: StoppedClock) -> int:
    return retry_storage(
        request, "s3://runs/a", name="tiny", timeout_s=60.0, timeout_key="train.x", clock=clock
    )


def test_an_outage_is_announced_once_and_so_is_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert storage_request(Failing(6), StoppedClock()) == 7
    assert capsys.readouterr().out.splitlines() == [
        "tiny: s3://runs/a cannot be used, trying again: [Errno 28] No space left on device",
        "tiny: s3://runs/a can be used again",
    ]


def test_an_outage_that_lasts_names_the_setting_and_the_way_out() -> None:
    with pytest.raises(StorageError, match=r"could not be used for 60 s \(train\.x\).*No space.*Make room"):
        storage_request(Failing(math.inf), StoppedClock())
    absent = Failing(1, FileNotFoundError("nothing there"))
    with pytest.raises(FileNotFoundError, match="nothing there"):
        storage_request(absent, StoppedClock())
    assert absent.tries == 1
