"""A job as a user runs it, with the tiny recipe: `python tiny_job.py FOLDER STEPS HOLD`.

Before it reports step HOLD it writes an empty file `holds_HOLD` beside its run folder and waits for a request to stop,
so that a test meets it there however slow the machine is; HOLD 0 never waits.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tiny import TinyRecipe

from defi_platform.config import PretrainConfig, RayConfig, TrackingConfig, TrainConfig
from defi_platform.errors import exit_code
from defi_platform.train.driver.run import train
from defi_platform.train.stop_request import STOP

LONGEST_HOLD_S = 300.0


class HeldRecipe(TinyRecipe):
    """Waits in one step."""

    def __init__(self, config: PretrainConfig, hold: int):
        super().__init__(config, "held")
        self.hold = hold

    def after_update(self, engine: Any, step: int) -> dict[str, float]:
        deadline = time.monotonic() + LONGEST_HOLD_S
        if step == self.hold:
            marker(Path(self.config.train.output), step).touch()
        while step == self.hold and not (Path(self.config.train.output) / STOP).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody interrupted step {step}")
            time.sleep(0.05)
        return super().after_update(engine, step)


def marker(run: Path, step: int) -> Path:
    """The file that says that the job waits in this step."""
    return run.with_name(f"holds_{step}")


def held(folder: str, steps: int, hold: int) -> HeldRecipe:
    """The recipe of the job with these arguments."""
    config = PretrainConfig(
        train=TrainConfig(
            output=folder, steps=steps, global_batch=4, micro_batch=4, log_every=1,
            checkpoint_every=3, validate_every=1000, validation_samples=2, threads=1,
        ),
        tracking=TrackingConfig(wandb=False),
    )  # fmt: skip
    return HeldRecipe(config, hold)


def main() -> int:
    print(train(RayConfig(), [held(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))])[0].text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
