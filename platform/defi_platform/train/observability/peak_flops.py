"""Peak arithmetic of known GPUs, the denominator of MFU."""

from __future__ import annotations

import torch

from defi_platform.config import TrainConfig

PEAK_TFLOPS = {
    "H200": {"half": 989.0, "fp32": 67.0},
    "H100 PCIe": {"half": 756.0, "fp32": 51.0},
    "H100": {"half": 989.0, "fp32": 67.0},
    "A100": {"half": 312.0, "fp32": 19.5},
    "L40S": {"half": 362.0, "fp32": 91.6},
    "RTX 4090": {"half": 165.2, "fp32": 82.6},
}
"""Dense, without sparsity, from the makers' data sheets; the first name that the device's name contains counts."""


def known_peak_tflops(train: TrainConfig) -> float | None:
    """Peak TFLOP/s of this process's device in the run's precision; None on CPUs and unknown devices."""
    if not train.use_gpu or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    column = "fp32" if train.precision == "fp32" else "half"
    return next((peak[column] for known, peak in PEAK_TFLOPS.items() if known in name), None)
