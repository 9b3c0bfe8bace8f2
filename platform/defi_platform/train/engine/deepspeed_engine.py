"""A DeepSpeed engine as the loop needs it, and its training state as fragments of named parameters.

DeepSpeed's own checkpoints fit one world size and one ZeRO stage. Here each rank hands out the fragments of
parameters and of Adam's moments that it owns, each with its offset in the full parameter, without any
communication. Put together they restore any other world size and stage.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defi_platform.config import TrainConfig
from defi_platform.train.engine.ema import EMA

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state per parameter, by torch's names."""


@dataclass(frozen=True)
class ParameterFragment:
    """Consecutive elements of one flattened parameter, owned by this rank."""

    name: str
    start: int
    tensors: dict[str, Tensor]
    """"param" (fp32 master weights), after the first update each of MOMENTS, and "ema" where there is one; all 1-D,
    same length."""


def prepare_process(use_gpu: bool, threads: int | None) -> None:
    """Settings that DeepSpeed and torch read once; call it before DeepSpeed is first imported."""
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    if threads:
        torch.set_num_threads(threads)
    # DeepSpeed reports at length what it builds; the loop's own lines would drown in it.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")
    import deepspeed

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

        self.accumulation = train.global_batch // (train.micro_batch * world_size)
        self._stage = train.zero_stage
        self._fp32 = train.precision == "fp32"
        self._world_size = world_size
        zero: dict[str, Any] = {"stage": train.zero_stage}
        if train.zero_stage == 1:
            # Copying each gradient into one buffer as it comes helps stage 2, which frees them; here it only costs,
            # on small models a tenth of the step.
            zero["contiguous_gradients"] = False
        if train.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": train.use_gpu}
        settings: dict[str, Any] = {
            # Offloading takes torch's AdamW too: DeepSpeed's own is compiled with g++ at first use.
            "zero_force_ds_cpu_optimizer": False,
            "train_batch_size": train.global_batch,
            "train_micro_batch_size_per_gpu": train.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": train.clip_grad_norm,
            "zero_optimization": zero,
            "steps_per_print": 2**62,
            "optimizer": {
                "type": "AdamW",
                "params": {
                    # The rate is set before every update. It is 0 here because some ZeRO versions run an
                    # update while they set up, which would decay the weights.
                    "lr": 0.0,
                    "betas": list(train.betas),
                    "weight_decay": train.weight_decay,
                    "torch_adam": True,
                },
            },
        }
        if not self._fp32:
            settings[train.precision] = {"enabled": True}
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.engine, *_ = deepspeed.initialize(model=model, model_parameters=trainable, config=settings)
        for name, buffer in self.module.named_buffers():
            # DeepSpeed casts buffers with the weights; normalisation statistics and counts must stay exact.
            buffer.data = buffers[name].to(buffer.device)
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
        for group in self._adam().param_groups:
            group["lr"] = learning_rate
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if not boundary:
            return True
        applied = bool(self.engine.was_step_applied())
        if applied and self.ema:
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
        steps = [state["step"] for state in self._adam().state.values() if "step" in state]
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
        for fragment in self._fragments(moments=False):
            yield fragment.name, fragment.start, fragment.tensors["param"]

    def fragments(self) -> Iterator[ParameterFragment]:
        """This rank's share of the training state; all ranks' together cover each parameter once."""
        for fragment in self._fragments(moments=True):
            if self.ema:
                fragment.tensors["ema"] = self.ema.fragment(fragment.name)
            yield fragment

    def _fragments(self, moments: bool) -> Iterator[ParameterFragment]:
        rank = torch.distributed.get_rank()
        for number, (name, parameter) in enumerate(self._trainable()):
            if self._stage == 0:
                if number % self._world_size == rank:
                    state = self._adam().state.get(parameter, {}) if moments else {}
                    yield ParameterFragment(
                        name, 0, _flat(parameter, {m: state[m] for m in MOMENTS if m in state})
                    )
            elif self._stage == 3:
                yield from self._stage_3_fragment(name, parameter, rank, moments)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                available = (mapping.optim_fragment or {}) if moments else {}
                values = {m: mapping.get_hp_fragment(m) for m in MOMENTS if m in available}
                tensors = _flat(mapping.get_hp_fragment(), values)
                yield ParameterFragment(name, mapping.lp_fragment_address.start, tensors)

    def restore(self, scalars: dict[str, float], read: Callable[[str, str], Tensor]) -> None:
        """Sets master weights and optimiser state.

        The model must have been given the same weights before this engine was made around it, because
        DeepSpeed refreshes the working copies from the masters at the next update only.

        Args:
            scalars: of the run that is continued.
            read: (parameter name, "param", one of MOMENTS or "ema") -> the full tensor, float32.
        """
        if scalars["adam_step"]:
            self._make_moments(scalars["adam_step"])
        for name, parameter in self._trainable():
            if self._stage == 0:
                for moment in MOMENTS if scalars["adam_step"] else ():
                    self._adam().state[parameter][moment].copy_(read(name, moment))
                continue
            self._set_state(parameter, "param", read(name, "param"))
            for moment in MOMENTS if scalars["adam_step"] else ():
                self._set_state(parameter, moment, read(name, moment))
        scaler = self._loss_scaler()
        for key, value in scalars.items():
            if scaler is not None and hasattr(scaler, key):
                setattr(scaler, key, value if key == "cur_scale" else int(value))
        if self.ema:
            # A run that had no average before starts one at the weights it has reached.
            kind = "ema" if "ema_updates" in scalars else "param"
            self.ema.restore(int(scalars.get("ema_updates", 0)), lambda name: read(name, kind))

    def full_parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter in fp32 on every rank (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 0 or not parameter.requires_grad:
            return parameter.detach().float().clone()
        shape = self._shape(parameter)
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
            self._set_state(parameter, "param", value)
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
            for name, parameter in self._trainable():
                if self._stage < 3:
                    originals[name] = parameter.detach().clone()
                self._set_working_copy(parameter, self.ema.full(name, self._shape(parameter)))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._trainable():
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

    # ----------------------------------------------------------------- DeepSpeed's internals

    def _adam(self) -> torch.optim.Optimizer:
        wrapped = self.engine.optimizer
        adam: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return adam

    def _loss_scaler(self) -> Any:
        """DeepSpeed's, of fp16 and of precisions that scale nothing; None where it has none."""
        return getattr(self.engine.optimizer, "loss_scaler", None)

    def _trainable(self) -> Iterator[tuple[str, Any]]:  # DeepSpeed adds attributes to parameters
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        return getattr(parameter, "ds_shape", parameter.shape)

    def _stage_3_fragment(
        self, name: str, parameter: Any, rank: int, moments: bool
    ) -> Iterator[ParameterFragment]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        master = safe_get_local_fp32_param(parameter)
        start = rank * master.numel()
        # The last ranks' partitions are padded beyond the parameter's end.
        length = min(master.numel(), parameter.ds_numel - start)
        if length <= 0:
            return
        tensors = {"param": master}
        if moments and self._adam().state:
            for moment in MOMENTS:
                tensors[moment] = safe_get_local_optimizer_state(parameter, moment)
        yield ParameterFragment(name, start, {key: value[:length].detach() for key, value in tensors.items()})

    def _set_state(self, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
        """Sets this rank's part of "param" (the masters) or of a moment from the whole tensor; ZeRO 1 to 3."""
        from deepspeed import utils

        value = value.to(self.device, torch.float32)
        if self._stage < 3:
            if kind == "param":
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        # DeepSpeed's own setters of whole tensors fail where the last ranks' partitions are padded.
        size = utils.safe_get_local_fp32_param(parameter).numel()
        start = torch.distributed.get_rank() * size
        own = value.flatten()[start : start + size]
        padded = torch.cat([own, own.new_zeros(size - len(own))])
        if kind == "param":
            utils.safe_set_local_fp32_param(parameter, padded)
        else:
            utils.safe_set_local_optimizer_state(parameter, padded, kind)

    def _make_moments(self, adam_step: float) -> None:
        """Adam makes its state at the first update; a resumed run needs it before."""
        optimizer = self.engine.optimizer
        if self._stage == 3:
            flat = optimizer.fp32_partitioned_groups_flat
        else:
            flat = [tensor for group in self._adam().param_groups for tensor in group["params"]]
        for tensor in flat:
            self._adam().state[tensor] = {
                "step": torch.tensor(adam_step),
                **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
            }
        if self._stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()


def _flat(master: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {"param": master, **moments}
    return {key: value.detach().float().flatten() for key, value in tensors.items()}
