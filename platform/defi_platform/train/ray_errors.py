"""What a user reads when workers die: one line per failure, from Ray Train's controller."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback


class FailureLines(UserCallback):
    """Says which worker failed, why, and that the run goes on (or Ray Train raises, and the job tells)."""

    def __init__(self, kind: str):
        self._kind = kind

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = root_cause(worker_exceptions)
        print(f"{self._kind}: worker {rank} failed: {format_error(error)}", flush=True)


def root_cause(worker_exceptions: dict[int, Exception]) -> tuple[int, BaseException]:
    """The failure that came first, as far as it can be told: one rank's death takes the others' collective
    calls with it, so errors of broken connections are named only when there is nothing else."""
    unwrapped = {rank: unwrap(error) for rank, error in sorted(worker_exceptions.items())}
    for rank, error in unwrapped.items():
        if "peer" not in str(error) and "Connection" not in str(error):
            return rank, error
    return next(iter(unwrapped.items()))


def unwrap(error: BaseException) -> BaseException:
    """The error inside Ray's wrappers."""
    while (
        inner := getattr(error, "_base_exc", None)
        or getattr(error, "health_check_failure", None)
        or getattr(error, "cause", None)
    ):
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    return error


def format_error(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
