"""Settings of acting: they change the actions and no weight, and stay with the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_samples import generators, observation

from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.inputs.acting import Acting
from defi_models.inputs.normalization import FieldStatistics, Statistics
from defi_models.policy import DeFIPolicy
from defi_models.pretrained.side_files import acting_from_mapping


def ranges(low: float, high: float) -> FieldStatistics:
    return FieldStatistics(mean=[0.0] * 4, std=[1.0] * 4, min=[low] * 4, max=[high] * 4)


def test_the_noise_levels_of_acting_are_not_those_of_training(policy: DeFIPolicy) -> None:
    head = policy.adapter.head
    device = torch.device("cpu")
    assert head.sigmas(device)[-2].item() == pytest.approx(0.001)
    sampled = head.sigmas(device, 5, 1.0)
    assert sampled.tolist() == pytest.approx([80.0, 80**0.75, 80**0.5, 80**0.25, 1.0, 0.0], rel=1e-5)
    before = policy.act(observation(1), generators(1))
    policy.set_acting(Acting(sigma_min=1.0))
    assert not torch.allclose(policy.act(observation(1), generators(1)), before)
    assert head.draw(4096, generators(4096), device)[0].min() < 0.2, (
        "training goes on below the 1.0 of acting"
    )


def test_actions_are_clipped_to_the_statistics_or_to_limits_and_the_gripper_is_binary(
    policy: DeFIPolicy,
) -> None:
    policy.set_statistics(Statistics(action=ranges(-0.01, 0.02), proprio=ranges(-1, 1)))
    policy.set_acting(Acting(clip="statistics"))
    clipped = policy.act(observation(2), generators(2))
    assert clipped.min() >= -0.01 and clipped.max() <= 0.02
    policy.set_acting(Acting(clip="limits", limits_low=(-1.0,) * 4, limits_high=(0.5,) * 4, gripper="binary"))
    acted = policy.act(observation(2), generators(2))
    assert acted[..., :3].max() <= 0.5 and set(acted[..., 3].unique().tolist()) <= {-1.0, 1.0}


def test_what_is_no_number_is_left_for_the_check_that_refuses_it() -> None:
    acting = Acting(
        clip="limits", limits_low=(-1, -1), limits_high=(1, 1), gripper="binary", gripper_entries=(1,)
    )
    given = torch.tensor([[[float("inf"), 0.3], [9.0, float("nan")], [-9.0, 0.0]]])
    left = acting.applied(given, None)[0]
    assert torch.isinf(left[0, 0]) and torch.isnan(left[1, 1])
    assert (left[0, 1], left[1, 0], left[2, 0], left[2, 1]) == (1.0, 1.0, -1.0, -1.0)


def test_a_folder_keeps_them_and_one_from_before_acts_as_before(policy: DeFIPolicy, tmp_path: Path) -> None:
    before = policy.act(observation(1), generators(1))
    policy.set_acting(Acting(steps=4, sigma_min=1.0, gripper="binary"))
    policy.save_pretrained(tmp_path / "p")
    loaded = DeFIPolicy.from_pretrained(tmp_path / "p")
    assert loaded.acting == policy.acting and loaded.acting_in_folder
    assert torch.equal(loaded.act(observation(1), generators(1)), policy.act(observation(1), generators(1)))
    file = tmp_path / "p" / "acting.json"
    file.unlink()
    old = DeFIPolicy.from_pretrained(tmp_path / "p")
    assert not old.acting_in_folder and torch.equal(old.act(observation(1), generators(1)), before)
    for damaged in ({"steps": "ten"}, {"sigma": 1.0}, {"gripper_entries": [9], "gripper": "binary"}, [3]):
        file.write_text(json.dumps(damaged))
        with pytest.raises(ModelFolderError, match=r"acting\.json"):
            DeFIPolicy.from_pretrained(tmp_path / "p")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"steps": 0}, "acting.steps is 0"),
        ({"sigma_min": 0.0}, "acting.sigma_min is 0"),
        ({"clip": "statistic"}, "acting.clip is 'statistic'; choose none, statistics, limits"),
        ({"clip": "limits"}, "give both"),
        ({"limits_low": [0.0], "limits_high": [1.0]}, "set acting.clip=limits"),
        (
            {"clip": "limits", "limits_low": [0.0, 2.0], "limits_high": [1.0, 1.0]},
            "the low one below the high",
        ),
        ({"gripper": "open"}, "acting.gripper is 'open'"),
        ({"step": 3}, "no field 'step'. Did you mean 'steps'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        acting_from_mapping(given)


@pytest.mark.parametrize(
    ("acting", "complaint"),
    [
        (Acting(sigma_min=80.0), "samples from 80 down"),
        (Acting(clip="statistics"), "has no statistics"),
        (Acting(clip="limits", limits_low=(0.0,), limits_high=(1.0,)), "have 1 entries, an action has 4"),
        (Acting(gripper="binary", gripper_entries=(4,)), "has 4, an action has entries 0 to 3"),
    ],
)
def test_settings_that_do_not_fit_a_policy_are_refused(
    policy: DeFIPolicy, acting: Acting, complaint: str
) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        policy.set_acting(acting)
