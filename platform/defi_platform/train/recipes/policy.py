"""Recipe of the fused policy: frames and the actions that follow, on top of the two pretrained models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from defi_models.errors import ConfigurationError
from defi_models.inputs.acting import Acting
from defi_models.inputs.action_contract import ActionContract
from defi_models.pretrained.side_files import acting_with
from defi_platform.config import FinetuneConfig, ModelConfig
from defi_platform.config.data import drawn_corpora
from defi_platform.data.loader.action_contract import common, configured, contract_of
from defi_platform.data.loader.robot_signals import state_layout, statistics
from defi_platform.data.manifest.commit_marker import read_committed
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, Rule
from defi_platform.errors import ConfigError
from defi_platform.train.recipes.policy_sizes import DataSizes, sizes_before_ingest, sizes_of, with_sizes
from defi_platform.train.recipes.text_store_use import TextEncoder
from defi_platform.train.recipes.unseen_validation import unseen_by, unseen_line
from defi_platform.train.recipes.video_base import (
    VideoRecipe,
    digest_of,
    folder_config,
    model_errors,
)

if TYPE_CHECKING:
    from defi_models.describe import Cost
    from defi_models.gfdm import GFDM
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
        if every := config.train.async_validation_every:
            name = "train.async_validation_every"
            raise ConfigError(
                f"policy: {name}={every}, but a policy is not measured beyond its validation loss while it trains "
                f"(jobs/evaluate_policy.py measures what it exports). Set {name}=0."
            )
        self._chunk: int | None = None
        self._sizes: DataSizes | None = None

    def identity(self) -> dict[str, Any]:
        """The parts that train, in addition to kind, preset and overrides."""
        return super().identity() | {"trainable": self.config.trainable}

    def built_from(self) -> dict[str, str]:
        """Digests of the two pretrained models, in addition to those of every video recipe."""
        pretrained = {"gfdm": self.config.gfdm, "gidm": self.config.gidm}
        return super().built_from() | {key: digest_of(folder) for key, folder in pretrained.items()}

    def model_config(self, model: ModelConfig | None = None) -> DeFIPolicy.Config:
        """The policy of the preset; what it takes from the data and the two pretrained models is laid over it."""
        from defi_models import presets

        model = model or self.config.model
        with model_errors():
            return presets.policy(model.preset, **model.overrides)

    def rule(self) -> Rule:
        """Frames with the chunk of actions that follows them."""
        if self._chunk is None:
            self._chunk = self.model_config().adapter.head.chunk
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

        gfdm = self.load(GFDM.from_pretrained, "gfdm", self.config.gfdm)
        gidm = self.load(GIDM.from_pretrained, "gidm", self.config.gidm)
        plan = self.plan("train")
        self._sizes = self._sizes or sizes_of(plan)
        self._check_pictures(gfdm.config)
        with model_errors():
            policy = DeFIPolicy.fuse(self._model_config(), gfdm, gidm)
            if self.config.model.init_from:
                initial = self.load(
                    DeFIPolicy.from_pretrained, "model.init_from", self.config.model.init_from
                )
                policy.load_state_dict(initial.state_dict())
            policy.set_trainable(self.config.trainable)
        policy.contract = self._contract(plan)
        if policy.config.normalization != "none":
            policy.set_statistics(_as_model_statistics(plan))
        with _acting_errors():
            policy.set_acting(self._acting(policy.acting))
        return policy

    def text_encoders(self, model: Any) -> list[TextEncoder]:
        """GFDM's, whose goal the action head reads, and GIDM's."""
        return [(model.gfdm.text_encoder, ("states", "goal")), (model.gidm_text, ("states",))]

    def prepare(self) -> None:
        """Ingests the corpora and checks that the policy fits them."""
        super().prepare()
        plan = self.plan("train")
        self._sizes = sizes_of(plan)
        self._contract(plan)
        if self._model_config().normalization != "none":
            statistics(plan)  # kept beside the manifest, where every rank finds them
        print(f"{self.kind}: {unseen_line(self.config)}", flush=True)

    def summary(self, validation: dict[str, Any]) -> dict[str, Any]:
        """Whether its validation is on episodes that the pretrainings never saw, in addition to the values of all."""
        return super().summary(validation) | {"validation_unseen_by": unseen_by(self.config)}

    def check(self) -> None:
        """Checks the policy against its corpora, as far as they are known, and against the two model folders."""
        from defi_models.gfdm import GFDM

        data = self.config.data
        self.rule()  # says what is wrong with the chunk
        drawn = drawn_corpora(data)
        if drawn and all(read_committed(data.manifest, name) for name in drawn):
            self._sizes = sizes_of(self.plan("train"))
        elif self.config.dry_run:
            self._sizes = sizes_before_ingest(data)
        head = self._model_config().adapter.head
        if self._sizes is not None:
            configured(ActionContract(), self.config.actions, head.action_dim, head.chunk)
        statistics_come = self._model_config().normalization != "none"
        acting = self._acting(Acting(steps=head.sampling_steps, sigma_min=head.sigma_min))
        if self._sizes is not None and not (acting.clip == "statistics" and statistics_come):
            with _acting_errors():
                acting.check(head.action_dim, head.sigma_max, None)
        if self.config.dry_run:
            self._check_pictures(folder_config(GFDM, self.config.gfdm))

    def describe_data(self) -> list[str]:
        """As of every recipe, and the sizes that the policy takes from the data."""
        sizes = (
            self._sizes.text()
            if self._sizes
            else "sizes of actions, states and views: known after the ingest"
        )
        return [*super().describe_data(), sizes, unseen_line(self.config)]

    def _model_config(self) -> DeFIPolicy.Config:
        config = self.model_config()
        return config if self._sizes is None else with_sizes(config, self.config.model, self._sizes)

    def _acting(self, usual: Acting) -> Acting:
        """Settings of acting: the usual ones, with the configuration over them."""
        changes = {name: value for name, value in asdict(self.config.acting).items() if value is not None}
        with _acting_errors():
            return acting_with(usual, changes)

    def _check_pictures(self, gfdm: GFDM.Config) -> None:
        for name in ("height", "width"):
            self.check_size(name, getattr(gfdm, name), getattr(self.config.data, name), name)

    def _contract(self, plan: Plan) -> ActionContract:
        """The meaning of the actions: what all corpora that are drawn from say, and the configuration over it."""
        said = {}
        for row in plan.one_row_per_corpus():
            video = plan.manifest.row(row)
            root = self.config.data.corpora[video["corpus"]].path
            said[video["corpus"]] = contract_of(video["source"], root, video["fps"])
        head = self._model_config().adapter.head
        contract = configured(common(list(said.values())), self.config.actions, head.action_dim, head.chunk)
        return replace(contract, state=state_layout(plan))


@contextlib.contextmanager
def _acting_errors() -> Iterator[None]:
    """Errors of `acting` name their key themselves."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigError(str(error)) from error


def _as_model_statistics(plan: Plan) -> Statistics:
    from defi_models.inputs.normalization import FieldStatistics, Statistics

    fields = {
        name: FieldStatistics(
            mean=one.mean.tolist(), std=one.std.tolist(), min=one.min.tolist(), max=one.max.tolist()
        )
        for name, one in statistics(plan).items()
    }
    return Statistics(action=fields["action"], proprio=fields.get("proprio"))
