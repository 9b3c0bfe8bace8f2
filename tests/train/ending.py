"""A recipe that lets a test act between its last step and what is written afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import TinyRecipe, wait_for
from torch import nn

from defi_platform import storage
from defi_platform.config import PretrainConfig
from defi_platform.train.recipe import EvalReport


class EndingRecipe(TinyRecipe):
    """Says when training is over, and then waits until the store is away."""

    def __init__(self, config: PretrainConfig, marks: Path):
        super().__init__(config)
        self.marks = marks

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        if not (self.marks / "over").exists():
            (self.marks / "over").touch()
            wait_for(self.marks / "away")
        storage.write_text(storage.join(folder, "media/said.txt"), "done")
        return EvalReport(["media/said.txt"])
