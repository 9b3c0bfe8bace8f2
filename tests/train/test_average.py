"""The average of the weights under every ZeRO stage, on one rank and on two, without Ray."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
import torch.distributed as distributed
from ranks import Ranks

from defi_platform.config import TrainConfig
from defi_platform.train.engine.deepspeed_engine import TrainingEngine
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.engine.sharded_state import Span

DECAY = 0.4


def follow_three_updates(stage: int, world_size: int) -> None:
    """Trains, keeps the average by hand from the whole weights, and compares."""
    torch.manual_seed(0)
    settings = TrainConfig(
        output="", zero_stage=stage, precision="fp32" if stage == 0 else "bf16", micro_batch=2,
        global_batch=2 * world_size, ema_decay=DECAY,
    )  # fmt: skip
    engine = TrainingEngine(tiny.TinyModel(dropout=0.0), settings, world_size)
    assert engine.ema
    weights = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    shapes = {name: p.shape for name, p in tiny.TinyModel(0.0).named_parameters()}
    by_hand = {name: engine.full_parameter(p) for name, p in weights.items()}
    rank = distributed.get_rank()
    for step in range(3):
        samples = [step * 2 * world_size + rank * 2 + number for number in range(2)]
        x = torch.stack([tiny._values("train", k) for k in samples])
        engine.backward(engine.forward({"x": x}, sample_generators(0, "noise", samples))["loss"])
        assert engine.step(1e-1)
        rate = min(DECAY, (1 + step) / (10 + step))
        for name, parameter in weights.items():
            by_hand[name] = rate * by_hand[name] + (1 - rate) * engine.full_parameter(parameter)

    def working_copies() -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in weights.items():
            with engine.gathered(parameter):
                found[name] = parameter.detach().clone()
        return found

    before = working_copies()
    with engine.ema_weights():
        inside = working_copies()
    for name in weights:
        whole = engine.ema.full(name, shapes[name])
        assert torch.allclose(whole, by_hand[name], rtol=1e-5, atol=1e-7), name
        assert torch.equal(inside[name], whole.to(inside[name].dtype)), name
        assert not torch.equal(inside[name], before[name]), name
    assert all(torch.equal(value, before[name]) for name, value in working_copies().items())
    check_that_it_can_be_restored(engine, settings, world_size)


def check_that_it_can_be_restored(engine: TrainingEngine, settings: TrainConfig, world_size: int) -> None:
    """Into a fresh engine, from the pieces that all ranks hand out."""
    own = [(piece.name, piece.start, piece.tensors) for piece in engine.fragments()]
    everyones: list[list[tuple[str, int, dict[str, torch.Tensor]]]] = [[] for _ in range(world_size)]
    distributed.all_gather_object(everyones, own)
    pieces = sorted((piece for of_rank in everyones for piece in of_rank), key=lambda piece: piece[1])

    def read(spans: list[Span]) -> Iterator[tuple[Span, torch.Tensor]]:
        for span in spans:
            whole = torch.cat([tensors[span.kind] for of, _, tensors in pieces if of == span.name])
            yield span, whole[span.start : span.stop]

    # Fresh weights, as of a run that has not begun: another seed's.
    torch.manual_seed(1)
    fresh = TrainingEngine(tiny.TinyModel(dropout=0.0), settings, world_size)
    fresh.restore_share(engine.scalars(), read)
    fresh.end_restore(engine.scalars())
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            there = fresh.module.get_parameter(name)
            with engine.gathered(parameter), fresh.gathered(there):
                assert torch.equal(there, parameter), f"{name}: the working copy of every rank"
    assert fresh.scalars() == engine.scalars()
    for (name, start, mine), piece in zip(own, fresh.fragments(), strict=True):
        assert (piece.name, piece.start) == (name, start)
        for kind, value in mine.items():
            assert torch.equal(piece.tensors[kind], value), (name, kind)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_validation_sees_the_average_and_training_its_own_weights(process_group: None, stage: int) -> None:
    follow_three_updates(stage, world_size=1)


def test_weights_set_by_hand_start_their_average_anew(process_group: None) -> None:
    engine = TrainingEngine(
        tiny.TinyModel(0.0), TrainConfig(output="", global_batch=2, micro_batch=2, ema_decay=0.9), 1
    )
    bias = engine.module.get_submodule("out").bias
    assert isinstance(bias, torch.nn.Parameter) and engine.ema
    before = engine.ema.full("out.bias", bias.shape)
    changed = before.clone()
    changed[2] = 5.0
    engine.ema.fragment("out.bias").add_(1.0)
    engine.set_parameter(bias, changed)
    expected = before + 1
    expected[2] = 5.0
    assert torch.equal(engine.ema.full("out.bias", bias.shape), expected)


def follow_on_two_ranks() -> None:
    for stage in (0, 2, 3):
        follow_three_updates(stage, world_size=2)


@pytest.mark.slow
def test_two_ranks_hold_one_average_between_them(two_ranks: Ranks) -> None:
    two_ranks.run(follow_on_two_ranks)
