"""What a model brings to the loop: how it is built, which samples it sees, what is watched besides its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from defi_platform.config import PretrainConfig
from defi_platform.data.sampling.sharding import Shard

if TYPE_CHECKING:
    from defi_models.describe import Cost
    from defi_platform.train.engine.deepspeed_engine import TrainingEngine


@dataclass(frozen=True)
class EvalReport:
    """What a recipe found out about its finished model."""

    media: list[str] = field(default_factory=list)
    """Pictures, as paths relative to the run folder."""
    figures: dict[str, Any] = field(default_factory=dict)
    """For summary.json and the run card."""


class Recipe(ABC):
    """One of the trainings. Recipes are sent to the workers, so they hold settings and nothing heavy."""

    kind: str
    """gfdm | gidm | policy: the name in status lines, checkpoints and model folders."""
    summed_buffers: Sequence[str] = ()
    """Names of buffers that each rank counts for itself; a checkpoint holds their sum."""

    def __init__(self, config: PretrainConfig):
        self.config = config

    def identity(self) -> dict[str, Any]:
        """What makes two runs' weights interchangeable; kept in each checkpoint."""
        model = self.config.model
        return {"kind": self.kind, "preset": model.preset, "overrides": model.overrides}

    @abstractmethod
    def build(self) -> nn.Module:
        """The model on CPU, in fp32, the same on every rank; `forward(batch, generator=)` gives "loss"."""

    def configure_model(self, model: Any) -> None:
        """Applies what `train` says about how the model computes, before it trains."""
        if self.config.train.recompute:
            model.set_recompute(True)
        if self.config.train.compile:
            model.compile_parts()

    @abstractmethod
    def plan(self, split: str) -> Any:
        """The plan of the train or validation split."""

    def fingerprint(self, plan: Any) -> str:
        """Changes when any sample of the plan could; "" where there is no telling."""
        return ""

    @abstractmethod
    def stream(self, plan: Any, shard: Shard) -> Iterable[dict[str, Any]]:
        """Micro-batches of one rank's share of a plan, as `defi_platform.data.loader.stream.stream` gives them."""

    def validation_stream(self, plan: Any, start: int, stop: int, size: int) -> Iterable[dict[str, Any]]:
        """The few batches of samples start..stop of the validation plan that training waits for."""
        return self.stream(plan, Shard.single(start, stop, size))

    def cost(self) -> Cost | None:
        """Parameters, operations and activations of the model; None where they are not known."""
        return None

    def describe_data(self) -> list[str]:
        """What a dry run tells about the data. Raises: UserError when a run would find it missing."""
        return []

    def prepare(self) -> None:  # noqa: B027 - optional
        """Done once by the driver before workers start: whatever the plan needs."""

    def after_update(self, engine: TrainingEngine, step: int) -> dict[str, float]:
        """Called on every rank after update number `step` (from 1).

        Returns: what to log with this step.
        """
        return {}

    def validation_counts(self, outputs: dict[str, Tensor]) -> Tensor | None:
        """Counts (1-D) of one validation batch that are summed over batches and ranks."""
        return None

    def validation_metrics(self, counts: Tensor) -> dict[str, Any]:
        """Metrics from the summed counts."""
        return {}

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        """What is found out about the model of a checkpoint: of the last one on rank 0, of those before it by a task
        beside training.

        Args:
            model: in fp32, in evaluation mode, on the device that is to compute.
            batch: of the validation split, on CPU.
            folder: run folder, to write pictures below.
        """
        return EvalReport()

    def summary(self, validation: dict[str, Any]) -> dict[str, Any]:
        """What summary.json tells besides the loop's own figures, from the last validation."""
        return {}

    def skipped(self) -> dict[str, int]:
        """Videos left out so far, by reason."""
        return {}
