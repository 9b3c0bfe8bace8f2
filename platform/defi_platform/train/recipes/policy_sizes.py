"""Sizes of a policy that follow from its corpora: width of actions and states, and the cameras."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from defi_models.inputs.state_layout import width_of_choice
from defi_platform.config import DataConfig, ModelConfig
from defi_platform.data.loader.robot_signals import dimensions
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.views import view_order
from defi_platform.data.sources.formats import format_of, listing, read_signals
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
    """Sizes of the corpora that a plan draws from."""
    actions, state = dimensions(plan)
    return DataSizes(actions, state, plan.cameras_of_views)


def sizes_before_ingest(data: DataConfig) -> DataSizes | None:
    """Sizes by the first episode with usable actions that a corpus lists; None where none has actions.

    Raises: CorpusError, StorageError.
    """
    for name, corpus in data.corpora.items():
        if corpus.weight <= 0:
            continue
        source = format_of(name, corpus)
        listed = itertools.islice(listing(source, corpus.path, corpus.fps), LOOKED_AT)
        records = (r for r in listed if isinstance(r, VideoRecord) and r.num_actions and r.signals_uri)
        unusable: CorpusError | None = None
        for (uri, episode), group in itertools.groupby(records, lambda r: (r.signals_uri, r.episode_id)):
            cameras = [record.camera for record in group]
            try:
                signals = read_signals(source, uri, episode)
            except CorpusError as error:
                unusable = unusable or error
                continue
            state = 0 if signals.proprio is None else signals.proprio.shape[1]
            if corpus.state:
                with model_errors():
                    state = width_of_choice(corpus.state, f"data.corpora.{name}.state")
            chosen = [camera for camera, share in corpus.cameras.items() if share > 0]
            return DataSizes(signals.actions.shape[1], state, tuple(chosen or view_order(source, cameras)))
        if unusable is not None:
            raise unusable
    return None


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
