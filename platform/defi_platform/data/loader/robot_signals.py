"""Actions and proprioception of labelled corpora as training sees them, and their statistics for normalisation.

They come from the table that the ingest made of them; no source is read again.

Layout: n steps, A action dimensions, P proprioception dimensions; float32, raw units of the robot.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from defi_platform import storage
from defi_platform.data.manifest.commit_marker import corpus_file
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sources.records import Signals
from defi_platform.data.tables.signal_file import SignalFile
from defi_platform.errors import CorpusError


@dataclass(frozen=True)
class Statistics:
    """Mean, deviation and range per dimension, over the steps of the training split; float32 (D,) each."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int


class SignalReader:
    """Reads signals of manifest rows."""

    def __init__(self) -> None:
        self.table = functools.lru_cache(maxsize=None)(SignalFile)
        """The table with a URI, opened once."""

    def of_row(self, manifest: Manifest, row: int) -> Signals:
        """Reads the signals of one manifest row, of a window only its own.

        Raises: CorpusError when it has none, or their table is gone.
        """
        found = manifest.row(row)
        if manifest.folder is None or found["signals"] is None:
            raise CorpusError(
                f"{found['video_id']} of corpus {found['corpus']} has no actions that can be used."
            )
        table = self.table(corpus_file(manifest.folder, found["corpus"], found["signals"]))
        span = found["signals_row"], found["num_actions"]
        return Signals(table.actions(*span), table.states(*span) if table.layout.state_dim else None)


def statistics(plan: Plan) -> dict[str, Statistics]:
    """Statistics of "action" and, where there is one, "proprio" over every episode that `plan` draws from.

    They are computed once and kept beside the manifest, under the fingerprint of the plan.

    Raises: CorpusError when no episode has actions.
    """
    folder = plan.manifest.folder
    if folder is None:
        return _computed(plan)
    uri = storage.join(folder, "statistics", f"{plan.fingerprint()}.json")
    try:
        kept = json.loads(storage.read_bytes(uri))
        return {name: _from_mapping(values) for name, values in kept.items()}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"{uri} is damaged ({error}); the statistics are computed again", flush=True)
    found = _computed(plan)
    try:
        # Every rank computes the same; whoever comes last writes the same once more.
        storage.write_text(uri, json.dumps({name: _as_mapping(values) for name, values in found.items()}))
    except (OSError, storage.StorageError) as error:
        print(f"{uri} cannot be written ({error}); the next run computes the statistics again", flush=True)
    return found


def dimensions(plan: Plan) -> tuple[int, int]:
    """Reads (A, P) of the corpora that `plan` draws from; P is 0 without proprioception.

    Raises: CorpusError when no episode has actions.
    """
    signals = next(_episodes_of(plan))
    return signals.actions.shape[1], 0 if signals.proprio is None else signals.proprio.shape[1]


def _episodes_of(plan: Plan) -> Iterator[Signals]:
    rows = plan.first_rows()
    if not len(rows):
        raise CorpusError("no episode with actions to take statistics from.")
    reader = SignalReader()
    for row in rows.tolist():
        yield reader.of_row(plan.manifest, row)


class _Moments:
    """Count, mean, squared deviations and range of rows that come in parts."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = self.low = self.high = np.zeros(0)

    def add(self, values: np.ndarray) -> None:
        wide = values.astype(np.float64)
        count, mean = len(wide), wide.mean(axis=0)
        squares = np.square(wide - mean).sum(axis=0)
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            self.low, self.high = values.min(axis=0), values.max(axis=0)
            return
        if mean.shape != self.mean.shape:
            raise CorpusError(
                f"corpora have actions or states of {len(self.mean)} and of {len(mean)} numbers; train on those that "
                "agree, or choose entries of the states in data.corpora.NAME.state."
            )
        both, apart = self.count + count, mean - self.mean
        self.squares = self.squares + squares + np.square(apart) * self.count * count / both
        self.mean = self.mean + apart * count / both
        self.count = both
        self.low, self.high = (
            np.minimum(self.low, values.min(axis=0)),
            np.maximum(self.high, values.max(axis=0)),
        )

    def result(self) -> Statistics:
        return Statistics(
            mean=self.mean.astype(np.float32),
            std=np.sqrt(self.squares / self.count).astype(np.float32),
            min=self.low.astype(np.float32),
            max=self.high.astype(np.float32),
            count=self.count,
        )


def _computed(plan: Plan) -> dict[str, Statistics]:
    action, proprio = _Moments(), _Moments()
    for signals in _episodes_of(plan):
        action.add(signals.actions)
        if signals.proprio is not None:
            proprio.add(signals.proprio)
    found = {"action": action.result()}
    return found | ({"proprio": proprio.result()} if proprio.count else {})


def _as_mapping(values: Statistics) -> dict[str, object]:
    vectors = {name: getattr(values, name).tolist() for name in ("mean", "std", "min", "max")}
    return vectors | {"count": values.count}


def _from_mapping(values: dict[str, object]) -> Statistics:
    vectors = {name: np.asarray(values[name], np.float32) for name in ("mean", "std", "min", "max")}
    return Statistics(**vectors, count=int(values["count"]))  # type: ignore[call-overload]
