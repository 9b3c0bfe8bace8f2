"""Worker failures for the user: one line each, from Ray Train's controller, without Ray's wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback

from defi_platform import logs


class FailureLines(UserCallback):
    """Prints one line per worker failure; Ray Train then restarts the workers, or raises and the job reports it."""

    def __init__(self, kind: str):
        self._kind = kind

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Prints the root cause of a failure."""
        rank, error = root_cause(worker_exceptions)
        logs.say(f"{self._kind}: worker {rank} failed: {format_error(error)}", kind=self._kind)


def root_cause(worker_exceptions: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The rank and error of the failure that most likely came first.

    The death of one rank fails the collective calls of the others, so errors of broken connections are returned only
    when there is nothing else.
    """
    unwrapped = {rank: unwrap(error) for rank, error in sorted(worker_exceptions.items())}
    for rank, error in unwrapped.items():
        if not is_collateral(error):
            return rank, error
    return next(iter(unwrapped.items()))


def is_collateral(error: BaseException) -> bool:
    """True for the error of a rank whose connection to another one broke, as it does when that one dies."""
    return any(words in str(error) for words in ("peer", "Connection", "NCCL error", "ncclRemoteError"))


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
