"""Requests to the folder of a run, made again while its store is away."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from defi_platform.config import TrainConfig
from defi_platform.storage.outage import retry_storage

TIMEOUT_KEY = "train.storage_patience_s"
"""Config key of the longest outage that a run survives."""

Result = TypeVar("Result")


def retry_run_folder(name: str, train: TrainConfig, request: Callable[[], Result]) -> Result:
    """Makes a request to the run folder until it succeeds, for as long as the config says.

    Args:
        name: of the run, for messages.
        train: its settings; `output` is the folder.
        request: reads or writes there.

    Returns: the request's result.
    Raises: StorageError, FileNotFoundError: see `retry_storage`.
    """
    return retry_storage(
        request, train.output, name=name, timeout_s=train.storage_patience_s, timeout_key=TIMEOUT_KEY
    )
