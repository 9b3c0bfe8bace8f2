"""Progress of a job as others can see it: the folders in which it leaves new names as it advances.

The names are written out here, and compared with the product's by a test: to import them would bring torch and the
simulator into a process that only waits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from defi_platform import storage
from defi_platform.config import (
    DataConfig,
    DemoConfig,
    EncodeConfig,
    EvaluateConfig,
    PretrainBothConfig,
    PretrainConfig,
    RecordConfig,
)
from defi_platform.storage import StorageError


@dataclass(frozen=True)
class Place:
    """A folder that a job fills."""

    folder: str
    pattern: str = r"([^.].*)"
    """Of the names that count. Names with the same first group are one: an attempt that writes a checkpoint of the
    same step as the one before it has not advanced."""


def _trained(config: PretrainConfig) -> Iterator[Place]:
    yield Place(config.train.output)
    yield Place(storage.join(config.train.output, "checkpoints"), r"(step_\d+)_.*")
    yield from _ingested(config.data)


def _ingested(config: DataConfig) -> Iterator[Place]:
    for name in config.corpora:
        folder = storage.join(config.manifest, "corpora", name)
        yield from (Place(folder), Place(storage.join(folder, "probed")))


def _evaluated(config: EvaluateConfig) -> Iterator[Place]:
    yield from (Place(config.output), Place(storage.join(config.output, "episodes")))


def _recorded(config: RecordConfig) -> Iterator[Place]:
    yield from (Place(config.output), Place(storage.join(config.output, ".attempts")))


def _encoded(config: EncodeConfig) -> Iterator[Place]:
    # The table of a shard comes last.
    yield Place(storage.join(config.data.cache or "", "shards"), r"(.*\.parquet)")


def _both(config: PretrainBothConfig) -> Iterator[Place]:
    yield from _trained(config.gfdm)
    yield from _trained(config.gidm)


def _demonstrated(config: DemoConfig) -> Iterator[Place]:
    yield Place(config.output)
    yield from _recorded(config.record)
    yield from _both(config.pretrain)
    yield from _trained(config.finetune)
    yield from _evaluated(config.evaluate)


@dataclass(frozen=True)
class JobWork:
    """A job as its supervisor sees it."""

    places: Callable[[Any], Iterator[Place]]
    """Config -> folders that the job fills."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Options of its command line -> the overrides that they stand for."""
    is_service: bool = False
    """It has no end of its own: to have served for a while is its progress."""


JOBS: dict[str, JobWork] = {
    "demo": JobWork(_demonstrated),
    "encode_latents": JobWork(_encoded),
    "evaluate_policy": JobWork(_evaluated),
    "finetune_policy": JobWork(_trained),
    "ingest_videos": JobWork(
        lambda config: _ingested(config.data),
        {"--strict": "data.strict=true", "--retry-quarantined": "data.retry_quarantined=true"},
    ),
    "pretrain": JobWork(_both),
    "pretrain_gfdm": JobWork(_trained),
    "pretrain_gidm": JobWork(_trained),
    "record_demos": JobWork(_recorded),
    "serve_policy": JobWork(lambda config: iter(()), is_service=True),
}
"""The jobs that can be supervised: those that take long, by name."""


class WorkSeen:
    """The names that a job has left so far.

    A name counts once: checkpoints that come and go, or one that is written again at every attempt, are no progress.

    Args:
        places: of the job.
        report: prints a line; called once when a folder cannot be listed from here.
    """

    def __init__(self, places: Iterator[Place], report: Callable[[str], None]):
        self._places = list(dict.fromkeys(places))
        self._report = report
        self._seen: set[str] = set()
        self._reported = False

    def advanced(self) -> bool:
        """True when there is a name that no earlier call has seen."""
        try:
            found = {name for place in self._places for name in _names(place)}
        except (OSError, StorageError) as error:
            if not self._reported:
                self._report(f"progress cannot be seen from here, so that every failure counts: {error}")
            self._reported = True
            return False
        new = not found <= self._seen
        self._seen |= found
        return new


def _names(place: Place) -> Iterator[str]:
    for name in storage.names(place.folder):
        if match := re.fullmatch(place.pattern, name):
            yield storage.join(place.folder, match[1])
