"""Actions and proprioception of labelled corpora: reading them, and their statistics for normalisation.

Layout: n steps, A action dimensions, P proprioception dimensions; float32, raw units of the robot.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sources.formats import read_signals
from defi_platform.data.sources.records import Signals
from defi_platform.errors import CorpusError

OPEN_EPISODES = 256
"""Episodes kept in memory per reader."""


@dataclass(frozen=True)
class Statistics:
    """Mean, deviation and range per dimension, over the steps of the training split; float32 (D,) each."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int


class SignalReader:
    """Reads signals of manifest rows and keeps the last episodes in memory."""

    def __init__(self) -> None:
        self._read = functools.lru_cache(maxsize=OPEN_EPISODES)(read_signals)

    def of_row(self, manifest: Manifest, row: int) -> Signals:
        """Reads the signals of one manifest row, of a window only its own.

        Raises: CorpusError when its file, or its episode there, is absent.
        """
        found = manifest.row(row)
        signals = self._read(found["source"], found["signals_uri"], found["episode_id"])
        first = found["first_action"]
        if first is None:
            return signals
        proprio = None if signals.proprio is None else signals.proprio[first : first + found["num_frames"]]
        return Signals(signals.actions[first : first + found["num_actions"]], proprio)


def statistics(plan: Plan) -> dict[str, Statistics]:
    """Computes statistics of "action" and, where there is one, "proprio" over every episode that `plan` draws from.

    Raises: CorpusError when no episode has actions.
    """
    reader = SignalReader()
    actions, proprios = [], []
    for signals in _episodes_of(plan, reader):
        actions.append(signals.actions)
        if signals.proprio is not None:
            proprios.append(signals.proprio)
    found = {"action": _summary(np.concatenate(actions))}
    if proprios:
        found["proprio"] = _summary(np.concatenate(proprios))
    return found


def dimensions(plan: Plan) -> tuple[int, int]:
    """Reads (A, P) of the corpora that `plan` draws from; P is 0 without proprioception."""
    signals = next(iter(_episodes_of(plan, SignalReader())))
    return signals.actions.shape[1], 0 if signals.proprio is None else signals.proprio.shape[1]


def _episodes_of(plan: Plan, reader: SignalReader) -> Iterator[Signals]:
    rows = plan.first_rows()
    if not len(rows):
        raise CorpusError("no episode with actions to take statistics from.")
    for row in rows.tolist():
        yield reader.of_row(plan.manifest, row)


def _summary(values: np.ndarray) -> Statistics:
    wide = values.astype(np.float64)
    return Statistics(
        mean=wide.mean(axis=0).astype(np.float32),
        std=wide.std(axis=0).astype(np.float32),
        min=values.min(axis=0),
        max=values.max(axis=0),
        count=len(values),
    )
