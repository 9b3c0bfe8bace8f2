"""The three recipes, with a worker that is killed once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from defi_platform.config import PretrainConfig
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe


class Killed:
    """Rank 0 kills its own process after update `kill_at`, once per run folder."""

    def __init__(self, config: PretrainConfig, kill_at: int):
        super().__init__(config)  # type: ignore[call-arg]
        self.kind = f"killed_{self.kind}"  # type: ignore[has-type]
        self.kill_at = kill_at

    def after_update(self, engine: Any, step: int) -> dict[str, float]:
        row = super().after_update(engine, step)  # type: ignore[misc]
        marker = Path(self.config.train.output) / "killed"  # type: ignore[attr-defined]
        if step == self.kill_at and torch.distributed.get_rank() == 0 and not marker.exists():
            every = self.config.train.checkpoint_every  # type: ignore[attr-defined]
            tiny.die_after_checkpoint(marker.parent, marker, step // every * every)
        return row


class KilledGFDM(Killed, GFDMRecipe):
    pass


class KilledGIDM(Killed, GIDMRecipe):
    pass


class KilledPolicy(Killed, PolicyRecipe):
    pass
