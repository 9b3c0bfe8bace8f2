"""Needs of the paper's runs on many GPUs, from formulas: memory, network traffic, expected efficiency.

    python benchmarks/scaling.py [--gpus 8 64 512] [--peak-tflops 989] [--mfu 0.35] [--network-gbs 50]

Nothing here is measured on those GPUs. Memory and traffic are the formulas of driver/memory_estimate.py, which a
test holds against real engines; efficiency assumes that each GPU computes at --mfu of its peak, has --network-gbs
gigabytes per second to the others, and hides none of the traffic behind computing: a lower bound. Weak scaling: each
GPU keeps the micro-batch of configs/paper.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from defi_models import presets
from defi_models.describe import Cost, cost_of
from defi_platform.config import FinetuneConfig, PretrainConfig, TrainConfig
from defi_platform.config.loader import load_config
from defi_platform.train.driver.memory_estimate import footprint, sent_bytes

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "paper"
GIB, GB = 2**30, 1e9


def paper_runs() -> dict[str, tuple[Cost, TrainConfig]]:
    """Model cost and training settings of the three runs."""
    policy = load_config(FinetuneConfig, CONFIGS / "finetune_policy.yaml")
    return {
        "gfdm": (
            cost_of(presets.gfdm("paper")),
            load_config(PretrainConfig, CONFIGS / "pretrain_gfdm.yaml").train,
        ),
        "gidm": (
            cost_of(presets.gidm("paper")),
            load_config(PretrainConfig, CONFIGS / "pretrain_gidm.yaml").train,
        ),
        "policy": (cost_of(presets.policy("paper"), trainable=policy.trainable), policy.train),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--network-gbs", type=float, default=50.0)
    given = parser.parse_args()
    print(
        f"paper sizes; {given.peak_tflops:g} TFLOP/s peak, {given.mfu:.0%} of it assumed, {given.network_gbs:g} GB/s "
        "per GPU assumed\n"
    )
    print(
        f"{'':8}{'GPUs':>6}{'ZeRO':>6}{'state GiB':>11}{'activations GiB':>17}{'sent GB/step':>14}{'compute s':>11}"
        f"{'network s':>11}{'efficiency':>12}"
    )
    for name, (cost, train) in paper_runs().items():
        compute = train.micro_batch * cost.training_flops / (given.peak_tflops * 1e12 * given.mfu)
        for gpus in given.gpus:
            for stage in (1, 2, 3):
                settings = replace(
                    train, zero_stage=stage, global_batch=train.micro_batch * gpus, num_workers=gpus
                )
                one = footprint(cost.parameters, cost.trained, cost.activation_bytes, settings, gpus)
                sent = sent_bytes(cost.trained, settings, gpus)
                network = sent / (given.network_gbs * GB)
                print(
                    f"{name:8}{gpus:>6}{stage:>6}{(one.device - one.activations) / GIB:>11.2f}"
                    f"{one.activations / GIB:>17.2f}{sent / GB:>14.2f}{compute:>11.3f}{network:>11.3f}"
                    f"{compute / (compute + network):>12.1%}"
                )


if __name__ == "__main__":
    main()
