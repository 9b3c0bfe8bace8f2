from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from model_samples import generators, observation
from torch.fx.experimental.proxy_tensor import make_fx

from defi_models import presets
from defi_models.act.graphs import ActGraphs
from defi_models.act.inputs import ActInputs, gather
from defi_models.cost.operations import Operations
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.policy import DeFIPolicy


@pytest.fixture
def policy(gfdm: GFDM, gidm: GIDM) -> DeFIPolicy:
    torch.manual_seed(0)
    adapter = {"frame_pair": [0, 2], "video_former": {"dim": 32, "depth": 1}}
    return DeFIPolicy.fuse(presets.policy("nano", views=2, adapter=adapter), gfdm, gidm).eval()


class Traced:
    """Records as a CUDA graph does: each kernel with the memory that it reads, nothing of the host's part."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, run: Callable, inputs: ActInputs) -> tuple[Callable[[], object], torch.Tensor]:
        self.runs += 1
        graph = make_fx(lambda *tensors: run(ActInputs(*tensors)))(*inputs)
        output = run(inputs).fill_(float("nan"))
        return lambda: output.copy_(graph(*inputs)), output


def test_act_is_the_device_s_part_of_the_gathered_inputs(policy: DeFIPolicy) -> None:
    batch = observation(2)
    parts = policy.act_on(gather(policy, batch, generators(2)))
    assert torch.equal(policy.acting.applied(parts, None), policy.act(batch, generators(2)))


def test_the_device_s_part_never_meets_the_host(policy: DeFIPolicy) -> None:
    inputs = gather(policy, observation(1), generators(1))
    meta = policy.to("meta")
    moved = inputs._replace(**{name: each.to("meta") for name, each in inputs.tensors().items()})
    with Operations() as seen:
        assert meta.act_on(moved).shape == (1, 10, 4)
    assert (seen.waits, seen.uploads) == (0, 0) and seen.kernels > 100


def test_graphs_are_recorded_once_per_batch_size_and_replayed_with_new_inputs(policy: DeFIPolicy) -> None:
    expected = {
        (size, seed): policy.act(observation(size), [torch.Generator().manual_seed(seed)] * size)
        for size in (1, 2)
        for seed in (1, 2)
    }
    recorder = Traced()
    graphs = ActGraphs(policy, recorder)
    found = {
        (size, seed): policy.act(observation(size), [torch.Generator().manual_seed(seed)] * size)
        for size, seed in expected
    }
    assert recorder.runs == graphs.recorded == 2
    for key, chunk in expected.items():
        assert torch.allclose(found[key], chunk, atol=1e-5), key
    assert not torch.allclose(found[1, 1], found[1, 2], atol=1e-3)


def test_other_settings_of_acting_are_recorded_anew(policy: DeFIPolicy) -> None:
    graphs = ActGraphs(policy, Traced())
    batch = observation(1)
    first = policy.act(batch, generators(1))
    policy.set_acting(replace(policy.acting, steps=2))
    second = policy.act(batch, generators(1))
    policy.replay(None)
    assert graphs.recorded == 2 and not torch.equal(first, second)
    assert torch.allclose(second, policy.act(batch, generators(1)), atol=1e-5)


def test_a_policy_that_was_moved_is_recorded_anew_and_copies_replay_nothing(policy: DeFIPolicy) -> None:
    graphs = ActGraphs(policy, Traced())
    batch = observation(1)
    chunk = policy.act(batch, generators(1))
    compiled = copy.deepcopy(policy)
    compiled.compile_parts()
    for copied in (copy.deepcopy(policy), pickle.loads(pickle.dumps(compiled))):
        with torch.no_grad():
            copied.action_normalizer.offset.add_(1)
        assert torch.allclose(copied.act(batch, generators(1)), chunk + 1, atol=1e-4)
    assert graphs.recorded == 1
    policy.to(torch.bfloat16).to(torch.float32)  # rounds the weights
    again = policy.act(batch, generators(1))
    policy.replay(None)
    assert graphs.recorded == 2 and not torch.equal(again, chunk)
    assert torch.allclose(again, policy.act(batch, generators(1)), atol=1e-5)


def test_threads_replay_one_after_the_other(policy: DeFIPolicy) -> None:
    seeds = range(4)
    expected = [policy.act(observation(1), generators(1, seed)) for seed in seeds]

    class Slow(Traced):
        """Lets others in between inputs and outputs."""

        def __call__(self, run: Callable, inputs: ActInputs) -> tuple[Callable[[], object], torch.Tensor]:
            replay, output = super().__call__(run, inputs)
            return lambda: (time.sleep(0.02), replay(), time.sleep(0.02)), output

    ActGraphs(policy, Slow())
    with ThreadPoolExecutor(len(seeds)) as threads:
        found = list(threads.map(lambda seed: policy.act(observation(1), generators(1, seed)), seeds))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found, expected, strict=True))


def test_cuda_graphs_of_a_policy_on_the_cpu_are_refused(policy: DeFIPolicy) -> None:
    with pytest.raises(ValueError, match="CUDA device; it is on 'cpu'"):
        ActGraphs(policy)


def test_a_causal_cross_attention_leaves_of_the_context_what_it_can_see() -> None:
    head = {"causal_cross_attention": True, "chunk": 10}
    with torch.device("meta"):
        model = DeFIPolicy(presets.policy("nano", adapter={"head": head}))
    own, goal = model.adapter, torch.zeros(1, 64, device="meta")
    video, motion = torch.zeros(1, 64, 96, device="meta"), torch.zeros(1, 4, 96, device="meta")
    context = own.head.context(goal, video, motion, torch.zeros(1, 4, device="meta"))
    assert context.shape == (1, 10, 128)


def test_the_context_is_read_once_for_all_denoising_steps(policy: DeFIPolicy) -> None:
    head = policy.adapter.head
    context, start = torch.randn(1, 70, head.config.dim), torch.randn(1, 10, 4)
    work = {}
    for steps in (1, 2, 3):
        with torch.no_grad(), Operations() as seen:
            head.sample(context, start, head.sigmas(start.device, steps))
        work[steps] = seen.flops
    each = work[3] - work[2]
    reading = 2 * 2 * 70 * head.config.dim**2 * head.config.action_blocks
    assert work[2] - work[1] == each and work[1] - each >= reading > 0
