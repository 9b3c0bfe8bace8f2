"""What a run needs on each GPU and sends over the network, from sizes alone.

P parameters, T of them trained, W workers. Bytes per worker; what ZeRO divides is rounded up. The formulas hold for
DeepSpeed 0.19 as the engine sets it up; tests/train/test_footprint.py checks them against real engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from defi_platform.config import TrainConfig

MOMENT_BYTES = 8
"""AdamW's two, in fp32."""
MASTER_BYTES = 4


@dataclass(frozen=True)
class Footprint:
    """Bytes of training state on one worker, and of one step's traffic."""

    weights: int
    gradients: int
    optimizer: int
    """fp32 masters and moments; in the host's memory with offloading."""
    average: int
    activations: int
    """Of one micro-batch."""
    offloaded: bool
    sent: int
    """Bytes that a worker sends per step, and as many that it receives, with ring collectives."""

    @property
    def device(self) -> int:
        """Bytes on the device, without workspaces and fragmentation."""
        kept = self.weights + self.gradients + self.average + self.activations
        return kept if self.offloaded else kept + self.optimizer


def footprint(
    parameters: int, trained: int, activation_bytes: int, train: TrainConfig, world_size: int
) -> Footprint:
    """
    Args:
        parameters, trained: P and T.
        activation_bytes: kept for the backward pass of one sample in bf16.
    """
    element = 4 if train.precision == "fp32" else 2
    stage, share = train.zero_stage, world_size
    # With fp32 and without ZeRO the weights are their own masters.
    masters = MASTER_BYTES if stage > 0 or train.precision != "fp32" else 0
    divided = stage >= 1
    return Footprint(
        weights=_divided(element * trained, share, stage == 3) + element * (parameters - trained),
        gradients=_divided(element * trained, share, stage >= 2),
        optimizer=_divided((masters + MOMENT_BYTES) * trained, share, divided),
        # Each rank averages what it owns, also without ZeRO, where parameters are dealt out for it.
        average=_divided(MASTER_BYTES * trained, share, True) if train.ema_decay else 0,
        activations=activation_bytes * train.micro_batch * element // 2,
        offloaded=train.offload_optimizer,
        sent=sent_bytes(trained, train, world_size),
    )


def sent_bytes(trained: int, train: TrainConfig, world_size: int) -> int:
    """Bytes one worker sends per step: an all-reduce of n bytes sends 2 n (W-1)/W, a gather or a scatter half of it.

    What DeepSpeed was seen to do: without ZeRO gradients are all-reduced once per step; ZeRO 1 gathers the weights
    after that; ZeRO 2 all-reduces the gradients of every micro-batch. ZeRO 3 scatters them, and gathers the weights
    for every forward and every backward pass: an upper bound, since it keeps those that it has room for.
    """
    element = 4 if train.precision == "fp32" else 2
    passes = train.global_batch // (train.micro_batch * world_size)
    whole = element * trained
    if train.zero_stage == 0:
        moved = 2 * whole
    elif train.zero_stage == 1:
        moved = 2 * whole + whole
    elif train.zero_stage == 2:
        moved = passes * 2 * whole + whole
    else:
        moved = passes * (2 + 1) * whole
    return moved * (world_size - 1) // world_size


def _divided(amount: int, share: int, really: bool) -> int:
    return -(-amount // share) if really else amount
