"""A store that is away and a disk that is full are waited for: they come back, and a run of days is not to end by them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, TypeVar

from defi_platform.config import TrainConfig
from defi_platform.storage import StorageError

LONGEST_PAUSE_S = 5.0

Result = TypeVar("Result")


def patiently(
    request: Callable[[], Result],
    place: str,
    *,
    name: str,
    patience_s: float,
    setting: str = "train.storage_patience_s",
    after_failure: Callable[[Exception], None] | None = None,
) -> Result:
    """Makes a request again and again until it succeeds; the first failure is told, and its end.

    Args:
        place: what is read or written, for messages.
        name: of the run or the corpus, for messages.
        setting: where `patience_s` is from, for messages.
        after_failure: what may help before the next try.
    Raises: StorageError when it has failed for longer than `patience_s`; FileNotFoundError at once.
    """
    began, told, pause = time.monotonic(), False, 0.2
    while True:
        try:
            done = request()
            if told:
                print(f"{name}: {place} can be used again", flush=True)
            return done
        except FileNotFoundError:
            raise  # it answers, and nothing is there
        except (OSError, StorageError) as error:
            if time.monotonic() - began > patience_s:
                raise StorageError(
                    f"{place} could not be used for {patience_s:.0f} s ({setting}): {error}. Make room "
                    "or bring the store back; the same command goes on from the last checkpoint."
                ) from error
            if not told:
                print(f"{name}: {place} cannot be used, trying again: {error}", flush=True)
            told = True
            if after_failure:
                after_failure(error)
        time.sleep(pause)
        pause = min(LONGEST_PAUSE_S, 2 * pause)


def run_patience(name: str, train: TrainConfig) -> Any:
    """`patiently` for requests to the folder of a run, for as long as its config says."""
    return functools.partial(patiently, place=train.output, name=name, patience_s=train.storage_patience_s)
