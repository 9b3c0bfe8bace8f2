"""Arithmetic that gives the same bits at every run, where the device does not do so by itself.

On CPUs every operation of our models adds in a fixed order. On GPUs some kernels add in the order in which their threads
come; PyTorch has others in their place, or raises an error that names the operation.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from defi_platform.config import TrainConfig

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"
"""One of the two that cuBLAS is deterministic with; read when a process first multiplies matrices."""


def set_determinism(train: TrainConfig) -> None:
    """Makes this process compute deterministically where `train.deterministic` asks for it.

    Args:
        train: settings of the run.
    """
    if not train.deterministic:
        return
    os.environ[CUBLAS] = WORKSPACE
    torch.backends.cudnn.benchmark = False  # it may choose another kernel each time
    torch.use_deterministic_algorithms(True)


def arithmetic(train: TrainConfig) -> dict[str, Any]:
    """The device and the kind of arithmetic on which the bits of a result depend, for rows of a run and its card.

    Returns: `device` by name; `deterministic`, whether this process computes the same bits each time on such a device.
    """
    if not train.use_gpu:
        return {"device": "CPU", "deterministic": True}
    return {
        "device": torch.cuda.get_device_name(),
        "deterministic": torch.are_deterministic_algorithms_enabled() and os.environ.get(CUBLAS) == WORKSPACE,
    }
