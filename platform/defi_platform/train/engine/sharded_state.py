"""Training state of one rank: its share of masters and moments in DeepSpeed's objects, as runs of elements by name.

DeepSpeed's own checkpoints fit one world size and one ZeRO stage. Here each rank hands out, and takes back, the
fragments of parameters and of Adam's moments that it owns, each with its offset in the full parameter, without any
communication. Put together they restore any other world size and stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor, nn

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


class Span(NamedTuple):
    """Elements [start, stop) of one kind of state of one flattened parameter."""

    kind: str
    """"param", one of MOMENTS, "ema" or "buffer"."""
    name: str
    start: int
    stop: int


def fill(tensor: Tensor, start: int, values: Tensor) -> None:
    """Overwrites the elements of a tensor from `start` on, counted as if it were flat, whatever its memory format.

    Args:
        tensor: of any shape and device.
        start: first element.
        values: 1-D.
    """
    tensor = tensor.detach()
    flat = tensor.flatten()
    flat[start : start + len(values)].copy_(values)
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


class ShardedState:
    """Masters and moments that one rank holds of a model under DeepSpeed.

    Args:
        engine: DeepSpeed's.
        stage: of ZeRO.
    """

    def __init__(self, engine: Any, stage: int):
        self._engine, self._stage = engine, stage
        self._rank, self._world_size = distributed.get_rank(), distributed.get_world_size()
        self._parameters = dict(self.trainable())

    @property
    def adam(self) -> torch.optim.Optimizer:
        """Optimiser that DeepSpeed has wrapped."""
        wrapped = self._engine.optimizer
        adam: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return adam

    def trainable(self) -> Iterator[tuple[str, Any]]:  # DeepSpeed adds attributes to parameters
        """(name, parameter) of what is trained."""
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    @staticmethod
    def shape(parameter: nn.Parameter) -> torch.Size:
        """Shape of the whole parameter; under ZeRO 3 it is empty itself."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def fragments(self, moments: bool) -> Iterator[ParameterFragment]:
        """This rank's share of the masters, with those of the moments that there are where they are asked for."""
        for number, (name, parameter) in enumerate(self._parameters.items()):
            if self._stage == 0:
                if number % self._world_size == self._rank:
                    state = self.adam.state.get(parameter, {}) if moments else {}
                    yield ParameterFragment(
                        name, 0, _flat(parameter, {m: state[m] for m in MOMENTS if m in state})
                    )
            elif self._stage == 3:
                yield from self._stage_3_fragment(name, parameter, moments)
            elif parameter._hp_mapping is not None:
                mapping = parameter._hp_mapping
                available = (mapping.optim_fragment or {}) if moments else {}
                values = {m: mapping.get_hp_fragment(m) for m in MOMENTS if m in available}
                tensors = _flat(mapping.get_hp_fragment(), values)
                yield ParameterFragment(name, mapping.lp_fragment_address.start, tensors)

    def make_moments(self, adam_step: float) -> None:
        """Makes Adam's state, which it makes itself at the first update, with moments of 0.

        Args:
            adam_step: updates so far.
        """
        for state in filter(None, self.adam.state.values()):
            state["step"].fill_(adam_step)
            for moment in MOMENTS:
                state[moment].zero_()
        if self.adam.state or not adam_step:
            return
        optimizer = self._engine.optimizer
        if self._stage == 3:
            flat = optimizer.fp32_partitioned_groups_flat
        else:
            flat = [tensor for group in self.adam.param_groups for tensor in group["params"]]
        fused = any(group.get("fused") for group in self.adam.param_groups)
        for tensor in flat:
            self.adam.state[tensor] = {
                # One kernel updates all, so it cannot wait for a count on the host.
                "step": torch.tensor(adam_step, device=tensor.device if fused else "cpu"),
                **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
            }
        if self._stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def set(self, span: Span, values: Tensor) -> None:
        """Overwrites elements that this rank owns of "param" (the masters) or of a moment.

        Args:
            span: which ones.
            values: float32, 1-D.
        """
        parameter = self._parameters[span.name]
        moment = None if span.kind == "param" else span.kind
        if self._stage == 0:
            fill(self.adam.state[parameter][moment] if moment else parameter, span.start, values)
        elif self._stage < 3:
            mapping = parameter._hp_mapping
            start = span.start - mapping.lp_fragment_address.start
            mapping.get_hp_fragment(moment)[start : start + len(values)].copy_(values)
        else:
            self._set_stage_3(parameter, moment, span.start, values)

    @torch.no_grad()
    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Sets this rank's part of one master from the whole tensor; ZeRO 1 to 3."""
        from deepspeed import utils

        value = value.detach().to(self._engine.device, torch.float32)
        if self._stage < 3:
            utils.safe_set_full_fp32_param(parameter, value)
            return
        # DeepSpeed's own setter of whole tensors fails where the last ranks' partitions are padded.
        size = utils.safe_get_local_fp32_param(parameter).numel()
        self._set_stage_3(parameter, None, self._rank * size, value.flatten()[self._rank * size :][:size])

    @torch.no_grad()
    def refresh_working_copies(self) -> None:
        """Gives all ranks the weights, and at stage 0 the moments, that each has set of its share (collective).

        DeepSpeed would do so at the next update only.
        """
        if self._stage == 0:
            for number, parameter in enumerate(self._parameters.values()):
                state = self.adam.state.get(parameter, {})
                for tensor in (parameter.data, *(state[m] for m in MOMENTS if m in state)):
                    self._broadcast(tensor, number % self._world_size)
        elif self._stage < 3:
            self._engine.optimizer.update_lp_params()
        else:
            from deepspeed.utils import safe_get_local_fp32_param

            for parameter in self._parameters.values():
                parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))

    def _broadcast(self, tensor: Tensor, owner: int) -> None:
        if self._world_size > 1:
            whole = tensor.contiguous()
            distributed.broadcast(whole, src=owner)
            tensor.copy_(whole)

    def _stage_3_fragment(self, name: str, parameter: Any, moments: bool) -> Iterator[ParameterFragment]:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        master = safe_get_local_fp32_param(parameter)
        start = self._rank * master.numel()
        # The last ranks' partitions are padded beyond the parameter's end.
        length = min(master.numel(), parameter.ds_numel - start)
        if length <= 0:
            return
        tensors = {"param": master}
        if moments and self.adam.state:
            for moment in MOMENTS:
                tensors[moment] = safe_get_local_optimizer_state(parameter, moment)
        yield ParameterFragment(name, start, {key: value[:length].detach() for key, value in tensors.items()})

    def _set_stage_3(self, parameter: Any, moment: str | None, start: int, values: Tensor) -> None:
        from deepspeed import utils

        if moment:
            part = utils.safe_get_local_optimizer_state(parameter, moment)
        else:
            part = utils.safe_get_local_fp32_param(parameter)
        first = start - self._rank * part.numel()
        part[first : first + len(values)].copy_(values)
        # With the optimiser offloaded `part` is a copy of the host's.
        if moment:
            utils.safe_set_local_optimizer_state(parameter, part, moment)
        else:
            utils.safe_set_local_fp32_param(parameter, part)


def _flat(master: Tensor, moments: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {"param": master, **moments}
    return {key: value.detach().float().flatten() for key, value in tensors.items()}
