"""Forward passes of a served policy: what they compute does not depend on the company an observation has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from robot_messages import observation

from defi_models import presets
from defi_models.inputs.state_layout import StateEntry, StateLayout
from defi_models.policy import DeFIPolicy
from defi_platform.config import InferenceConfig
from defi_platform.serve.inference.forward import PolicyForward
from defi_platform.serve.observation import Observation, read_observation

ROUNDING, BFLOAT16 = 1e-5, 1e-2
"""Shares of the actions' range by which they may differ: in batches of another size, and in bfloat16."""


@pytest.fixture(scope="module")
def forward(policy_folder: Path) -> PolicyForward:
    return PolicyForward(str(policy_folder), threads=1, max_batch_size=4)


@pytest.fixture
def fixed_kernels() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def prepared(forward: PolicyForward, number: int) -> Observation:
    return read_observation(observation(number), forward.spec)


def test_the_same_observation_and_seed_give_the_same_action_whatever_else_is_in_the_batch(
    forward: PolicyForward,
) -> None:
    observations = [prepared(forward, number) for number in range(4)]
    alone = [forward([each])[0] for each in observations]
    together = forward(observations)
    reordered = forward(observations[::-1])[::-1]
    tolerance = ROUNDING * float(np.ptp(np.stack(alone)))
    for one, other, third in zip(alone, together, reordered, strict=True):
        assert one.shape == (10, 4) and one.dtype == np.float32
        # Not bit for bit: matrix products of another batch size round differently.
        np.testing.assert_allclose(other, one, atol=tolerance)
        np.testing.assert_allclose(third, one, atol=tolerance)


@pytest.mark.parametrize("shape", [None, 3])
def test_a_deterministic_policy_gives_the_same_action_bit_for_bit_in_any_batch(
    policy_folder: Path, fixed_kernels: None, shape: int | None
) -> None:
    settings = InferenceConfig(deterministic=True)
    forward = PolicyForward(str(policy_folder), threads=1, settings=settings, shape=shape)
    assert forward.warm_up().largest == (shape or 1)
    observations = [prepared(forward, number) for number in range(3)]
    alone = [forward([each])[0] for each in observations]
    if shape is not None:
        together, reordered = forward(observations), forward(observations[::-1])[::-1]
        assert all(
            (a == b).all() and (a == c).all() for a, b, c in zip(alone, together, reordered, strict=True)
        )
    again = PolicyForward(str(policy_folder), threads=1, settings=settings, shape=shape)
    assert (again([observations[1]])[0] == alone[1]).all()


def test_another_seed_gives_another_action(forward: PolicyForward) -> None:
    first = prepared(forward, 1)
    one, other = forward([first, replace(first, seed=99)])
    assert np.abs(one - other).max() > 0.01


def test_an_action_outlives_the_buffers_of_its_pass(forward: PolicyForward) -> None:
    (action,) = forward([prepared(forward, 1)])
    before = action.copy()
    forward([prepared(forward, 2)])
    assert (action == before).all()


def test_bfloat16_gives_the_actions_of_float32_to_its_precision(
    forward: PolicyForward, policy_folder: Path
) -> None:
    halved = PolicyForward(str(policy_folder), threads=1, settings=InferenceConfig(dtype="bfloat16"))
    observations = [prepared(forward, number) for number in range(2)]
    full, short = np.stack(forward(observations)), np.stack(halved(observations))
    np.testing.assert_allclose(short, full, atol=BFLOAT16 * float(np.ptp(full)))
    assert (short != full).any()


def test_texts_of_unequal_length_do_not_mix_even_where_the_reference_mixes_them(tmp_path: Path) -> None:
    config = presets.policy("nano")
    quirky = replace(config.adapter.latent_actions, tiled_text_mask=True)
    torch.manual_seed(0)
    policy = DeFIPolicy(replace(config, adapter=replace(config.adapter, latent_actions=quirky)))
    forward = PolicyForward(str(policy.save_pretrained(tmp_path / "policy")), threads=1)
    observations = [prepared(forward, number) for number in (0, 2)]
    alone = forward(observations[:1])[0]
    np.testing.assert_allclose(forward(observations)[0], alone, atol=ROUNDING * float(np.ptp(alone)))


def test_raw_states_are_taken_as_the_policy_folder_says(
    forward: PolicyForward, policy_folder: Path, tmp_path: Path
) -> None:
    policy = DeFIPolicy.from_pretrained(policy_folder)
    entries = (
        StateEntry(index=5),
        StateEntry(index=0, angle="unwrap", around=3.0),
        StateEntry(index=2, angle="sin_cos"),
    )
    policy.contract = replace(policy.contract, state=StateLayout(raw_dim=6, entries=entries))
    other = PolicyForward(str(policy.save_pretrained(tmp_path / "policy")), threads=1)
    assert other.spec.state_dim == 6 and len(other.spec.metadata()["state"]) == 3
    raw = np.array([-3.0, 9.0, 0.5, 9.0, 9.0, 0.25])
    seen = np.array([0.25, 2 * np.pi - 3.0, np.sin(0.5), np.cos(0.5)])
    answers = [
        one([read_observation(observation(0, **{"observation/state": state}), one.spec)])[0]
        for one, state in ((other, raw), (forward, seen))
    ]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_a_prompt_is_encoded_once_and_the_oldest_is_forgotten(policy_folder: Path) -> None:
    forward = PolicyForward(str(policy_folder), threads=1, settings=InferenceConfig(prompt_cache=2))
    encoder = forward._policy.gidm_text
    encoded: list[str] = []
    encode = encoder._encode_states
    encoder._encode_states = lambda texts: encoded.extend(texts) or encode(texts)  # type: ignore[method-assign]
    for number in (0, 0, 1, 2, 1, 0):  # three different prompts
        forward([prepared(forward, number)])
    prompts = [f"open the {'big ' * count}drawer" for count in (0, 1, 2, 0)]
    assert encoded == prompts


@pytest.mark.parametrize(("each_size_is_prepared", "sizes"), [(False, [1, 2]), (True, [1, 2, 4])])
def test_the_warm_up_runs_the_sizes_that_need_it_and_its_times_are_those_of_the_sizes(
    forward: PolicyForward, monkeypatch: pytest.MonkeyPatch, each_size_is_prepared: bool, sizes: list[int]
) -> None:
    monkeypatch.setattr(forward, "_padded", each_size_is_prepared)
    warm = forward.warm_up()
    assert list(warm.seconds) == sizes and warm.largest == 4 and min(warm.seconds.values()) > 0


def test_sizes_that_do_not_fit_into_memory_lower_the_largest_batch(
    forward: PolicyForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = forward._policy.act
    monkeypatch.setattr(forward, "_padded", True)  # as on a GPU, every size is tried

    def small_memory(batch: dict[str, list[str]], generator: object) -> torch.Tensor:
        if len(batch["text"]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return act(batch, generator)  # type: ignore[arg-type]

    monkeypatch.setattr(forward._policy, "act", small_memory)
    assert forward.warm_up().largest == 2
