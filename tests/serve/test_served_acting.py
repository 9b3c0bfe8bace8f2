"""A served policy acts as its folder says, or as the configuration says: then it is another policy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from robot_messages import observation

from defi_platform.config import EvaluateConfig, InferenceConfig, ServeConfig, ServedActingConfig
from defi_platform.errors import ConfigError
from defi_platform.evaluate import rollouts
from defi_platform.serve.deployment.policy_digest import policy_digest
from defi_platform.serve.deployment.startup_checks import check_before_start
from defi_platform.serve.inference.forward import PolicyForward
from defi_platform.serve.observation import read_observation


@pytest.fixture
def old_folder(policy_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(policy_folder, tmp_path / "old")
    (tmp_path / "old" / "acting.json").unlink()
    return tmp_path / "old"


def test_other_settings_are_another_policy_and_the_same_ones_are_not(policy_folder: Path) -> None:
    own = policy_digest(str(policy_folder))
    assert policy_digest(str(policy_folder), ServedActingConfig()) == own
    assert policy_digest(str(policy_folder), ServedActingConfig(steps=10, sigma_min=0.001)) == own
    others = [
        ServedActingConfig(sigma_min=1.0),
        ServedActingConfig(steps=9),
        ServedActingConfig(execute_steps=5),
    ]
    digests = {policy_digest(str(policy_folder), other) for other in others}
    assert len(digests) == 3 and own not in digests


def test_the_configuration_changes_the_actions_and_the_greeting(policy_folder: Path) -> None:
    plain = PolicyForward(str(policy_folder), threads=1)
    settings = ServedActingConfig(sigma_min=1.0, gripper="binary", execute_steps=3)
    other = PolicyForward(str(policy_folder), threads=1, acting=settings)
    seen = read_observation(observation(1), plain.spec)
    before, after = plain([seen])[0], other([seen])[0]
    assert not np.allclose(before[:, 0], after[:, 0]) and set(after[:, -1]) <= {-1.0, 1.0}
    greeting = other.spec.metadata()
    assert (greeting["acting"]["sigma_min"], greeting["acting"]["gripper"]) == (1.0, "binary")
    assert greeting["action"]["execute_steps"] == 3
    assert plain.spec.metadata()["acting"]["sigma_min"] == 0.001


def test_a_folder_from_before_is_served_as_before_and_the_start_says_so(
    old_folder: Path, policy_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_before_start(ServeConfig(policy=str(old_folder)))
    said = capsys.readouterr().out
    assert "does not say how it acts" in said and "10 denoising steps down to 0.001" in said
    check_before_start(ServeConfig(policy=str(policy_folder)))
    assert capsys.readouterr().out == ""
    old, new = (PolicyForward(str(folder), threads=1) for folder in (old_folder, policy_folder))
    seen = read_observation(observation(1), new.spec)
    assert np.array_equal(old([seen])[0], new([seen])[0])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (ServedActingConfig(clip="range"), "acting.clip is 'range'"),
        (ServedActingConfig(execute_steps=0), "acting.execute_steps is 0"),
        (ServedActingConfig(steps=0), "acting.steps is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_starts(
    policy_folder: Path, settings: ServedActingConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_before_start(ServeConfig(policy=str(policy_folder), acting=settings))


def test_a_package_that_is_no_file_is_refused_before_anything_starts(policy_folder: Path) -> None:
    for path in (policy_folder, policy_folder / "none.pt2"):
        with pytest.raises(ConfigError, match=r"model.package=.* is no file"):
            check_before_start(
                ServeConfig(policy=str(policy_folder), model=InferenceConfig(package=str(path)))
            )


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (ServedActingConfig(execute_steps=11), "a chunk has 10 actions"),
        (ServedActingConfig(gripper="binary", gripper_entries=[7]), "an action has entries 0 to 3"),
    ],
)
def test_settings_that_do_not_fit_the_policy_are_refused(
    policy_folder: Path, settings: ServedActingConfig, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        PolicyForward(str(policy_folder), threads=1, acting=settings)


def test_an_evaluation_with_other_settings_is_one_of_the_policy_that_is_served_for_it(
    policy_folder: Path,
) -> None:
    served = ServeConfig(policy=str(policy_folder), acting=ServedActingConfig(sigma_min=1.0))
    asked = EvaluateConfig(
        serve=served,
        tasks=["drawer-close-v3"],
        cameras=["workspace"],
        policy_cameras={"workspace": "front"},
        output="",
    )
    greeting, _ = rollouts._identified(asked)
    assert greeting["policy_digest"] == policy_digest(served.policy, served.acting)
