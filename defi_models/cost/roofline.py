"""Least time that a device needs for counted operations: each kernel at the device's peak rate or bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from defi_models.cost.operations import Operations
from defi_models.errors import ConfigurationError, did_you_mean

LAUNCH_S = 5e-6
"""Of a kernel that PyTorch starts by itself, on the host; an assumption. A CUDA graph has one launch."""
KERNEL_S = 2e-6
"""Of a kernel that does next to nothing, on the device; an assumption."""


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet."""

    name: str
    """As sold."""
    flops: float
    """Dense bf16 products with float32 sums, per second."""
    bandwidth: float
    """Of its memory, bytes per second."""


DEVICES = {
    "h100": Device("H100 SXM", 989e12, 3.35e12),
    "h200": Device("H200 SXM", 989e12, 4.8e12),
    "a100": Device("A100 SXM 80 GB", 312e12, 2.039e12),
    "l40s": Device("L40S", 362e12, 0.864e12),
    "rtx4090": Device("RTX 4090", 165e12, 1.008e12),
}
PUBLISHED = (
    "GR00T N1.7, H100: 85 ms eager, 27.9 ms TensorRT (its makers)",
    "DeFI, RTX 4090: 153 ms per chunk (arXiv 2604.16391: GFDM 86.1, GIDM 42.9, head 24.3)",
)


@dataclass(frozen=True)
class Estimate:
    """Least times of operations on a device, seconds."""

    eager: float
    """Kernel by kernel, started one by one: the device's time or the host's, whichever is more."""
    graph: float
    """The same kernels in a CUDA graph: the device's time."""
    fused: float
    """Products alone, everything between them fused away: what a compiler can reach at most."""


def device(name: str) -> Device:
    """A device by its short name.

    Raises:
        ConfigurationError: Naming the nearest.
    """
    if name not in DEVICES:
        raise ConfigurationError(f"there is no device '{name}'.{did_you_mean(name, sorted(DEVICES))}")
    return DEVICES[name]


def estimate(seen: Operations, on: Device) -> Estimate:
    """Least times of counted operations.

    Args:
        seen: counted, in the precision that they would run in.
        on: where they would run.
    """
    each = [
        (max(KERNEL_S, flops / on.flops, moved / on.bandwidth), product)
        for flops, moved, product in seen.records
    ]
    graph = sum(seconds for seconds, _ in each)
    fused = sum(seconds for seconds, product in each if product)
    return Estimate(max(graph, seen.kernels * LAUNCH_S), graph, fused)


def table(parts: Mapping[str, Operations], on: Device) -> list[str]:
    """Lines of text: a row per part and their sum, then published figures.

    Args:
        parts: counted operations by part.
        on: where they would run.
    """
    head = f"  {'':24}{'kernels':>9}{'GFLOP':>11}{'GB':>8}{'waits':>7}{'eager ms':>10}{'graph ms':>10}{'fused ms':>10}"
    lines = [f"  least time of a chunk on one {on.name}, at its peak rate and bandwidth:", head]
    found = {name: estimate(seen, on) for name, seen in parts.items()}
    for name, seen in parts.items():
        lines.append(_row(name, [seen], [found[name]]))
    lines.append(_row("act()", list(parts.values()), list(found.values())))
    lines.append("  Real kernels reach a part of the peaks, often a half. Published, measured:")
    return lines + [f"    {line}" for line in PUBLISHED]


def _row(name: str, parts: list[Operations], times: list[Estimate]) -> str:
    kernels, flops = sum(each.kernels for each in parts), sum(each.flops for each in parts)
    moved = sum(each.product_bytes + each.other_bytes for each in parts)
    waits = sum(each.waits + each.uploads for each in parts)
    shown = [sum(getattr(each, field) for each in times) for field in ("eager", "graph", "fused")]
    row = f"  {name:24}{kernels:>9,}{flops / 1e9:>11,.1f}{moved / 1e9:>8.2f}{waits:>7}"
    return row + "".join(f"{seconds * 1e3:>10.2f}" for seconds in shown)
