"""Memory of training state on one worker, from sizes alone: weights, gradients, optimiser, average, activations.

The formulas are those of DeepSpeed 0.19 with AdamW; the platform's tests compare them with real engines.
"""

from __future__ import annotations

from dataclasses import dataclass

MOMENT_BYTES = 8
"""Per trained parameter: AdamW's two moments in float32."""
MASTER_BYTES = 4
"""Per trained parameter: a float32 master copy, or one of the average."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of training state on one worker."""

    weights: int
    gradients: int
    optimizer: int
    """float32 masters and moments; in the host's memory with offloading."""
    average: int
    activations: int
    """Of one micro-batch."""
    offloaded: bool

    @property
    def device(self) -> int:
        """Bytes on the device, without workspaces and fragmentation."""
        kept = self.weights + self.gradients + self.average + self.activations
        return kept if self.offloaded else kept + self.optimizer


def training_memory(
    parameters: int,
    trained: int,
    *,
    zero_stage: int,
    world_size: int,
    half_precision: bool = True,
    gradients_in_fp32: bool = False,
    average: bool = False,
    activation_bytes: int = 0,
    offload_optimizer: bool = False,
) -> TrainingMemory:
    """Estimates the memory of one worker; what ZeRO shards is rounded up.

    Args:
        parameters: of the whole model, frozen ones included.
        trained: parameters among them that train.
        zero_stage: 0 shards nothing, 1 optimiser state, 2 gradients too, 3 weights too.
        world_size: workers.
        half_precision: bf16 or fp16 with float32 masters; False: float32.
        gradients_in_fp32: sums of gradients are kept in float32, also with half_precision.
        average: an exponential moving average of the weights is kept.
        activation_bytes: kept for the backward pass of one micro-batch, in the precision of training.
        offload_optimizer: optimiser state lies in the host's memory.
    """
    element = 2 if half_precision else 4
    # With float32 and without ZeRO the weights are their own masters.
    masters = MASTER_BYTES if half_precision or zero_stage > 0 else 0
    return TrainingMemory(
        weights=_per_worker(element * parameters, world_size, zero_stage >= 3),
        gradients=_per_worker((4 if gradients_in_fp32 else element) * trained, world_size, zero_stage >= 2),
        optimizer=_per_worker((masters + MOMENT_BYTES) * trained, world_size, zero_stage >= 1),
        # Each rank averages the parameters it owns; without ZeRO they are distributed for this.
        average=_per_worker(MASTER_BYTES * trained, world_size, True) if average else 0,
        activations=activation_bytes,
        offloaded=offload_optimizer,
    )


def _per_worker(amount: int, world_size: int, sharded: bool) -> int:
    return -(-amount // world_size) if sharded else amount
