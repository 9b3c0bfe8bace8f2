"""Requests that outlast a store that is away or a disk that is full: both come back, and a run of days must not end by them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from defi_platform.errors import TRY_AGAIN
from defi_platform.metrics import catalogue
from defi_platform.retry import Clock, RetryPolicy, retry
from defi_platform.storage.remote import StorageError

Result = TypeVar("Result")


class LongOutage(StorageError):
    """A store that was away, or a disk that was full, for longer than the configuration allows."""

    exit_code = TRY_AGAIN


def is_outage(error: Exception) -> bool:
    """True for an error of a store or disk that may pass; False for a path that is absent, since its store answers."""
    return isinstance(error, (OSError, StorageError)) and not isinstance(error, FileNotFoundError)


def retry_storage(
    request: Callable[[], Result],
    path: str,
    *,
    name: str,
    timeout_s: float,
    timeout_key: str,
    before_retry: Callable[[Exception], None] | None = None,
    clock: Clock = time,
) -> Result:
    """Makes a request to a store again and again until it succeeds; prints when an outage begins and ends.

    Args:
        request: reads or writes.
        path: read or written, for messages.
        name: of the run or the corpus, for messages.
        timeout_s: longest outage.
        timeout_key: config key of `timeout_s`, for messages.
        before_retry: called with each error, for what may help before the next try.
        clock: measures and waits.

    Returns: the request's result.
    Raises: LongOutage when it has failed for longer than `timeout_s`; FileNotFoundError at once.
    """
    warned = False

    def warn(error: Exception) -> None:
        nonlocal warned
        catalogue.STORAGE_RETRIES.add(user=name)
        if not warned:
            print(f"{name}: {path} cannot be used, trying again: {error}", flush=True)
        warned = True
        if before_retry:
            before_retry(error)

    policy = RetryPolicy(timeout_s=timeout_s)
    try:
        result = retry(request, policy, is_transient=is_outage, before_retry=warn, clock=clock)
    except Exception as error:
        if not is_outage(error):
            raise
        raise LongOutage(
            f"{path} could not be used for {timeout_s:.0f} s ({timeout_key}): {error}. Make room "
            "or bring the store back; the same command goes on from the last checkpoint."
        ) from error
    if warned:
        print(f"{name}: {path} can be used again", flush=True)
    return result
