"""Recipe of the fused policy: frames and the actions that follow, on top of the two pretrained models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from defi_platform.config import FinetuneConfig
from defi_platform.data.loader.robot_signals import dimensions, statistics
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, Rule
from defi_platform.errors import ConfigError
from defi_platform.train.recipes.video_base import VideoRecipe, folder_config, load_folder, model_errors

if TYPE_CHECKING:
    from defi_models.describe import Cost
    from defi_models.inputs.normalization import Statistics
    from defi_models.policy import DeFIPolicy


class PolicyRecipe(VideoRecipe):
    """Fine-tuning of the policy on labelled episodes."""

    kind = "policy"
    job = "finetune_policy.py"
    config_type = FinetuneConfig
    config: FinetuneConfig
    summed_buffers: Sequence[str] = ("adapter.latent_actions.codebook.usage",)

    def __init__(self, config: FinetuneConfig):
        super().__init__(config)
        if config.data.cache is not None:
            raise ConfigError(
                "fine-tuning reads pictures, not what an encoder made of them. Set data.cache=null."
            )
        self._chunk: int | None = None

    def identity(self) -> dict[str, Any]:
        """The parts that train, in addition to kind, preset and overrides."""
        return super().identity() | {"trainable": self.config.trainable}

    def rule(self) -> Rule:
        """Frames with the chunk of actions that follows them."""
        if self._chunk is None:
            self._chunk = self._model_config().adapter.head.chunk
        return ChunkRule(self._chunk)

    def cost(self) -> Cost:
        """Cost of the policy fused from the two model folders."""
        from defi_models.describe import cost_of
        from defi_models.gfdm import GFDM
        from defi_models.gidm import GIDM
        from defi_models.policy import DeFIPolicy

        gfdm = folder_config(GFDM, self.config.gfdm)
        gidm = folder_config(GIDM, self.config.gidm)
        return cost_of(
            DeFIPolicy.fused_config(self._model_config(), gfdm, gidm),
            recompute=self.config.train.recompute,
            trainable=self.config.trainable,
        )

    def build_without_cache(self) -> nn.Module:
        """Fuses the policy from the two model folders, with statistics of the corpus."""
        from defi_models.gfdm import GFDM
        from defi_models.gidm import GIDM
        from defi_models.policy import DeFIPolicy

        gfdm = load_folder(GFDM.from_pretrained, self.config.gfdm)
        gidm = load_folder(GIDM.from_pretrained, self.config.gidm)
        plan = self.plan("train")
        self._check_signals(plan)
        with model_errors():
            settings = self._model_config()
            self._check_views(settings.views, plan)
            policy = DeFIPolicy.fuse(replace(settings, cameras=plan.cameras_of_views), gfdm, gidm)
            if self.config.model.init_from:
                initial = load_folder(DeFIPolicy.from_pretrained, self.config.model.init_from)
                policy.load_state_dict(initial.state_dict())
            policy.set_trainable(self.config.trainable)
        policy.set_statistics(_as_model_statistics(plan))
        data = self.config.data
        for name in ("height", "width"):
            self.check_size(name, getattr(gfdm.config, name), getattr(data, name), name)
        return policy

    def _model_config(self) -> DeFIPolicy.Config:
        from defi_models import presets

        with model_errors():
            return presets.policy(self.config.model.preset, **self.config.model.overrides)

    def _check_signals(self, plan: Plan) -> None:
        head = self._model_config().adapter.head
        actions, proprio = dimensions(plan)
        if head.action_dim != actions:
            raise ConfigError(
                f"the corpus has actions of {actions} dimensions, the policy's action_dim is {head.action_dim}. "
                f"Set model.overrides.adapter.head.action_dim={actions}."
            )
        if head.proprio_dim not in (0, proprio):
            raise ConfigError(
                f"the corpus has proprioception of {proprio} dimensions, the policy's proprio_dim is "
                f"{head.proprio_dim}. Set model.overrides.adapter.head.proprio_dim={proprio}."
            )

    def _check_views(self, views: int, plan: Plan) -> None:
        if views != plan.views:
            raise ConfigError(
                f"the plan gives {plan.views} cameras per sample, the policy's views is {views}. "
                f"Set model.overrides.views={plan.views}, or choose cameras in data.corpora.NAME.cameras."
            )


def _as_model_statistics(plan: Plan) -> Statistics:
    from defi_models.inputs.normalization import FieldStatistics, Statistics

    fields = {
        name: FieldStatistics(
            mean=one.mean.tolist(), std=one.std.tolist(), min=one.min.tolist(), max=one.max.tolist()
        )
        for name, one in statistics(plan).items()
    }
    return Statistics(action=fields["action"], proprio=fields.get("proprio"))
