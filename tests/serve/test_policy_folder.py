"""Policy folders that cannot be served."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.serve.deployment.startup_checks import check_policy_folder
from defi_platform.storage import StorageError


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
