"""The formulas of a run's memory and traffic, against real engines on one and two ranks."""

from __future__ import annotations

import pytest
import tiny
import torch
from ranks import Ranks
from torch import nn

from defi_platform.config import TrainConfig
from defi_platform.train.driver.memory_estimate import footprint, sent_bytes
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.engine.seeds import sample_generators

WIDTH = 256


class Wide(tiny.TinyModel):
    """Large enough that padding and small parts do not matter."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.hidden = nn.Linear(tiny.WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.still = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.out = nn.Linear(WIDTH, tiny.WIDTH)

    def forward(self, batch, generator):  # type: ignore[no-untyped-def]
        clean = batch["x"].to(self.out.weight.dtype)
        return {
            "loss": (self.out(torch.tanh(self.still(self.middle(self.hidden(clean))))) - clean)
            .float()
            .square()
            .mean()
        }


def settings(stage: int, precision: str, world_size: int) -> TrainConfig:
    return TrainConfig(
        output="",
        zero_stage=stage,
        precision=precision,
        micro_batch=2,
        global_batch=4 * world_size,
        ema_decay=0.9,
    )


def train_one_step(engine: TrainingEngine, train: TrainConfig) -> None:
    for _ in range(engine.accumulation):
        x = torch.ones(train.micro_batch, tiny.WIDTH)
        engine.backward(engine.forward({"x": x}, sample_generators(0, "noise", [0, 1]))["loss"])
        engine.step(1e-3)


def state_bytes(engine: TrainingEngine) -> tuple[int, int]:
    """Measured: bytes of fp32 masters and moments, and of the average, on this rank."""
    optimizer = average = 0
    for piece in engine.fragments():
        for kind, value in piece.tensors.items():
            size = value.numel() * value.element_size()
            average, optimizer = (average + size, optimizer) if kind == "ema" else (average, optimizer + size)
    return optimizer, average


def compare(stage: int, precision: str, world_size: int, monkey: pytest.MonkeyPatch) -> None:
    train = settings(stage, precision, world_size)
    engine = TrainingEngine(Wide(), train, world_size)
    parameters = sum(p.numel() for p in Wide().parameters())
    trained = sum(p.numel() for p in Wide().parameters() if p.requires_grad)
    train_one_step(engine, train)
    expected = footprint(parameters, trained, 0, train, world_size)
    optimizer, average = state_bytes(engine)
    if stage > 0:
        # Without ZeRO `pieces` deals out what every rank holds whole.
        assert optimizer == pytest.approx(expected.optimizer, rel=0.02)
        assert average == pytest.approx(expected.average, rel=0.02)
    weights = sum(getattr(p, "ds_tensor", p).nbytes for p in engine.module.parameters())
    assert weights == pytest.approx(expected.weights, rel=0.02)
    if stage == 1 and precision == "bf16":
        kept = sum(flat.nbytes for flat in engine.engine.optimizer.fp32_groups_gradients_flat)
        assert kept == pytest.approx(expected.gradients, rel=0.02)
    if world_size > 1:
        sent = count_traffic(monkey, world_size)
        train_one_step(engine, train)
        if stage < 3:
            assert sent[0] == pytest.approx(sent_bytes(trained, train, world_size), rel=0.02), stage
        else:
            # So small a model is gathered once and kept; the gradients are scattered for every micro-batch.
            kept = (
                sent_bytes(trained, train, world_size) * (engine.accumulation + 1) / (3 * engine.accumulation)
            )
            assert 0.9 * kept <= sent[0] <= sent_bytes(trained, train, world_size), (sent, kept)


def count_traffic(monkey: pytest.MonkeyPatch, world_size: int) -> list[float]:
    """[Bytes that this rank sends from here on], as ring collectives send them, counted where DeepSpeed asks torch."""
    from deepspeed.comm.torch import TorchBackend

    # Name -> how often the whole tensor is sent, and which argument it is.
    shares = {"all_reduce": (2.0, 0), "all_gather_into_tensor": (1.0, 0), "reduce_scatter_tensor": (1.0, 1)}
    sent = [0.0]
    for name, (times, whole) in shares.items():
        real = getattr(TorchBackend, name)

        def call(self, *args, _real=real, _times=times, _whole=whole, **options):  # type: ignore[no-untyped-def]
            tensors = [one for one in (*args, *options.values()) if isinstance(one, torch.Tensor)]
            sent[0] += _times * tensors[_whole].nbytes * (world_size - 1) / world_size
            return _real(self, *args, **options)

        monkey.setattr(TorchBackend, name, call)
    return sent


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (3, "bf16")])
def test_memory_of_one_worker(process_group: None, stage: int, precision: str) -> None:
    with pytest.MonkeyPatch.context() as monkey:
        compare(stage, precision, 1, monkey)


def compare_on_two_ranks() -> None:
    for stage, precision in ((0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")):
        with pytest.MonkeyPatch.context() as monkey:
            compare(stage, precision, 2, monkey)


@pytest.mark.slow
def test_memory_and_traffic_of_two_workers(two_ranks: Ranks) -> None:
    two_ranks.run(compare_on_two_ranks)
