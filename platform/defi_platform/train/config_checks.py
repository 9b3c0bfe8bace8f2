"""Checks before anything starts: settings that contradict each other, the device, the storage or the cluster."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from defi_platform import roles
from defi_platform.cluster.requirements import Demand
from defi_platform.config import TrainConfig
from defi_platform.data.loader.stream import ACTOR_CPUS
from defi_platform.errors import ConfigError
from defi_platform.train.engine.lr_schedule import RELEASED, SCHEDULES
from defi_platform.train.segments import EXTENSIONS

PRECISIONS = ("fp32", "bf16", "fp16")
MATMUL_PRECISIONS = ("highest", "high", "medium")
EXPORTED = ("raw", "average")


def check_train_config(train: TrainConfig, part: str = "train") -> None:
    """Checks the settings of a run against each other.

    Args:
        train: the settings.
        part: dotted config key of the part, for messages.

    Raises: ConfigError naming both values and the fix.
    """
    _choice(part, "precision", train.precision, PRECISIONS)
    _choice(part, "matmul_precision", train.matmul_precision, MATMUL_PRECISIONS)
    _choice(part, "noise", train.noise, ("cpu", "device"))
    if train.schedule == "tri_stage":
        raise ConfigError(
            f"{part}.schedule=tri_stage was not what the release did and is gone. Set {part}.schedule=as_written (the "
            "schedule of the released code) or as_run (what its script does: the peak throughout); a run that was begun with it "
            f"goes on from a checkpoint with {part}.restart_from=STEP."
        )
    _choice(part, "schedule", train.schedule, SCHEDULES)
    if train.schedule in RELEASED and train.warmup_steps:
        raise ConfigError(
            f"{part}.warmup_steps={train.warmup_steps} with {part}.schedule={train.schedule}, which does not use it. "
            f"Set {part}.warmup_steps=0."
        )
    if train.extend is not None:
        _choice(part, "extend", train.extend, EXTENSIONS)
    if train.restart_from is not None:
        _at_least(part, "restart_from", train.restart_from, 1)
    for name in ("steps", "global_batch", "micro_batch", "num_workers"):
        _at_least(part, name, getattr(train, name), 1)
    for name in ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
        _at_least(part, name, getattr(train, name), 1)
    for name in ("validation_samples", "sampled_clips"):
        _at_least(part, name, getattr(train, name), 1)
    _at_least(part, "preemption_grace_s", train.preemption_grace_s, 0)
    _at_least(part, "restart_dead_codes_every", train.restart_dead_codes_every, 0)
    every, name = train.async_validation_every, "async_validation_every"
    _at_least(part, name, every, 0)
    if every % train.checkpoint_every:
        multiple = max(1, round(every / train.checkpoint_every)) * train.checkpoint_every
        raise ConfigError(
            f"{part}.{name}={every} is no multiple of {part}.checkpoint_every={train.checkpoint_every}: it evaluates "
            f"checkpoints. Set it to {multiple}."
        )
    if train.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"{part}.zero_stage is {train.zero_stage}; choose 0, 1, 2 or 3.")
    per_pass = train.micro_batch * train.num_workers
    if train.global_batch % per_pass:
        below = max(per_pass, train.global_batch // per_pass * per_pass)
        raise ConfigError(
            f"{part}.global_batch={train.global_batch} is not micro_batch x num_workers x a whole number "
            f"(micro_batch={train.micro_batch}, num_workers={train.num_workers}). "
            f"Set {part}.global_batch={below}, or a micro_batch that divides "
            f"{train.global_batch / train.num_workers:g}."
        )
    if train.min_workers is not None:
        _at_least(part, "min_workers", train.min_workers, 1)
        if train.min_workers > train.num_workers:
            raise ConfigError(
                f"{part}.min_workers={train.min_workers} is more than {part}.num_workers={train.num_workers}, the "
                f"most there may be. Set {part}.num_workers={train.min_workers}, or min_workers lower."
            )
    if train.offload_optimizer and train.zero_stage == 0:
        raise ConfigError(
            f"{part}.offload_optimizer=true with {part}.zero_stage=0: only ZeRO moves optimiser state. "
            f"Set {part}.zero_stage=1, 2 or 3."
        )
    if train.ema_decay is not None and not 0 <= train.ema_decay < 1:
        raise ConfigError(
            f"{part}.ema_decay is {train.ema_decay}; a number in [0, 1) is expected, e.g. 0.9999, or null for none."
        )
    _choice(part, "export_weights", train.export_weights, EXPORTED)
    if train.export_weights == "average" and not train.ema_decay:
        raise ConfigError(
            f"{part}.export_weights=average, but no average is kept. Set {part}.ema_decay, e.g. 0.9999, or "
            f"{part}.export_weights=raw."
        )
    if train.max_skipped_in_a_row is not None:
        _at_least(part, "max_skipped_in_a_row", train.max_skipped_in_a_row, 1)
    if train.precision != "fp32" and train.zero_stage == 0:
        raise ConfigError(
            f"{part}.precision={train.precision} with {part}.zero_stage=0 would keep no fp32 master weights. "
            f"Set {part}.zero_stage=1."
        )
    if train.precision == "fp16" and not train.use_gpu:
        raise ConfigError(
            f"{part}.precision=fp16 with {part}.use_gpu=false: CPUs have no fp16 training. "
            f"Set {part}.precision=bf16, or {part}.use_gpu=true."
        )
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise ConfigError(f"{part}.betas is {train.betas}; two numbers in [0, 1) are expected.")
    if train.use_gpu and train.resources_per_worker.get("GPU", 1) <= 0:
        raise ConfigError(
            f"{part}.use_gpu=true but {part}.resources_per_worker.GPU="
            f"{train.resources_per_worker['GPU']:g}. Leave GPU out, or set it to 1."
        )


def check_device(train: TrainConfig) -> None:
    """Checks, in a worker, that its GPU computes in the configured precision. Raises: ConfigError."""
    if not train.use_gpu or train.precision != "bf16":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"train.precision=bf16, but {torch.cuda.get_device_name()} has no bf16 arithmetic. "
            "Set train.precision=fp16, or train on newer GPUs (Ampere and later)."
        )


def training_demands(requests: Mapping[str, TrainConfig], decoders: Mapping[str, int]) -> list[Demand]:
    """Resources that trainings ask Ray for at the least, all at the same time.

    Args:
        requests: run name -> its settings.
        decoders: run name -> decoder processes of each of its workers.
    """
    demands = []
    for name, train in requests.items():
        workers = min_world_size(train)
        demands.append(
            Demand(
                name=f"{name}: workers",
                resources=worker_resources(train),
                count=workers,
                role=roles.TRAIN,
                fix=f"Set train.num_workers or train.resources_per_worker lower{_HERE}.",
            )
        )
        validation = async_validation_resources(train)
        if validation:
            demands.append(
                Demand(
                    name=f"{name}: async validation",
                    resources=validation,
                    role=roles.TRAIN,
                    fix="Set train.async_validation_resources lower, or train.async_validation_every=0.",
                )
            )
        share = roles.options(roles.DECODE, share=ACTOR_CPUS)["num_cpus"]
        # On nodes of their own one will do: fewer processes take longer.
        alone = share != ACTOR_CPUS
        demands.append(
            Demand(
                name=f"{name}: decoders",
                resources={"CPU": share},
                count=1 if alone else workers * decoders[name],
                role=roles.DECODE,
                fix="Set data.decode.processes lower.",
            )
        )
    return demands


_HERE = ", or where Ray is started by the job ray.local_cpus higher"


def world_sizes(train: TrainConfig) -> list[int]:
    """Possible numbers of workers, ascending: those of the run's range that divide the global batch."""
    least = train.num_workers if train.min_workers is None else train.min_workers
    return [
        workers
        for workers in range(least, train.num_workers + 1)
        if train.global_batch % (train.micro_batch * workers) == 0
    ]


def min_world_size(train: TrainConfig) -> int:
    """The lowest number of workers with which the run starts."""
    return min(world_sizes(train), default=train.num_workers)


def worker_resources(train: TrainConfig) -> dict[str, float]:
    """Ray resources of one worker of a run."""
    resources = dict(train.resources_per_worker)
    if train.use_gpu:
        resources.setdefault("GPU", 1.0)
    return resources


def async_validation_resources(train: TrainConfig) -> dict[str, float]:
    """Ray resources of asynchronous validation; {} where there is none."""
    return train.async_validation_resources if train.async_validation_every else {}


def _choice(part: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{part}.{name} is '{value}'; choose one of {', '.join(choices)}.")


def _at_least(part: str, name: str, value: float, least: int) -> None:
    if value < least:
        raise ConfigError(f"{part}.{name} is {value}; at least {least} is needed.")
