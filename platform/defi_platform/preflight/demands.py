"""Resources that each job asks Ray for, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defi_platform import roles
from defi_platform.cluster.requirements import Demand
from defi_platform.config import (
    DemoConfig,
    EncodeConfig,
    EvaluateConfig,
    PretrainBothConfig,
    PretrainConfig,
    RecordConfig,
    ServeConfig,
    TrainConfig,
)
from defi_platform.encode_latents import encoder_demand
from defi_platform.serve.deployment.startup_checks import replica_demand
from defi_platform.train.config_checks import training_demands


def demands_of(config: Any) -> list[Demand]:
    """Demands of a job at the least, on the connected cluster; [] for one that runs with whatever there is.

    Args:
        config: of any job.
    """
    if isinstance(config, PretrainBothConfig):
        return _training({"gfdm": config.gfdm, "gidm": config.gidm})
    if isinstance(config, PretrainConfig):
        return _training({"training": config})
    if isinstance(config, EncodeConfig):
        return [encoder_demand(config)]
    if isinstance(config, ServeConfig):
        return [replica_demand(config)]
    if isinstance(config, EvaluateConfig):
        served = config.url is None and "policy" in config.arms
        return [*([replica_demand(config.serve)] if served else []), _simulator()]
    if isinstance(config, RecordConfig):
        return [_simulator()]
    if isinstance(config, DemoConfig):
        return demands_of(config.pretrain)
    return []


def _training(configs: Mapping[str, PretrainConfig]) -> list[Demand]:
    settings: dict[str, TrainConfig] = {name: config.train for name, config in configs.items()}
    decoders = {name: config.data.decode.processes for name, config in configs.items()}
    return training_demands(settings, decoders)


def _simulator() -> Demand:
    # One suffices: the others join when there is room.
    return Demand(
        name="simulator", resources={"CPU": 1.0}, role=roles.DECODE, fix="Set ray.local_cpus higher."
    )
