"""DeepSpeed's configuration of a run."""

from __future__ import annotations

from typing import Any

from defi_platform.config import TrainConfig


def accumulation_steps(train: TrainConfig, world_size: int) -> int:
    """Micro-batches of one rank in a global batch."""
    return train.global_batch // (train.micro_batch * world_size)


def accumulates_in_fp32(train: TrainConfig, world_size: int) -> bool:
    """Whether gradients are summed over micro-batches in another precision than they are computed in.

    In bf16, with its 8 bits, a sum stops growing where a micro-batch adds less than a 256th of it.

    Args:
        train: settings of the run.
        world_size: ranks.
    """
    return train.precision == "bf16" and train.zero_stage > 0 and accumulation_steps(train, world_size) > 1


def deepspeed_config(train: TrainConfig, world_size: int) -> dict[str, Any]:
    """The configuration as DeepSpeed 0.19 takes it.

    Args:
        train: settings of the run.
        world_size: ranks.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage == 1:
        # Copying each gradient into one buffer as it comes helps stage 2, which frees them; here it only costs,
        # on small models a tenth of the step.
        zero["contiguous_gradients"] = False
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": train.use_gpu}
    if train.use_gpu and world_size > 1 and train.zero_stage:
        # Gradients are sent on a stream of their own while earlier layers still compute theirs. Nothing overlaps on
        # a CPU, where the same threads would do both.
        zero["overlap_comm"] = True
    config: dict[str, Any] = {
        # Offloading takes torch's AdamW too: DeepSpeed's own is compiled with g++ at first use.
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(train, world_size),
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
                # One kernel for all parameters. On CPUs torch's default stays: other sums than recorded runs have.
                **({"fused": True} if train.use_gpu and not train.offload_optimizer else {}),
            },
        },
    }
    if train.precision != "fp32":
        config[train.precision] = {"enabled": True}
    if accumulates_in_fp32(train, world_size):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        # Stage 1 else keeps each gradient in bf16 too until the micro-batch has ended.
        config["bf16"]["immediate_grad_update"] = True
        if train.zero_stage == 1:
            # The sums travel between ranks once per update, and would be rounded to bf16 for it, also on one rank.
            config["communication_data_type"] = "fp32"
    return config
