"""Memory of a run on each worker, and its traffic on the network, from sizes alone.

The formulas hold for DeepSpeed 0.19 as the engine sets it up; tests/train/test_footprint.py checks them against real
engines.
"""

from __future__ import annotations

from defi_models.memory import TrainingMemory, training_memory
from defi_platform.config import TrainConfig
from defi_platform.train.engine.deepspeed_config import accumulates_in_fp32, accumulation_steps


def footprint(
    parameters: int, trained: int, activation_bytes: int, train: TrainConfig, world_size: int
) -> TrainingMemory:
    """Estimates the memory of one worker of a run.

    Args:
        parameters: of the whole model.
        trained: parameters among them that train.
        activation_bytes: kept for the backward pass of one sample in bf16.
        train: settings of the run.
        world_size: workers.
    """
    half = train.precision != "fp32"
    return training_memory(
        parameters,
        trained,
        zero_stage=train.zero_stage,
        world_size=world_size,
        half_precision=half,
        gradients_in_fp32=accumulates_in_fp32(train, world_size),
        average=bool(train.ema_decay),
        activation_bytes=activation_bytes * train.micro_batch * (1 if half else 2),
        offload_optimizer=train.offload_optimizer,
    )


def sent_bytes(trained: int, train: TrainConfig, world_size: int) -> int:
    """Bytes that one worker sends per step, and as many that it receives, with ring collectives.

    With W workers an all-reduce of n bytes sends 2 n (W-1)/W, a gather or a scatter half of it. As observed of
    DeepSpeed: without ZeRO gradients are all-reduced once per step. ZeRO 1 does so in the precision in which they are
    summed, and gathers the weights after that. ZeRO 2 all-reduces the gradients of every micro-batch. ZeRO 3 scatters
    them, and gathers the weights for every forward and every backward pass: an upper bound, since it keeps those that
    it has memory for.

    Args:
        trained: parameters that train.
        train: settings of the run.
        world_size: W.
    """
    whole = (4 if train.precision == "fp32" else 2) * trained
    passes = accumulation_steps(train, world_size)
    if train.zero_stage == 0:
        moved = 2 * whole
    elif train.zero_stage == 1:
        summed = 4 * trained if accumulates_in_fp32(train, world_size) else whole
        moved = 2 * summed + whole
    elif train.zero_stage == 2:
        moved = passes * 2 * whole + whole
    else:
        moved = passes * (2 + 1) * whole
    return moved * (world_size - 1) // world_size
