"""Recipe of GIDM: latent actions between pairs of frames, and their codebook."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from defi_platform.config import DataConfig, ModelConfig, PretrainConfig, ProbeConfig
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import PairRule, Rule
from defi_platform.errors import ConfigError
from defi_platform.train.engine.seeds import seed_of
from defi_platform.train.recipe import EvalReport
from defi_platform.train.recipes.video_base import VideoRecipe, model_errors, starting_config, texts_of
from defi_platform.train.validation.codebook_use import USAGE, code_usage, position_counts
from defi_platform.train.validation.linear_probe import (
    CONTROL,
    SPLITS,
    TRAINED,
    linear_probe,
    probe_data,
    samples_of,
    summary_lines,
)

if TYPE_CHECKING:
    from defi_models.describe import Cost
    from defi_models.gidm import GIDM
    from defi_models.layers.codebook import Codebook
    from defi_platform.train.engine.deepspeed_engine import TrainingEngine


class GIDMRecipe(VideoRecipe):
    """Pretraining of the inverse dynamics model."""

    kind = "gidm"
    job = "pretrain_gidm.py"
    summed_buffers: Sequence[str] = ("encoder.codebook.usage",)

    def __init__(self, config: PretrainConfig):
        super().__init__(config)
        if (every := config.train.async_validation_every) and not self._probe:
            name = "train.async_validation_every"
            raise ConfigError(
                f"gidm: {name}={every} without train.probe: during training, GIDM is only probed for actions. Name a "
                f"labelled corpus (train.probe.corpora.NAME.path=FOLDER), or set {name}=0."
            )

    def rule(self) -> Rule:
        """Pairs of frames `data.pair_interval_s` apart."""
        return PairRule.of(self.config.data)

    def model_config(self, model: ModelConfig | None = None) -> GIDM.Config:
        """The GIDM that training starts from."""
        from defi_models import presets
        from defi_models.gidm import GIDM

        config: GIDM.Config = starting_config(GIDM, presets.gidm, model or self.config.model)
        return config

    def cost(self) -> Cost:
        """Cost of the configured GIDM."""
        from defi_models.describe import cost_of

        config = self.model_config()
        return cost_of(config, recompute=self.config.train.recompute, height=self.config.data.height)

    def build_without_cache(self) -> nn.Module:
        """Builds GIDM from its folder or preset."""
        from defi_models import presets
        from defi_models.gidm import GIDM

        model = self.config.model
        with model_errors():
            if model.init_from:
                return self.load(GIDM.from_pretrained, "model.init_from", model.init_from)
            return GIDM(presets.gidm(model.preset, **model.overrides))

    def after_update(self, engine: TrainingEngine, step: int) -> dict[str, float]:
        """Restarts unused codes when due."""
        every = self.config.train.restart_dead_codes_every
        codebook = cast("Codebook | None", engine.module.codebook)
        if codebook is None or not every or step % every:
            return {}
        return restart_dead_codes(engine, codebook, seed_of(self.config.train.seed, "restart", step))

    def validation_counts(self, outputs: dict[str, Tensor]) -> Tensor | None:
        """(K, codes) number of times each code was chosen at each position; None without a codebook."""
        if "indices" not in outputs:
            return None
        return position_counts(outputs["indices"], self._codes)

    def validation_metrics(self, counts: Tensor) -> dict[str, Any]:
        """Usage of the codebook, with an `alarm` where it has collapsed."""
        return code_usage(counts)

    def prepare(self) -> None:
        """Ingests the corpora, those of the probe included."""
        super().prepare()
        if self._probe:
            self._pinned.ingest(self.config.train.output, "probe", probe_data(self._probe, self.config.data))

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        """Probes latents and tokens of the trained and of an untrained encoder, where a labelled corpus is given.

        Args:
            model: GIDM, in evaluation mode.
            batch: unused.
            folder: unused.
            step: unused.
        """
        if not self._probe:
            return EvalReport()
        torch.manual_seed(seed_of(self.config.train.seed, "probe"))
        encoders = {TRAINED: model, CONTROL: self.untrained(model)}
        manifest, data = self._probed(self._probe)
        found = linear_probe(
            cast("dict[str, GIDM]", encoders),
            manifest,
            data,
            self._probe,
            PairRule.of(self.config.data),
            self.config.train.seed,
        )
        for line in summary_lines(found):
            print(f"{self.kind}: {line}", flush=True)
        return EvalReport(figures={"probe": found})

    def evaluated_texts(self) -> list[str]:
        """The different texts of the pairs that are probed, in both splits."""
        if not self._probe:
            return []
        (manifest, data), rule, seed = (
            self._probed(self._probe),
            PairRule.of(self.config.data),
            self.config.train.seed,
        )
        found: dict[str, None] = {}
        for split in SPLITS:
            plan = Plan.of(manifest, data, rule, seed, split)
            found |= dict.fromkeys(texts_of(plan, samples_of(self._probe)))
        return list(found)

    def _probed(self, probe: ProbeConfig) -> tuple[Manifest, DataConfig]:
        """The labelled corpora, in the run's version of their manifest."""
        data = probe_data(probe, self.config.data)
        return self._pinned.open(self.config.train.output, "probe", data), data

    @staticmethod
    def untrained(model: nn.Module) -> nn.Module:
        """A model with the same frozen backbones, and random weights in encoder and decoder."""
        from defi_models.gidm import GIDM

        trained = cast("GIDM", model)
        fresh = GIDM(trained.config, patch_encoder=trained.patch_encoder, text_encoder=trained.text_encoder)
        return fresh.to(next(trained.parameters()).device).eval()

    @property
    def _probe(self) -> ProbeConfig | None:
        probe = self.config.train.probe
        return probe if probe and probe.corpora else None

    def summary(self, validation: dict[str, Any]) -> dict[str, Any]:
        """Codebook usage, in addition to the values of all video recipes."""
        return super().summary(validation) | {name: validation[name] for name in USAGE if name in validation}

    @cached_property
    def _codes(self) -> int:
        return int(self.model_config().encoder.codebook.size)


def restart_dead_codes(engine: TrainingEngine, codebook: Codebook, seed: int) -> dict[str, float]:
    """Replaces the codes that no rank has used since the last restart, identically on every rank.

    Args:
        engine: with the model.
        codebook: of that model.
        seed: of the choice of new codes.

    Returns: the number of replaced codes, as a metric.
    """
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
