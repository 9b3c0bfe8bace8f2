"""The interface between a model and the training loop: building, samples, metrics, evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from defi_models.pretrained.configuration import to_mapping
from defi_platform.config import ModelConfig, PretrainConfig
from defi_platform.config.paths import absolute_paths
from defi_platform.data.sampling.sharding import Shard
from defi_platform.train.segments import Segment

if TYPE_CHECKING:
    from defi_models.describe import Cost
    from defi_platform.train.engine.collectives import Communicator
    from defi_platform.train.engine.deepspeed_engine import TrainingEngine


@dataclass(frozen=True)
class EvalReport:
    """The result of evaluating a model beyond its loss."""

    media: list[str] = field(default_factory=list)
    """Pictures, as paths relative to the run folder."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Numbers for summary.json and the run card."""


class Recipe(ABC):
    """A kind of training. Recipes are sent to the workers, so they hold settings and nothing heavy."""

    kind: str
    """gfdm | gidm | policy: the name in status lines, checkpoints and model folders."""
    job: str = ""
    """Script below jobs/ that runs it; "" where there is none."""
    summed_buffers: Sequence[str] = ()
    """Names of buffers that each rank counts for itself; a checkpoint holds their sum."""

    def __init__(self, config: PretrainConfig):
        # Workers, decoders and actors run in other working directories than the driver.
        self.config = absolute_paths(config)
        self.segments: list[Segment] = [Segment.first(self.config.train)]
        """Of the run; the driver sets those of one that goes on."""
        self.begun_with: dict[str, str] = {}
        """`built_from` of the run, which the driver or a checkpoint knows: models are built from that alone."""

    def identity(self) -> dict[str, Any]:
        """Model and inputs of a run's weights, kept in each checkpoint: a run goes on with the same alone.

        kind, preset and overrides; `config`: the whole configuration of the model, where it is known; `built_from`: config
        key -> digest of what lies there, for every folder that the weights depend on.

        Raises: UserError for a folder that cannot be read.
        """
        model = self.config.model
        named = {"kind": self.kind, "preset": model.preset, "overrides": model.overrides}
        return named | self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        # Kept, and sent to the workers with the recipe: the driver alone reads the folders for it.
        config = self.model_config()
        return ({} if config is None else {"config": to_mapping(config)}) | {"built_from": self.built_from()}

    def model_config(self, model: ModelConfig | None = None) -> Any:
        """The model's own configuration, before sizes that follow from data; None where there is none.

        Args:
            model: settings that it is made from; None: the run's.
        """
        return None

    def built_from(self) -> dict[str, str]:
        """Config key -> digest of what lies there, for the folders that the weights depend on."""
        return {}

    @abstractmethod
    def build(self) -> nn.Module:
        """Builds the model on CPU, in fp32, the same on every rank; `forward(batch, generator=)` returns "loss"."""

    def encode_texts(self, model: nn.Module, communicator: Communicator) -> None:  # noqa: B027 - optional
        """Encodes the texts of the corpora ahead, where a store for them is configured (collective).

        Args:
            model: as `build` gives it.
            communicator: of this rank.
        """

    def read_texts(self, model: nn.Module) -> None:  # noqa: B027 - optional
        """Has a model that is to be evaluated read what `encode_texts` has stored; nothing is written.

        Args:
            model: in fp32, on any device.
        """

    def configure_model(self, model: Any) -> None:
        """Applies the settings of `train` that change how the model computes, before it trains."""
        if self.config.train.recompute:
            model.set_recompute(True)
        if self.config.train.compile:
            model.compile_parts()

    @abstractmethod
    def plan(self, split: str) -> Any:
        """The plan of the train or validation split."""

    def fingerprint(self, plan: Any) -> str:
        """A hash that changes when any sample of the plan may; "" where none is known."""
        return ""

    def data_version(self) -> dict[str, dict[str, str]]:
        """Versions of the manifests that the run reads, kept in each checkpoint; {} where there are none."""
        return {}

    @abstractmethod
    def stream(self, plan: Any, shard: Shard) -> Iterable[dict[str, Any]]:
        """Micro-batches of one rank's share of a plan, as `defi_platform.data.loader.stream.stream` gives them."""

    def validation_stream(self, plan: Any, start: int, stop: int, size: int) -> Iterable[dict[str, Any]]:
        """Batches of samples start..stop - 1 of the validation plan, few enough to be loaded in this process.

        Args:
            plan: of the validation split.
            start: first sample number.
            stop: sample number after the last one.
            size: samples per batch.
        """
        return self.stream(plan, Shard.single(start, stop, size))

    def cost(self) -> Cost | None:
        """Parameters, operations and activations of the model; None where they are not known."""
        return None

    def describe_data(self) -> list[str]:
        """Lines about the data for a dry run. Raises: UserError when data is missing."""
        return []

    def check(self) -> None:  # noqa: B027 - optional
        """Checks the settings against data and models, as far as they are known. Raises: UserError."""

    def prepare(self) -> None:  # noqa: B027 - optional
        """Prepares what the plan needs; called once by the driver before workers start."""

    def after_update(self, engine: TrainingEngine, step: int) -> dict[str, float]:
        """Acts on every rank after an update.

        Args:
            engine: with the model.
            step: number of the update, from 1.

        Returns: metrics to log with this step.
        """
        return {}

    def validation_counts(self, outputs: dict[str, Tensor]) -> Tensor | None:
        """Counts of one validation batch, of any shape, that are summed over batches and ranks; None: none."""
        return None

    def validation_metrics(self, counts: Tensor) -> dict[str, Any]:
        """Metrics from the summed counts of `validation_counts`; a text named `alarm` among them is printed."""
        return {}

    @property
    def evaluated_samples(self) -> int:
        """Held-out samples that `evaluate` takes."""
        return 0

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        """Evaluates the model of a checkpoint beyond its loss.

        The last checkpoint is evaluated on rank 0, earlier ones by the asynchronous validation task.

        Args:
            model: in fp32, in evaluation mode, on the device that is to compute.
            batch: the first `evaluated_samples` of the validation split, on CPU; {} where these are 0.
            folder: run folder, to write pictures below.
            step: of the checkpoint.
        """
        return EvalReport()

    def summary(self, validation: dict[str, Any]) -> dict[str, Any]:
        """Values for summary.json in addition to the loop's, from the last validation."""
        return {}

    def skipped(self) -> dict[str, int]:
        """Number of rejected videos so far, by reason."""
        return {}
