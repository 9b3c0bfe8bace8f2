"""A DeepSpeed engine as the loop needs it: forward, backward, update, and its state for checkpoints."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from defi_platform.config import TrainConfig
from defi_platform.train.engine.deepspeed_config import accumulation_steps, deepspeed_config
from defi_platform.train.engine.ema import EMA
from defi_platform.train.engine.sharded_state import MOMENTS, ParameterFragment, ShardedState, Span


def prepare_process(use_gpu: bool, threads: int | None, matmul_precision: str = "highest") -> None:
    """Settings that DeepSpeed and torch read once; call it before DeepSpeed is first imported.

    Args:
        use_gpu: as in TrainConfig.
        threads: as in TrainConfig.
        matmul_precision: as in TrainConfig.
    """
    torch.set_float32_matmul_precision(matmul_precision)
    # Torch's default is TF32 for convolutions and not for products; here one setting speaks for both.
    torch.backends.cudnn.allow_tf32 = matmul_precision != "highest"
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if threads:
        torch.set_num_threads(threads)
    # DeepSpeed reports at length what it builds; the loop's own lines would drown in it.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")
    import deepspeed
    import deepspeed.runtime.bf16_optimizer

    # It prints the machine's memory several times, whatever the level of logging.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # The shared-memory all-reduce for CPUs is compiled with g++ at first use (half a minute, and an error
    # where there is no compiler); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class TrainingEngine:
    """A model under DeepSpeed: forward, backward and update, whatever the ZeRO stage and precision.

    Args:
        model: on CPU, in fp32.
        train: batch sizes, precision, ZeRO stage and optimiser settings.
        world_size: ranks of the run.
    """

    def __init__(self, model: nn.Module, train: TrainConfig, world_size: int):
        import deepspeed

        self.accumulation = accumulation_steps(train, world_size)
        self.noise = train.noise
        """cpu | device; see `TrainConfig.noise`."""
        self._stage = train.zero_stage
        settings = deepspeed_config(train, world_size)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=settings)
        for name, buffer in self.module.named_buffers():
            # DeepSpeed casts buffers with the weights; normalisation statistics and counts must stay exact.
            buffer.data = buffers[name].to(buffer.device)
        self._state = ShardedState(self.engine, train.zero_stage)
        self.ema = EMA(self, train.ema_decay) if train.ema_decay else None
        scaler = self._loss_scaler()
        if hasattr(scaler, "raise_error_at_min_scale"):
            # The loop counts skipped updates and knows their samples; DeepSpeed would raise in the middle of one, with
            # the gradients of the bad batch left in place.
            scaler.raise_error_at_min_scale = False

    @property
    def module(self) -> nn.Module:
        """The model itself; under ZeRO 3 its parameters are empty outside of forward and backward."""
        module: nn.Module = self.engine.module
        return module

    @property
    def device(self) -> torch.device:
        """Device that batches have to be on."""
        device: torch.device = self.engine.device
        return device

    def forward(self, batch: dict[str, Any], generators: list[torch.Generator]) -> dict[str, Tensor]:
        """The model's outputs, among them the scalar "loss"."""
        outputs: dict[str, Tensor] = self.engine(batch, generator=generators)
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Adds this micro-batch's gradients; they are averaged over the accumulation and the ranks."""
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> bool:
        """Ends a micro-batch; the last one of a global batch updates the weights.

        Returns: False when DeepSpeed skipped the update because of an overflow (fp16).
        """
        for group in self._state.adam.param_groups:
            group["lr"] = learning_rate
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if not boundary:
            return True
        applied = bool(self.engine.was_step_applied())
        if not applied:
            self._forget_sums()
        elif self.ema:
            self.ema.update()
        return applied

    def is_at_lowest_scale(self) -> bool:
        """True when the loss scale of fp16 can become no lower; False under other precisions."""
        scaler = self._loss_scaler()
        lowest = getattr(scaler, "min_scale", None)
        return lowest is not None and bool(scaler.cur_scale <= lowest)

    def has_finite_weights(self) -> bool:
        """True when this rank's share of the weights has no infinity and nothing that is no number."""
        return all(bool(values.isfinite().all()) for _, _, values in self.master_fragments())

    def grad_norm(self) -> float | None:
        """Norm of the last update's gradient before clipping; None where DeepSpeed does not compute it."""
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    # ----------------------------------------------------------------- state

    def scalars(self) -> dict[str, float]:
        """State that is the same on every rank: Adam's count of updates, fp16's loss scale."""
        steps = [state["step"] for state in self._state.adam.state.values() if "step" in state]
        values = {"adam_step": float(steps[0]) if steps else 0.0}
        scaler = self._loss_scaler()
        for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"):
            if scaler is not None and hasattr(scaler, name):
                values[name] = float(getattr(scaler, name))
        if self.ema:
            values["ema_updates"] = float(self.ema.updates)
        return values

    def master_fragments(self) -> Iterator[tuple[str, int, Tensor]]:
        """(name, start, fp32 values) of this rank's share of the weights, in the order of `fragments`.

        Values are views of the masters where DeepSpeed gives them.
        """
        for fragment in self._state.fragments(moments=False):
            yield fragment.name, fragment.start, fragment.tensors["param"]

    def fragments(self) -> Iterator[ParameterFragment]:
        """This rank's share of the training state; all ranks' together cover each parameter once."""
        for fragment in self._state.fragments(moments=True):
            if self.ema:
                fragment.tensors["ema"] = self.ema.fragment(fragment.name)
            yield fragment

    def restore_share(
        self, scalars: dict[str, float], read: Callable[[list[Span]], Iterable[tuple[Span, Tensor]]]
    ) -> None:
        """Sets this rank's share of the training state, without communication; `end_restore` has to follow on all ranks.

        When `read` raises, the state is of no use until another one is restored.

        Args:
            scalars: of the run that is continued.
            read: gives the elements that it is asked for, float32 and 1-D, in any order and in any parts.
        """
        self._state.make_moments(scalars["adam_step"])
        kinds = ["param", *(MOMENTS if scalars["adam_step"] else ())]
        if self.ema and "ema_updates" in scalars:
            kinds.append("ema")
        spans = [
            Span(kind, name, start, start + len(values))
            for name, start, values in self.master_fragments()
            for kind in kinds
        ]
        for span, values in read(spans):
            if span.kind == "ema" and self.ema:
                self.ema.set(span.name, span.start, values)
            else:
                self._state.set(span, values)

    def end_restore(self, scalars: dict[str, float]) -> None:
        """Makes what `restore_share` has set the state of the whole run (collective).

        Args:
            scalars: of the run that is continued.
        """
        self._state.refresh_working_copies()
        scaler = self._loss_scaler()
        for key, value in scalars.items():
            if scaler is not None and hasattr(scaler, key):
                setattr(scaler, key, value if key == "cur_scale" else int(value))
        if self.ema:
            if "ema_updates" not in scalars:
                # A run that had no average before starts one at the weights it has reached.
                self.ema.start()
            self.ema.updates = int(scalars.get("ema_updates", 0))

    def trained_shapes(self) -> dict[str, torch.Size]:
        """Name -> shape of the whole parameter, of those that are trained."""
        return {name: self._state.shape(parameter) for name, parameter in self._state.trainable()}

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter in fp32 on every rank (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 0 or not parameter.requires_grad:
            return parameter.detach().float().clone()
        shape = self._state.shape(parameter)
        full: Tensor = safe_get_full_fp32_param(parameter)
        return full.flatten()[: shape.numel()].reshape(shape)

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Makes the working copy of the parameter whole, under ZeRO 3 too, inside a `with` (collective)."""
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameter) if self._stage == 3 else nullcontext()

    @torch.no_grad()
    def set_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrites a parameter, masters and working copy, on every rank (collective)."""
        if self.ema:
            self.ema.overwrite(self._name_of(parameter), value)
        if self._stage > 0:
            self._state.set_master(parameter, value)
        self._set_working_copy(parameter, value)

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Makes the model compute with the EMA of its weights inside a `with`; without an EMA it changes nothing.

        Entering and leaving are collective.
        """
        if self.ema is None:
            yield
            return
        originals: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, parameter in self._state.trainable():
                if self._stage < 3:
                    originals[name] = parameter.detach().clone()
                self._set_working_copy(parameter, self.ema.full(name, self._state.shape(parameter)))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._state.trainable():
                    # Under ZeRO 3 a copy of all weights may not fit, but the masters are at hand.
                    original = originals[name] if name in originals else self.full_parameter(parameter)
                    self._set_working_copy(parameter, original)

    @torch.no_grad()
    def _set_working_copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        import deepspeed

        if self._stage == 3:
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    parameter.copy_(value)
        else:
            parameter.copy_(value)

    def _name_of(self, wanted: nn.Parameter) -> str:
        return next(name for name, parameter in self.module.named_parameters() if parameter is wanted)

    def _forget_sums(self) -> None:
        """Forgets the sums of gradients of a skipped update, which DeepSpeed keeps with `offload_optimizer`.

        What is not finite in them would make every later update be skipped as well.
        """
        if self._stage in (1, 2):
            for name in ("averaged_gradients", "all_grad_tensors"):
                sums = getattr(self.engine.optimizer, name, {})
                sums.update(dict.fromkeys(sums))

    def _loss_scaler(self) -> Any:
        """DeepSpeed's, of fp16 and of precisions that scale nothing; None where it has none."""
        return getattr(self.engine.optimizer, "loss_scaler", None)
