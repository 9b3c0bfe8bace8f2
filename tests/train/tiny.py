"""The smallest real recipe: a linear model with dropout, counted buffers and per-sample noise, no video."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defi_platform.config import PretrainConfig
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.recipe import Recipe

WIDTH = 6


class TinyModel(nn.Module):
    """Learns to double its input; also holds a frozen part and a count of the samples seen."""

    def __init__(self, dropout: float):
        super().__init__()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.hidden = nn.Linear(WIDTH, 16)
        self.out = nn.Linear(16, WIDTH)
        # One element cannot be divided: under ZeRO 3 the second rank holds nothing but padding of it.
        self.scale = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, batch: dict[str, Any], generator: list[torch.Generator]) -> dict[str, Tensor]:
        clean = batch["x"].to(self.out.weight.dtype)
        noise = torch.stack([torch.randn(WIDTH, generator=one) for one in generator]).to(clean)
        if self.training:
            self.seen += len(clean)
        hidden = torch.tanh(self.hidden(clean + 0.1 * noise))
        prediction = self.scale * self.out(self.dropout(hidden)) + 0.01 * self.frozen(clean)
        return {"loss": (prediction - 2 * clean).float().pow(2).mean()}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), folder / "model.pt")


class TinyRecipe(Recipe):
    """Kills its own process, once per run folder, or ruins its weights, when it is asked to."""

    summed_buffers = ("seen",)

    def __init__(self, config: PretrainConfig, kind: str = "tiny", dropout: float = 0.1,
                 kill_at: int | None = None, diverge_at: int | None = None):  # fmt: skip
        super().__init__(config)
        self.kind = kind
        self.dropout = dropout
        self.kill_at, self.diverge_at = kill_at, diverge_at

    def build(self) -> nn.Module:
        return TinyModel(self.dropout)

    def plan(self, split: str) -> str:
        return split

    def stream(self, plan, shard):
        for samples in shard.micro_batches():
            x = torch.stack([_values(plan, k) for k in samples])
            yield {"x": x, "sample": torch.tensor(samples), "text": [""] * len(samples)}

    def after_update(self, engine, step):
        marker = Path(self.config.train.output) / f"killed_{step}"
        if self.kill_at == step and torch.distributed.get_rank() == 0 and not marker.exists():
            die_after_checkpoint(Path(self.config.train.output), marker)
        if self.diverge_at == step:
            with torch.no_grad():
                engine.set_parameter(engine.module.out.bias, torch.full((WIDTH,), float("nan")))
        return {"seen": float(engine.module.seen.item())}


def wait_for(path: Path) -> None:
    """Until there is such a file."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.1)


def die_after_checkpoint(run: Path, marker: Path, step: int = 1) -> None:
    """Kills this process once a checkpoint of `step` or later stands in the run folder; it gets there behind the
    steps."""
    deadline = time.monotonic() + 60
    while not any(found.step >= step for found in checkpoints.committed(str(run))):
        assert time.monotonic() < deadline, "no checkpoint to go on from"
        time.sleep(0.05)
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _values(split: str, sample: int) -> Tensor:
    generator = torch.Generator().manual_seed(sample * 2 + (split == "train"))
    return torch.randn(WIDTH, generator=generator)


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """Rows of a run's metrics file."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == split]


def losses(folder: Path, split: str = "train") -> dict[int, float]:
    """Step -> loss."""
    found = {row["step"]: row["loss"] for row in rows(folder, split)}
    assert all(math.isfinite(loss) for loss in found.values())
    return found


def final_count(folder: Path) -> int:
    """Samples that the exported model's buffer has counted."""
    return int(torch.load(folder / "model" / "model.pt", weights_only=True)["seen"])
