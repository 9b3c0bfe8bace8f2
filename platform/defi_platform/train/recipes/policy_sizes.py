"""Sizes of a policy that follow from its corpora: width of actions and states, and the cameras."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from defi_models.errors import did_you_mean
from defi_models.inputs.state_layout import chosen_layout
from defi_platform.config import CorpusConfig, DataConfig, ModelConfig
from defi_platform.config.data import drawn_corpora
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.views import view_order
from defi_platform.data.sources.formats import format_of, listing, read_signals, signal_names
from defi_platform.data.sources.records import VideoRecord
from defi_platform.errors import ConfigError, CorpusError
from defi_platform.train.recipes.video_base import model_errors

if TYPE_CHECKING:
    from defi_models.policy import DeFIPolicy

LOOKED_AT = 10_000
"""Records of a corpus after which a listing is not searched further for an episode with actions."""


@dataclass(frozen=True)
class DataSizes:
    """Sizes that corpora give a policy."""

    action_dim: int
    state_dim: int
    """0: the corpora have no states."""
    cameras: tuple[str, ...]
    """In the order of the views."""

    def text(self) -> str:
        """One line about them."""
        first, *others = self.cameras
        rest = f"; then {', '.join(others)}" if others else ""
        return (
            f"actions of {self.action_dim} entries, states of {self.state_dim}; views: {first} (compared over time)"
            + rest
        )


def sizes_of(plan: Plan) -> DataSizes:
    """Sizes of the corpora that a plan draws from. Raises: ConfigError when these differ."""
    found = {}
    reader = SignalReader(plan.states)
    for row in plan.one_row_per_corpus():
        signals = reader.of_row(plan.manifest, row)
        state = 0 if signals.proprio is None else signals.proprio.shape[1]
        name = plan.manifest.row(row)["corpus"]
        found[name] = DataSizes(signals.actions.shape[1], state, plan.cameras_of_views)
    return _common(found)


def sizes_before_ingest(data: DataConfig) -> DataSizes | None:
    """Sizes by the first episode with usable actions that each corpus lists; None where none has actions.

    Raises: ConfigError for cameras or entries of states that a corpus has not, and when sizes differ. CorpusError,
        StorageError.
    """
    found = {name: _listed_sizes(name, corpus) for name, corpus in drawn_corpora(data).items()}
    known = {name: sizes for name, sizes in found.items() if sizes is not None}
    return _common(known) if known else None


def _listed_sizes(name: str, corpus: CorpusConfig) -> DataSizes | None:
    source = format_of(name, corpus)
    sizes: DataSizes | None = None
    unusable: CorpusError | None = None
    present: set[str] = set()
    listed = listing(source, corpus.path, corpus.fps)
    records = (r for r in itertools.islice(listed, LOOKED_AT) if isinstance(r, VideoRecord))
    for _, group in itertools.groupby(records, lambda r: (r.signals_uri, r.episode_id)):
        if sizes is not None and present.issuperset(corpus.cameras):
            break
        videos = list(group)
        present.update(video.camera for video in videos)
        videos = [video for video in videos if video.num_actions and video.signals_uri]
        if sizes is None and videos:
            try:
                sizes = _episode_sizes(name, corpus, source, videos)
            except CorpusError as error:
                unusable = unusable or error
    if present and next(listed, None) is None:  # everything is listed, and what no video has is not there
        for camera in sorted(set(corpus.cameras) - present):
            raise ConfigError(
                f"data.corpora.{name}.cameras names '{camera}', which the corpus does not have."
                + did_you_mean(camera, sorted(present))
            )
    if sizes is None and unusable is not None:
        raise unusable
    return sizes


def _episode_sizes(name: str, corpus: CorpusConfig, source: str, videos: Sequence[VideoRecord]) -> DataSizes:
    signals = read_signals(source, videos[0].signals_uri, videos[0].episode_id)
    state = 0 if signals.proprio is None else signals.proprio.shape[1]
    if corpus.state:
        key, names = f"data.corpora.{name}.state", signal_names(source, corpus.path).state
        if not state:
            raise ConfigError(f"{key} chooses entries, but this corpus has no states. Remove it.")
        with model_errors():
            layout = chosen_layout(corpus.state, state, names if len(names) == state else (), (), key)
        state = layout.width
    chosen = [camera for camera, share in corpus.cameras.items() if share > 0]
    left = [video.camera for video in videos if video.camera not in corpus.cameras]
    return DataSizes(signals.actions.shape[1], state, tuple(chosen or view_order(source, left)))


def _common(found: Mapping[str, DataSizes]) -> DataSizes:
    """The sizes that all corpora have; one without states goes with others, for policies that read none."""
    values = list(found.values())
    states = {sizes.state_dim for sizes in values} - {0}
    if len({(sizes.action_dim, len(sizes.cameras)) for sizes in values}) > 1 or len(states) > 1:
        each = "; ".join(
            f"{name}: actions of {sizes.action_dim} entries, states of {sizes.state_dim}, "
            f"{len(sizes.cameras)} cameras"
            for name, sizes in found.items()
        )
        raise ConfigError(
            f"corpora differ in what a policy takes from them ({each}). Choose data.corpora.NAME.cameras and state, or "
            "train on those that agree."
        )
    return values[0]


def with_sizes(config: DeFIPolicy.Config, model: ModelConfig, sizes: DataSizes) -> DeFIPolicy.Config:
    """The configuration of a policy with the sizes of its data in place of its preset's.

    A preset that reads no states goes on to read none.

    Args:
        config: of the preset with the overrides.
        model: preset and overrides; a size that is set there must be the data's.
        sizes: of the data.

    Raises: ConfigError that names every size which was set to another value.
    """
    head = _part(_part(model.overrides, "adapter"), "head")
    wrong = []
    if head.get("action_dim", sizes.action_dim) != sizes.action_dim:
        wrong.append(
            f"model.overrides.adapter.head.action_dim={head['action_dim']}, actions have {sizes.action_dim} entries"
        )
    if head.get("proprio_dim", 0) not in (0, sizes.state_dim):
        wrong.append(
            f"model.overrides.adapter.head.proprio_dim={head['proprio_dim']}, states have {sizes.state_dim} entries "
            "(0 reads none)"
        )
    if model.overrides.get("views", len(sizes.cameras)) != len(sizes.cameras):
        wrong.append(
            f"model.overrides.views={model.overrides['views']}, the corpora have {len(sizes.cameras)} cameras "
            f"({', '.join(sizes.cameras)}; data.corpora.NAME.cameras chooses)"
        )
    named = tuple(model.overrides.get("cameras") or sizes.cameras)
    if named != sizes.cameras:
        wrong.append(
            f"model.overrides.cameras={list(named)}, the views are {', '.join(sizes.cameras)} in this order"
        )
    if wrong:
        raise ConfigError(
            f"the policy does not fit its corpora: {'; '.join(wrong)}. Leave these out: they follow from the data."
        )
    states = sizes.state_dim if head.get("proprio_dim", config.adapter.head.proprio_dim) else 0
    fitted = replace(config.adapter.head, action_dim=sizes.action_dim, proprio_dim=states)
    return replace(
        config,
        views=len(sizes.cameras),
        cameras=sizes.cameras,
        adapter=replace(config.adapter, head=fitted),
    )


def _part(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = values.get(name)
    return part if isinstance(part, Mapping) else {}
