"""Linear probe: the share of the true action that a linear map reads off GIDM's latent action.

It measures whether pretraining on video has learned actions. The control is the same encoder with random weights,
which has learned nothing. N pairs, K latent action tokens, A action dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from defi_platform.config import DataConfig, ProbeConfig
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import PairRule
from defi_platform.data.sampling.sharding import Shard

if TYPE_CHECKING:
    from defi_models.gidm import GIDM

BATCH = 16
STRENGTHS = tuple(10.0**power for power in range(-2, 6))
"""Ridge penalties; the best on a fifth of the training pairs is taken."""


def probe_data(probe: ProbeConfig, data: DataConfig) -> DataConfig:
    """The pretraining's data settings with the probe's labelled corpora."""
    return replace(data, corpora=probe.corpora, manifest=probe.manifest, holdout=probe.holdout, cache=None)


def linear_probe(
    encoders: dict[str, GIDM], manifest: Manifest, data: DataConfig, pairs: int, rule: PairRule, seed: int
) -> dict[str, float]:
    """R2 of a linear map from latent actions to true actions, by encoder.

    Args:
        encoders: name -> model in evaluation mode; all see the same pairs.
        manifest: of the labelled corpora.
        data: their settings, as `probe_data` makes them.
        pairs: N of the training split, and as many of the validation split.
        rule: frame sampler of the pairs.
        seed: of the plan.

    Returns: name -> R2 on the validation split.
    """
    seen = {
        split: _pairs(encoders, Plan.of(manifest, data, rule, seed, split), data, pairs)
        for split in ("train", "validation")
    }
    (features, actions), (held_features, held_actions) = seen["train"], seen["validation"]
    return {name: ridge_r2(features[name], actions, held_features[name], held_actions) for name in encoders}


@torch.no_grad()
def _pairs(
    encoders: dict[str, GIDM], plan: Plan, data: DataConfig, pairs: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Latent actions (N, K * latent_dim) by encoder, and the mean action between the two frames (N, A)."""
    number = -(-pairs // BATCH) * BATCH
    found: dict[str, list[Tensor]] = {name: [] for name in encoders}
    actions: list[Tensor] = []
    reader = SignalReader()
    for batch in local_batches(plan, data, Shard.single(0, number, BATCH)):
        # A sample that stands in for a bad video is not the one that the plan names, so its actions are unknown.
        valid = [index for index, reason in enumerate(batch["skipped"]) if not reason]
        texts = [batch["text"][index] for index in valid]
        for name, encoder in encoders.items():
            latent = encoder.encode(batch["frames"][valid], texts).tokens
            found[name].append(latent.flatten(1).float().cpu())
        for k in batch["sample"][valid].tolist():
            sample = plan.resolve(k)
            first, last = sample.indices
            taken = reader.of_row(plan.manifest, sample.row).actions[first:last]
            actions.append(torch.from_numpy(np.asarray(taken, np.float32)).mean(dim=0))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.stack(actions)


def ridge_r2(features: Tensor, targets: Tensor, held_features: Tensor, held_targets: Tensor) -> float:
    """R2 of a ridge regression on held-out rows.

    1 - residual over total sum of squares, over all dimensions after each is scaled to unit variance; dimensions that
    do not vary in training are ignored. 0 is as good as always answering the mean, below 0 is worse.

    Args:
        features: (N, F) of the training rows.
        targets: (N, A) of the training rows.
        held_features: (M, F) of the held-out rows.
        held_targets: (M, A) of the held-out rows.
    """
    mean, std = targets.double().mean(dim=0), targets.double().std(dim=0)
    varying = std > 1e-6
    if not varying.any():
        return 0.0
    y = ((targets.double() - mean) / std)[:, varying]
    held_y = ((held_targets.double() - mean) / std)[:, varying]
    centre, spread = features.double().mean(dim=0), features.double().std(dim=0).clamp_min(1e-6)
    x, held_x = ((one.double() - centre) / spread for one in (features, held_features))
    fifth = max(1, len(x) // 5)
    strength = max(STRENGTHS, key=lambda one: _r2(_ridge(x[fifth:], y[fifth:], one), x[:fifth], y[:fifth]))
    return _r2(_ridge(x, y, strength), held_x, held_y)


def _ridge(x: Tensor, y: Tensor, strength: float) -> Tensor:
    """(F, A): the minimum of |y - x w|^2 + strength |w|^2, in closed form."""
    weights: Tensor = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    return weights


def _r2(weights: Tensor, x: Tensor, y: Tensor) -> float:
    residual = (y - x @ weights).square().sum()
    total = (y - y.mean(dim=0)).square().sum().clamp_min(1e-12)
    return float(1 - residual / total)
