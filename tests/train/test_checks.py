from __future__ import annotations

from typing import Any

import pytest

from defi_platform.cluster import ClusterError
from defi_platform.cluster.requirements import NodeResources, Supply, check_demands
from defi_platform.config import TrainConfig
from defi_platform.errors import ConfigError
from defi_platform.train.config_checks import check_device, check_train_config, training_demands, world_sizes

CONFLICTS: list[tuple[dict[str, Any], list[str]]] = [
    ({"global_batch": 10, "micro_batch": 4, "num_workers": 2}, ["global_batch=10", "micro_batch=4", "=8"]),
    ({"precision": "fp8"}, ["'fp8'", "fp32, bf16, fp16"]),
    ({"precision": "bf16", "zero_stage": 0}, ["precision=bf16", "zero_stage=0", "zero_stage=1"]),
    ({"precision": "fp16"}, ["precision=fp16", "use_gpu=false", "bf16"]),
    ({"schedule": "linear"}, ["'linear'", "as_written, as_run"]),
    ({"schedule": "tri_stage"}, ["tri_stage", "as_written", "as_run"]),
    ({"schedule": "as_run", "warmup_steps": 5}, ["warmup_steps=5", "schedule=as_run", "warmup_steps=0"]),
    ({"export_weights": "mean"}, ["'mean'", "raw, average"]),
    ({"export_weights": "average"}, ["no average is kept", "ema_decay", "export_weights=raw"]),
    ({"zero_stage": 4}, ["zero_stage is 4"]),
    ({"validate_every": 0}, ["validate_every is 0", "at least 1"]),
    ({"betas": [0.9]}, ["betas is [0.9]"]),
    ({"min_workers": 3, "num_workers": 2, "micro_batch": 2}, ["min_workers=3", "num_workers=2"]),
    ({"offload_optimizer": True, "zero_stage": 0}, ["offload_optimizer=true", "zero_stage=0"]),
    ({"ema_decay": 1.0}, ["ema_decay is 1.0", "[0, 1)"]),
]


@pytest.mark.parametrize(("settings", "parts"), CONFLICTS)
def test_conflicting_settings_are_refused_naming_the_values_and_the_fix(
    settings: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_train_config(TrainConfig(output="somewhere", **settings))
    for part in parts:
        assert part in str(refused.value)


def test_bf16_is_refused_on_a_gpu_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Tesla T4")
    with pytest.raises(ConfigError, match=r"precision=bf16, but Tesla T4.*precision=fp16"):
        check_device(TrainConfig(output="", use_gpu=True, precision="bf16"))
    check_device(TrainConfig(output="", use_gpu=True, precision="fp16"))
    check_device(TrainConfig(output="", precision="bf16"))


def supply(cpus: float) -> Supply:
    return Supply([NodeResources(None, {"CPU": cpus}, {"CPU": cpus})])


def test_more_workers_than_the_cluster_can_ever_hold_are_refused_instead_of_waited_for() -> None:
    gfdm = TrainConfig(output="a", num_workers=3)
    gidm = TrainConfig(output="b", num_workers=2, resources_per_worker={"CPU": 2.0})
    check_demands(training_demands({"gfdm": gfdm}, {"gfdm": 1}), supply(4))
    with pytest.raises(ClusterError) as refused:
        check_demands(training_demands({"gfdm": gfdm, "gidm": gidm}, {"gfdm": 1, "gidm": 1}), supply(4))
    for part in (
        "7.25 CPU",
        "gfdm: workers: 3 x (1 CPU)",
        "gidm: workers: 2 x (2 CPU)",
        "has 4",
        "num_workers",
    ):
        assert part in str(refused.value)


def test_a_gpu_run_on_a_cluster_without_gpus_is_refused() -> None:
    with pytest.raises(ClusterError, match=r"1 GPU .* has 0"):
        check_demands(
            training_demands({"gfdm": TrainConfig(output="a", use_gpu=True)}, {"gfdm": 1}), supply(4)
        )


def test_an_elastic_run_has_only_sizes_that_divide_its_batch() -> None:
    train = TrainConfig(output="a", num_workers=8, min_workers=2, global_batch=48, micro_batch=2)
    assert world_sizes(train) == [2, 3, 4, 6, 8]
    check_demands(training_demands({"elastic": train}, {"elastic": 0}), supply(2))
