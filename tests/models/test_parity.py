from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from defi_models.conversion import parity


def rewrite(path: Path, change: dict) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.unlink()
    save_file(tensors | {name: edit(tensors[name]) for name, edit in change.items()}, path, metadata)


def test_every_recorded_output_is_reproduced(shared_parity: Path) -> None:
    rows = parity.compare(shared_parity)
    assert [row for row in rows if not row.passed] == []
    assert {row.model for row in rows} == {"gidm", "policy", "gfdm"}
    assert all(row.tolerance == 0 for row in rows if row.output == "indices")


def test_the_fused_attention_kernels_agree_with_the_recordings_too(shared_parity: Path) -> None:
    recording = parity.read_recording(shared_parity / "policy.safetensors")
    ours = parity.policy_outputs(recording)
    assert all((ours[name] - recorded).abs().max() < 1e-4 for name, recorded in recording.outputs.items())


def test_the_command_prints_a_row_per_output_and_succeeds(shared_parity: Path, capsys) -> None:
    assert parity.main([str(shared_parity)]) == 0
    printed = capsys.readouterr().out
    assert "sampled_actions" in printed and "27 of 27 outputs within tolerance" in printed


def test_a_changed_output_fails_the_command(shared_parity: Path, tmp_path: Path, capsys) -> None:
    shutil.copy(shared_parity / "gidm.safetensors", tmp_path)
    (tmp_path / "gidm.safetensors").chmod(0o644)
    rewrite(tmp_path / "gidm.safetensors", {"output.recon": lambda recon: recon + 2e-4})
    assert parity.main([str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert [line.split()[1] for line in failed] == ["recon"]


def test_a_changed_weight_fails_the_command(shared_parity: Path, tmp_path: Path) -> None:
    shutil.copy(shared_parity / "policy.safetensors", tmp_path)
    (tmp_path / "policy.safetensors").chmod(0o644)
    name = "weights.model.inner_model.decoder.blocks.0.ln3.bias"
    rewrite(tmp_path / "policy.safetensors", {name: lambda bias: bias + 0.1})
    assert parity.main([str(tmp_path)]) == 1


def test_without_the_mask_quirk_gidm_differs_from_the_recording(shared_parity: Path, monkeypatch) -> None:
    monkeypatch.setattr(parity, "_with_quirks", lambda encoder: encoder)
    recording = parity.read_recording(shared_parity / "gidm.safetensors")
    difference = (parity.gidm_outputs(recording)["pre_quant"] - recording.outputs["pre_quant"]).abs().max()
    assert difference > 1e-3


def test_a_folder_without_recordings_is_an_error_that_says_what_is_expected(tmp_path: Path, capsys) -> None:
    assert parity.main([str(tmp_path)]) == 2
    assert "gidm.safetensors" in capsys.readouterr().err


def test_a_truncated_recording_is_an_error_that_names_the_file(
    shared_parity: Path, tmp_path: Path, capsys
) -> None:
    whole = (shared_parity / "gidm.safetensors").read_bytes()
    (tmp_path / "gidm.safetensors").write_bytes(whole[:5000])
    assert parity.main([str(tmp_path)]) == 2
    assert "gidm.safetensors" in capsys.readouterr().err
