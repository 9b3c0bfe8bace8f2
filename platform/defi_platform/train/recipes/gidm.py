"""GIDM: pairs of frames, and the codebook of latent actions between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from defi_platform.data.rules import PairRule, Rule
from defi_platform.train.draws import seed_of
from defi_platform.train.recipes.video import VideoRecipe, load_folder, model_errors

if TYPE_CHECKING:
    from defi_models.codebook import Codebook
    from defi_platform.train.engine import TrainingEngine


class GIDMRecipe(VideoRecipe):
    """Inverse dynamics pretraining."""

    kind = "gidm"
    summed_buffers: Sequence[str] = ("encoder.codebook.usage",)

    def rule(self) -> Rule:
        return PairRule(self.config.data.pair_interval_s)

    def build_without_cache(self) -> nn.Module:
        from defi_models import presets
        from defi_models.gidm import InverseDynamics

        model = self.config.model
        with model_errors():
            if model.init_from:
                return load_folder(InverseDynamics.from_pretrained, model.init_from)
            return InverseDynamics(presets.gidm(model.preset, **model.overrides))

    def after_update(self, engine: TrainingEngine, step: int) -> dict[str, float]:
        every = self.config.train.restart_dead_codes_every
        codebook = cast("Codebook | None", engine.module.codebook)
        if codebook is None or not every or step % every:
            return {}
        return restart_dead_codes(engine, codebook, seed_of(self.config.train.seed, "restart", step))

    def validation_counts(self, outputs: dict[str, Tensor]) -> Tensor | None:
        if "indices" not in outputs:
            return None
        return torch.bincount(outputs["indices"].flatten(), minlength=self._codes)

    def validation_metrics(self, counts: Tensor) -> dict[str, Any]:
        return code_usage(counts)

    def summary(self, validation: dict[str, Any]) -> dict[str, Any]:
        names = ("codebook_fraction_used", "codebook_perplexity", "code_counts")
        return super().summary(validation) | {name: validation[name] for name in names if name in validation}

    @property
    def _codes(self) -> int:
        from defi_models import presets

        model = self.config.model
        return presets.gidm(model.preset, **model.overrides).encoder.codebook.size


def code_usage(counts: Tensor) -> dict[str, Any]:
    """How much of the codebook is in use.

    Args:
        counts: (codes,) how often each was chosen.
    Returns: `codebook_fraction_used` in 0..1, `codebook_perplexity` (the effective number of codes), and the
        counts themselves.
    """
    share = counts.double() / counts.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {
        "codebook_fraction_used": float((counts > 0).double().mean()),
        "codebook_perplexity": float(entropy.exp()),
        "code_counts": [int(count) for count in counts],
    }


def restart_dead_codes(engine: TrainingEngine, codebook: Codebook, seed: int) -> dict[str, float]:
    """Replaces the codes that no rank has used since the last restart, the same way on every rank."""
    counts = codebook.usage.clone()
    distributed.all_reduce(counts)
    dead = int((counts == 0).sum())
    if dead:
        with engine.gathered(codebook.weight):
            restarted = codebook.restart(counts, torch.Generator().manual_seed(seed))
        if restarted is not None:
            # Living codes keep their fp32 masters; the codebook answers from its working copy, which is rounded
            # in half precision.
            whole = engine.full_parameter(codebook.weight)
            engine.set_parameter(
                codebook.weight, torch.where(counts[:, None] == 0, restarted.to(whole), whole)
            )
    codebook.reset_usage()
    return {"restarted_codes": float(dead)}
