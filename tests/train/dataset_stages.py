"""Stages of configs/datasets in this process: what each kind of data is to give, and one step of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from defi_platform import storage
from defi_platform.config.loader import load_config
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.sampling.sharding import Shard
from defi_platform.train.checkpoint.export import save_model
from defi_platform.train.recipes.video_base import VideoRecipe

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "datasets"

Schema = TypeVar("Schema")


@dataclass(frozen=True)
class Kind:
    """Data below ../shared/data, and the sizes and meaning of its actions."""

    data: str
    action_dim: int
    state_dim: int
    """Of the raw state, as a robot sends it."""
    cameras: tuple[str, ...]
    contract: dict[str, Any] = field(default_factory=dict)
    read_dim: int | None = None
    """Numbers that the policy reads of the state; None: all."""


KINDS = {
    "calvin": Kind(
        "calvin",
        7,
        15,
        ("static", "gripper"),
        {
            "names": ["x", "y", "z", "roll", "pitch", "yaw", "gripper"],
            "kind": "relative",
            "control_hz": 30.0,
            "execute_steps": 10,
        },
        read_dim=10,
    ),
    "bridge": Kind("rlds", 7, 7, ("image_0",), {"kind": "relative", "control_hz": 5.0}),
    "lerobot": Kind("lerobot_v21/g1", 26, 26, ("cam_high",), {"kind": "unknown", "control_hz": 30.0}),
    "videos": Kind(
        "videos/xhand", 4, 2, ("front",), {"names": "unknown", "units": "unknown", "control_hz": 10.0}
    ),
}


def config_of(schema: type[Schema], kind: str, name: str, changes: Sequence[str] = ()) -> Schema:
    """A configuration as it stands in the repository, and the changes."""
    return load_config(schema, CONFIGS / kind / f"{name}.yaml", changes)


def one_step(recipe: VideoRecipe) -> None:
    """Prepares, builds and trains on one batch, and leaves the model folder where a run would."""
    torch.set_num_threads(1)
    # The data for tests is so little that a tenth of it may be nothing.
    recipe.config.data.holdout = 0.5
    recipe.prepare()
    model = recipe.build()
    batch = next(iter(local_batches(recipe.plan("train"), recipe.config.data, Shard.single(0, 2, 2))))
    loss = model(batch, generator=[torch.Generator().manual_seed(n) for n in range(2)])["loss"]
    assert torch.isfinite(loss)
    loss.backward()
    save_model(model, storage.join(recipe.config.train.output, "model"))
