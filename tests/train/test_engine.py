"""Training state moves between ZeRO stages and precisions, without Ray: one process, one engine after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from defi_platform.config import TrainConfig
from defi_platform.train.engine.deepspeed_config import deepspeed_config
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.engine.sharded_state import ShardedState, Span


def engine_of(stage: int, precision: str = "fp32", seed: int = 0, **changes: Any) -> TrainingEngine:
    torch.manual_seed(0)
    model = tiny.TinyModel(dropout=0.0)
    if seed:
        # Other weights, as of a run that has not begun; what is frozen is the same in all runs.
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
    settings = TrainConfig(
        output="", zero_stage=stage, precision=precision, global_batch=4, micro_batch=2, **changes
    )
    return TrainingEngine(model, settings, world_size=1)


def train(engine: TrainingEngine, steps: range) -> list[float]:
    found = []
    for step in steps:
        for micro in range(2):
            samples = [step * 4 + micro * 2, step * 4 + micro * 2 + 1]
            x = torch.stack([tiny._values("train", k) for k in samples])
            outputs = engine.forward({"x": x}, sample_generators(0, "noise", samples))
            engine.backward(outputs["loss"])
            assert engine.step(1e-2)
            found.append(outputs["loss"].item())
    return found


def state_of(engine: TrainingEngine) -> tuple[dict[str, float], dict[tuple[str, str], Tensor]]:
    tensors = {}
    for piece in engine.fragments():
        assert piece.start == 0, "one rank holds every parameter whole"
        for kind, value in piece.tensors.items():
            tensors[piece.name, kind] = value.clone()
    return engine.scalars(), tensors


def restore(engine: TrainingEngine, scalars: dict[str, float], state: dict[tuple[str, str], Tensor]) -> None:
    def read(spans: list[Span]) -> Iterator[tuple[Span, Tensor]]:
        for span in spans:
            # In two parts, as it comes from a checkpoint of two ranks.
            half = (span.start + span.stop) // 2
            for start, stop in ((span.start, half), (half, span.stop)):
                yield span._replace(start=start, stop=stop), state[span.name, span.kind][start:stop]

    engine.restore_share(scalars, read)
    engine.end_restore(scalars)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (3, 0), (0, 2)])
def test_training_and_the_average_of_its_weights_go_on_alike_under_another_zero_stage(
    process_group: None, before: int, after: int
) -> None:
    first = engine_of(before, ema_decay=0.5)
    train(first, range(3))
    scalars, state = state_of(first)
    expected = train(first, range(3, 6))

    shapes = dict(tiny.TinyModel(0.0).named_parameters())
    second = engine_of(after, seed=1, ema_decay=0.5)
    restore(second, scalars, state)
    assert second.scalars()["adam_step"] == 3
    # Without clipping differences between the stages' sums of squares the arithmetic is the same.
    assert train(second, range(3, 6)) == pytest.approx(expected, rel=1e-6)
    assert first.ema and second.ema and second.ema.updates == 6
    for name in second.trained_shapes():
        whole = first.ema.full(name, shapes[name].shape)
        assert second.ema.full(name, shapes[name].shape) == pytest.approx(whole, rel=1e-6, abs=1e-7)


def test_optimiser_state_may_live_in_the_hosts_memory(process_group: None) -> None:
    expected = train(engine_of(2), range(3))
    offloaded = engine_of(2, offload_optimizer=True)
    assert train(offloaded, range(3)) == pytest.approx(expected, rel=1e-6)
    assert {key[1] for key in state_of(offloaded)[1]} == {"param", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_bf16_keeps_fp32_masters_through_a_restore(process_group: None, stage: int, offload: bool) -> None:
    first = engine_of(stage, "bf16", offload_optimizer=offload)
    train(first, range(3))
    scalars, state = state_of(first)
    masters = {name: value for (name, kind), value in state.items() if kind == "param"}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in masters.values())

    second = engine_of(stage, "bf16", seed=1, offload_optimizer=offload)
    restore(second, scalars, state)
    assert train(second, range(3, 6)) == train(first, range(3, 6))


class Sum(nn.Module):
    """A model whose gradient is the mean of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, batch: dict[str, Tensor], generator: object) -> dict[str, Tensor]:
        return {"loss": (batch["x"].to(self.weight.dtype) * self.weight).sum()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_in_bf16_are_summed_in_fp32(
    process_group: None, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = TrainConfig(
        output="", zero_stage=stage, precision="bf16", global_batch=512, micro_batch=1, clip_grad_norm=0.0
    )
    engine = TrainingEngine(Sum(), settings, world_size=1)
    for _ in range(512):
        engine.backward(engine.forward({"x": torch.ones(8)}, [])["loss"])
        engine.step(0.0)
    # In bf16 the sum of 512 times 1/512 stops at a half, where a further one is rounded away.
    assert engine.grad_norm() == pytest.approx(8**0.5, rel=1e-6)

    for micro in range(512):
        engine.backward(engine.forward({"x": torch.full((8,), 1.0078125 if micro % 4 else 1.0)}, [])["loss"])
        engine.step(0.0)
    # Of 9 bits: in bf16 it is 1.0078125.
    assert engine.grad_norm() == pytest.approx(8**0.5 * 1.005859375, rel=1e-6)

    for micro in range(512):
        x = torch.full((8,), torch.nan if micro == 0 else 1.0)
        engine.backward(engine.forward({"x": x}, [])["loss"])
        applied = engine.step(0.1)
    assert not applied, "an update that is not finite is left out"
    assert torch.equal(engine.full_parameter(next(engine.module.parameters())), torch.ones(8))
    assert "GB" not in capfd.readouterr().out, "DeepSpeed prints what memory the machine has"


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_an_update_is_made_as_ever_after_one_that_was_skipped(
    process_group: None, stage: int, offload: bool
) -> None:
    settings = TrainConfig(
        output="",
        zero_stage=stage,
        precision="bf16",
        global_batch=4,
        micro_batch=1,
        offload_optimizer=offload,
    )
    engine = TrainingEngine(Sum(), settings, world_size=1)

    def update(*inputs: float) -> tuple[bool, float | None]:
        for x in inputs:
            engine.backward(engine.forward({"x": torch.full((8,), x)}, [])["loss"])
            applied = engine.step(0.0)
        return applied, engine.grad_norm()

    assert not update(torch.nan, 1.0, 1.0, 1.0)[0]
    assert update(1.0, 1.0, 1.0, 1.0) == (True, pytest.approx(8**0.5, rel=1e-6))
    assert not update(1.0, 1.0, 1.0, torch.inf)[0]
    assert update(2.0, 1.0, 1.0, 0.0) == (True, pytest.approx(8**0.5, rel=1e-6))


def test_what_deepspeed_does_on_gpus() -> None:
    gpus = TrainConfig(output="", use_gpu=True, precision="bf16", global_batch=32, micro_batch=4)
    config = deepspeed_config(gpus, world_size=8)
    assert config["optimizer"]["params"]["fused"] and config["zero_optimization"]["overlap_comm"]
    assert "data_types" not in config, "nothing is summed over one micro-batch"
    assert deepspeed_config(gpus, world_size=4)["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "overlap_comm" not in deepspeed_config(gpus, world_size=1)["zero_optimization"]
    offloaded = replace(gpus, offload_optimizer=True)
    assert "fused" not in deepspeed_config(offloaded, world_size=8)["optimizer"]["params"]
    assert "fused" not in deepspeed_config(replace(gpus, use_gpu=False), 8)["optimizer"]["params"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_parameter_that_is_overwritten_keeps_its_value_over_the_next_update(
    process_group: None, stage: int
) -> None:
    engine = engine_of(stage)
    weight = engine.module.get_submodule("out").bias
    assert isinstance(weight, nn.Parameter)
    engine.set_parameter(weight, torch.full((tiny.WIDTH,), 7.0))
    assert torch.equal(engine.full_parameter(weight), torch.full((tiny.WIDTH,), 7.0))
    train(engine, range(1))
    assert engine.full_parameter(weight) == pytest.approx(torch.full((tiny.WIDTH,), 7.0), abs=0.05)


@pytest.mark.parametrize("fused", [True, False])
def test_adams_count_of_updates_is_restored_to_where_its_kernel_looks_for_it(
    process_group: None, fused: bool
) -> None:
    module = nn.Linear(2, 2, device="meta")
    adam = torch.optim.AdamW(module.parameters())
    adam.param_groups[0]["fused"] = fused
    ShardedState(SimpleNamespace(optimizer=adam, module=module), stage=0).make_moments(3.0)
    for state in adam.state.values():
        assert state["exp_avg"].device.type == "meta"
        assert state["step"].device.type == ("meta" if fused else "cpu")
