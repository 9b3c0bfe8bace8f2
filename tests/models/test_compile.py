from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from model_samples import TEXTS, generators, labelled, observation, pixels

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.policy import DeFIPolicy


@pytest.fixture
def policy(gfdm: GFDM, gidm: GIDM) -> DeFIPolicy:
    """One block of each sort: every further one is captured and compiled again."""
    head = {"dim": 32, "context_blocks": 1, "action_blocks": 1}
    adapter = {"frame_pair": [0, 2], "video_former": {"dim": 32, "depth": 1}, "head": head}
    return DeFIPolicy.fuse(presets.policy("nano", views=2, adapter=adapter), gfdm, gidm).eval()


@pytest.mark.slow
def test_a_compiled_policy_acts_and_learns_as_the_plain_one(policy: DeFIPolicy) -> None:
    compiled = copy.deepcopy(policy)
    compiled.compile_parts(backend="aot_eager")  # the captured graphs without minutes of code generation
    batch = observation(1)
    assert torch.allclose(compiled.act(batch, generators(1)), policy.act(batch, generators(1)), atol=1e-4)
    losses = [model(labelled(1), generators(1))["loss"] for model in (policy, compiled)]
    assert torch.allclose(*losses, rtol=1e-4)
    assert compiled.state_dict().keys() == policy.state_dict().keys()


@pytest.mark.slow
def test_a_compiled_gidm_has_the_loss_and_gradients_of_the_plain_one(gidm: GIDM) -> None:
    compiled = copy.deepcopy(gidm)
    compiled.compile_parts(backend="aot_eager")
    batch = {"frames": pixels(2, 2), "text": TEXTS[:2]}
    losses = [model(batch)["loss"] for model in (gidm, compiled)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-4)
    assert torch.allclose(compiled.encoder.queries.grad, gidm.encoder.queries.grad, rtol=1e-3, atol=1e-6)


def test_acting_runs_the_head_s_compiled_blocks_at_every_batch_size(policy: DeFIPolicy) -> None:
    torch._dynamo.reset()
    head = policy.adapter.head
    captured: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        captured.append(graph)
        return graph.forward

    sizes = range(2, 12)  # PyTorch by itself gives up compiling at the ninth
    expected = [head.sample(torch.ones(size, 5, 32), torch.ones(size, 10, 4)) for size in sizes]
    head.compile_blocks(backend=backend, dynamic=False)
    with torch.no_grad():
        for size, plain in zip(sizes, expected, strict=True):
            found = head.sample(torch.ones(size, 5, 32), torch.ones(size, 10, 4))
            assert torch.allclose(found, plain, atol=1e-6)
    assert len(captured) == len(sizes)


@pytest.mark.slow
def test_generated_code_samples_the_actions_of_the_plain_head(policy: DeFIPolicy) -> None:
    compiled = copy.deepcopy(policy)
    compiled.adapter.head.compile_blocks(backend="inductor")
    batch = observation(1)
    assert torch.allclose(compiled.act(batch, generators(1)), policy.act(batch, generators(1)), atol=1e-5)
