"""Actions and proprioception of labelled corpora as training sees them, and their statistics for normalisation.

They come from the table that the ingest made of them; no source is read again.

Layout: n steps, A action dimensions, P proprioception dimensions; float32, raw units of the robot.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from defi_models.errors import ConfigurationError
from defi_models.inputs.state_layout import StateLayout, chosen_layout
from defi_platform import storage
from defi_platform.data.manifest.commit_marker import corpus_file
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sources.records import Signals
from defi_platform.data.tables.signal_file import SignalFile
from defi_platform.errors import ConfigError, CorpusError


@dataclass(frozen=True)
class Statistics:
    """Mean, deviation and range per dimension, over the steps of the training split; float32 (D,) each."""

    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    count: int


class SignalReader:
    """Reads signals of manifest rows.

    Args:
        states: corpus -> entries of its raw states to read, as in `CorpusConfig.state`; others are read whole.
    """

    def __init__(self, states: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._states = dict(states or {})
        self._table = functools.lru_cache(maxsize=None)(SignalFile)
        self._layout = functools.lru_cache(maxsize=None)(self._chosen)

    def of_row(self, manifest: Manifest, row: int) -> Signals:
        """Reads the signals of one manifest row, of a window only its own.

        Raises: CorpusError when it has none, or their table is gone; ConfigError for entries that the states have not.
        """
        found = manifest.row(row)
        table, layout = self._table(_uri_of(manifest, found)), self.layout(manifest, row)
        span = found["signals_row"], found["num_actions"]
        if not table.layout.state_dim:
            return Signals(table.actions(*span), None)
        states = table.states(*span)
        return Signals(table.actions(*span), states if layout is None else layout.apply(states))

    def action_names(self, manifest: Manifest, row: int) -> tuple[str, ...]:
        """Names of the actions' entries of a manifest row, `action_0` and so on where its corpus gives none.

        Raises: CorpusError as `of_row`.
        """
        layout = self._table(_uri_of(manifest, manifest.row(row))).layout
        return layout.action_names or tuple(f"action_{number}" for number in range(layout.action_dim))

    def layout(self, manifest: Manifest, row: int) -> StateLayout | None:
        """Layout of the states of a manifest row's corpus; None where they are read whole. Raises: as `of_row`."""
        found = manifest.row(row)
        return self._layout(found["corpus"], _uri_of(manifest, found))

    def _chosen(self, corpus: str, uri: str) -> StateLayout | None:
        choice, known = self._states.get(corpus), self._table(uri).layout
        if not choice:
            return None
        key = f"data.corpora.{corpus}.state"
        if not known.state_dim:
            raise ConfigError(f"{key} chooses entries, but this corpus has no states. Remove it.")
        try:
            return chosen_layout(choice, known.state_dim, known.state_names, known.state_centres, key)
        except ConfigurationError as error:
            raise ConfigError(str(error)) from error


def _uri_of(manifest: Manifest, row: Mapping[str, Any]) -> str:
    if manifest.folder is None or row["signals"] is None:
        raise CorpusError(f"{row['video_id']} of corpus {row['corpus']} has no actions that can be used.")
    return corpus_file(manifest.folder, row["corpus"], row["signals"])


def state_layout(plan: Plan) -> StateLayout | None:
    """The layout of raw states that a policy trained on `plan` is served with; None where states are taken whole.

    Where corpora have their entries at different places, a raw state is these entries in the order of the choice.

    Raises: ConfigError when corpora differ in it by the middle of an angle alone; as `SignalReader.of_row`.
    """
    reader = SignalReader(plan.states)
    layouts = [reader.layout(plan.manifest, row) for row in plan.one_row_per_corpus()]
    if all(layout == layouts[0] for layout in layouts):
        return layouts[0]
    chosen = [layout for layout in layouts if layout is not None]
    if len(chosen) < len(layouts) or len({tuple(e.angle for e in layout.entries) for layout in chosen}) > 1:
        return None
    entries = []
    for number, same in enumerate(zip(*(layout.entries for layout in chosen), strict=True)):
        first, names = same[0], {entry.name for entry in same}
        if first.angle == "unwrap" and len({entry.around for entry in same}) > 1:
            raise ConfigError(
                "corpora have different mean directions of an unwrapped angle. Set `around` in "
                "data.corpora.NAME.state, the same for all."
            )
        entries.append(replace(first, index=number, name=first.name if len(names) == 1 else ""))
    return StateLayout(raw_dim=len(entries), entries=tuple(entries))


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


def _episodes_of(plan: Plan) -> Iterator[Signals]:
    rows = plan.first_rows()
    if not len(rows):
        raise CorpusError("no episode with actions to take statistics from.")
    reader = SignalReader(plan.states)
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
