"""A job as a user runs it, with the tiny recipe: `python tiny_job.py FOLDER STEPS`; waits a little in each step."""

from __future__ import annotations

import sys
import time
from typing import Any

from tiny import TinyRecipe

from defi_platform.config import PretrainConfig, RayConfig, TrackingConfig, TrainConfig
from defi_platform.errors import exit_code
from defi_platform.train.run import train


class SlowRecipe(TinyRecipe):
    """Slow enough to be caught in the middle."""

    def after_update(self, engine: Any, step: int) -> dict[str, float]:
        time.sleep(0.3)
        return super().after_update(engine, step)


def main() -> int:
    config = PretrainConfig(
        train=TrainConfig(
            output=sys.argv[1], steps=int(sys.argv[2]), global_batch=4, micro_batch=4, log_every=1,
            checkpoint_every=3, validate_every=1000, validation_batches=1, threads=1,
        ),
        tracking=TrackingConfig(wandb=False),
    )  # fmt: skip
    print(train(RayConfig(), [SlowRecipe(config, "slow")])[0].text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
