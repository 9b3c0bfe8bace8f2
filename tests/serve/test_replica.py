"""What a replica answers, without Serve around it."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from robot_messages import observation

from defi_models import presets
from defi_models.inputs.state_layout import StateEntry, StateLayout
from defi_models.policy import DeFIPolicy
from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.serve.observation import Observation, read_observation
from defi_platform.serve.replica import PolicyReplica
from defi_platform.serve.startup_checks import check_policy_folder
from defi_platform.storage import StorageError


@pytest.fixture(scope="module")
def replica(policy_folder: Path) -> PolicyReplica:
    return PolicyReplica(str(policy_folder), max_batch_size=8, threads=1)


def prepared(replica: PolicyReplica, number: int) -> Observation:
    return read_observation(observation(number), replica._spec)


def test_the_same_observation_and_seed_give_the_same_action_whatever_else_is_in_the_batch(
    replica: PolicyReplica,
) -> None:
    observations = [prepared(replica, number) for number in range(8)]
    alone = [replica.infer([each])[0] for each in observations]
    together = replica.infer(observations)
    reordered = replica.infer(observations[::-1])[::-1]
    span = float(np.ptp(np.stack(alone)))
    for one, other, third in zip(alone, together, reordered, strict=True):
        assert one.shape == (10, 4) and one.dtype == np.float32
        # Not bit for bit: matrix products of another batch size round differently.
        np.testing.assert_allclose(other, one, atol=1e-3 * span)
        np.testing.assert_allclose(third, one, atol=1e-3 * span)


def test_another_seed_gives_another_action(replica: PolicyReplica) -> None:
    first = prepared(replica, 1)
    one, other = replica.infer([first, replace(first, seed=99)])
    assert np.abs(one - other).max() > 0.01


def test_texts_of_unequal_length_do_not_mix_even_where_the_reference_mixes_them(tmp_path: Path) -> None:
    config = presets.policy("nano")
    quirky = replace(config.adapter.latent_actions, tiled_text_mask=True)
    torch.manual_seed(0)
    policy = DeFIPolicy(replace(config, adapter=replace(config.adapter, latent_actions=quirky)))
    replica = PolicyReplica(str(policy.save_pretrained(tmp_path / "policy")), threads=1)
    assert not replica._policy.adapter.latent_actions.config.tiled_text_mask
    observations = [prepared(replica, number) for number in (0, 2)]
    alone = replica.infer(observations[:1])[0]
    np.testing.assert_allclose(replica.infer(observations)[0], alone, atol=1e-3 * float(np.ptp(alone)))


def test_raw_states_are_taken_as_the_policy_folder_says(
    replica: PolicyReplica, policy_folder: Path, tmp_path: Path
) -> None:
    policy = DeFIPolicy.from_pretrained(policy_folder)
    entries = (
        StateEntry(index=5),
        StateEntry(index=0, angle="unwrap", around=3.0),
        StateEntry(index=2, angle="sin_cos"),
    )
    policy.contract = replace(policy.contract, state=StateLayout(raw_dim=6, entries=entries))
    other = PolicyReplica(str(policy.save_pretrained(tmp_path / "policy")), threads=1)
    assert other._spec.state_dim == 6 and len(other._spec.metadata()["state"]) == 3
    raw = np.array([-3.0, 9.0, 0.5, 9.0, 9.0, 0.25])
    seen = np.array([0.25, 2 * np.pi - 3.0, np.sin(0.5), np.cos(0.5)])
    answers = [
        one.infer([read_observation(observation(0, **{"observation/state": state}), one._spec)])[0]
        for one, state in ((other, raw), (replica, seen))
    ]
    np.testing.assert_allclose(*answers, atol=1e-5)


def test_a_folder_that_does_not_exist_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"no/such does not exist.*finetune_policy"):
        check_policy_folder("no/such")


def test_a_folder_of_another_model_is_refused(gfdm_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a 'gfdm' model, and only a policy"):
        check_policy_folder(str(gfdm_folder))


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_folder_with_a_truncated_weight_file_is_refused_before_anything_starts(
    policy_folder: Path, tmp_path: Path
) -> None:
    broken = copied(policy_folder, tmp_path / "policy") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors .* is damaged or cut short"):
        check_policy_folder(str(broken.parent))


@pytest.mark.parametrize(
    ("name", "complaint"), [("config.json", "no config.json"), ("model.safetensors", "not complete")]
)
def test_a_folder_that_lacks_a_file_is_refused(
    policy_folder: Path, tmp_path: Path, name: str, complaint: str
) -> None:
    partial = copied(policy_folder, tmp_path / "policy")
    (partial / name).unlink()
    with pytest.raises(CheckpointError, match=complaint):
        check_policy_folder(str(partial))


def test_a_remote_folder_whose_upload_was_cut_short_is_refused_before_anything_starts() -> None:
    folder = f"memory://{uuid.uuid4().hex}/policy"
    storage.write_text(storage.join(folder, "config.json"), "{}")
    check_policy_folder(folder)
    storage.write_text(storage.join(folder, storage.INCOMPLETE), "")
    with pytest.raises(StorageError, match="was not written to its end"):
        check_policy_folder(folder)
