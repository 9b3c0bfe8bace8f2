from __future__ import annotations

import os
from pathlib import Path

import public_backbones
import pytest
import torch
from model_samples import generators, observation
from safetensors.torch import load_file, save_file

from defi_models.conversion import cli as convert
from defi_models.conversion.name_map import policy_rules, to_released
from defi_models.errors import ModelFolderError
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.policy import DeFIPolicy


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in load_file(path).items() if not name.startswith(("input.", "output."))}


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("kind", ["gidm", "policy"])
def test_a_released_file_comes_back_bit_identical(shared_parity: Path, tmp_path: Path, kind: str) -> None:
    source = shared_parity / f"{kind}.safetensors"
    report = convert.reference_to_ours(source, tmp_path / "ours")
    convert.ours_to_reference(tmp_path / "ours", tmp_path / "back.safetensors")
    assert identical(weights(source), weights(tmp_path / "back.safetensors"))
    known = {name for name, _ in report.used} | set(report.unexpected_keys)
    assert known == {name.removeprefix("weights.") for name in weights(source)} and report.used


def test_a_lightning_gidm_comes_back_with_its_prefix(shared_parity: Path, tmp_path: Path) -> None:
    plain = {
        name.removeprefix("weights."): t for name, t in weights(shared_parity / "gidm.safetensors").items()
    }
    state = {f"lam.{name}": tensor for name, tensor in plain.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "gidm.ckpt")
    convert.reference_to_ours(tmp_path / "gidm.ckpt", tmp_path / "ours")
    convert.ours_to_reference(tmp_path / "ours", tmp_path / "back.ckpt")
    assert identical(state, torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"])


def test_the_published_dino_inside_a_checkpoint_is_used(shared_parity: Path, tmp_path: Path) -> None:
    state = {
        name.removeprefix("weights."): t for name, t in weights(shared_parity / "gidm.safetensors").items()
    }
    width = 768
    frozen = {
        "dino_encoder.cls_token": torch.randn(1, 1, width),
        "dino_encoder.blocks.0.attn.qkv.weight": torch.randn(3 * width, width),
        "dino_encoder.blocks.0.ls1.gamma": torch.randn(width),
    }
    from defi_models.conversion.name_map import gidm_rules, to_ours

    found = to_ours(state | frozen, gidm_rules())
    prefix = "patch_encoder.model.encoder.layer.0."
    assert found.unexpected_keys == []
    assert torch.equal(
        found.tensors[prefix + "attention.k_proj.weight"],
        frozen["dino_encoder.blocks.0.attn.qkv.weight"][width : 2 * width],
    )
    assert identical(to_released(found.tensors, gidm_rules()).tensors, state | frozen)


def test_every_key_is_listed(shared_parity: Path, tmp_path: Path, capsys) -> None:
    source = shared_parity / "policy.safetensors"
    arguments = ["--from", "reference", "--to", "ours", str(source), str(tmp_path / "ours")]
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out
    names = [name.removeprefix("weights.") for name in weights(source)]
    assert all(f"used        {name} ->" in printed or f"unexpected  {name}\n" in printed for name in names)
    assert "unexpected  model.inner_model.pos_emb" in printed and "missing     gfdm" in printed


def test_a_folder_without_its_backbones_says_what_to_do(shared_parity: Path, tmp_path: Path) -> None:
    convert.reference_to_ours(shared_parity / "gidm.safetensors", tmp_path / "ours")
    with pytest.raises(ModelFolderError, match="converted without patch_encoder, text_encoder"):
        GIDM.from_pretrained(tmp_path / "ours")


def test_a_whole_policy_made_of_public_folders_acts_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = public_backbones.save_clip(tmp_path / "clip")
    svd = public_backbones.save_svd(tmp_path / "svd")
    t5 = public_backbones.save_t5(tmp_path / "t5")
    released = released_policy(frames=4, feature_dim=128, text_dim=24, goal_dim=24, frame_pair_last=5)
    save_file(released, tmp_path / "policy.safetensors")
    with pytest.raises(ModelFolderError, match="frames"):
        convert.reference_to_ours(tmp_path / "policy.safetensors", tmp_path / "ours")

    released = released_policy(frames=6, feature_dim=128, text_dim=24, goal_dim=24, frame_pair_last=5)
    save_file(released, tmp_path / "policy.safetensors")
    gfdm = GFDM.from_svd(
        svd, convert.ClipText.from_folder(clip), height=64, width=64, frames=6
    ).save_pretrained(tmp_path / "gfdm")
    backbones = convert.Backbones(gfdm=gfdm, t5=t5)
    report = convert.reference_to_ours(tmp_path / "policy.safetensors", tmp_path / "ours", backbones)
    policy = DeFIPolicy.from_pretrained(tmp_path / "ours")
    batch = observation(1)
    del batch["proprio"]
    assert report.missing_parts == [] and policy.act(batch, generators(1)).shape == (1, 10, 7)
    convert.ours_to_reference(tmp_path / "ours", tmp_path / "back.safetensors")
    assert identical(released, weights(tmp_path / "back.safetensors"))


def released_policy(
    *, frames: int, feature_dim: int, text_dim: int, goal_dim: int, frame_pair_last: int
) -> dict:
    """A random policy under the released names."""
    from defi_models.layers.action_head import ActionHead
    from defi_models.layers.adapter import PolicyAdapter
    from defi_models.layers.latent_actions import LatentActionEncoder
    from defi_models.layers.video_former import VideoFormer

    adapter = PolicyAdapter(
        PolicyAdapter.Config(
            frame_pair=(0, min(frame_pair_last, frames - 1)),
            latent_actions=LatentActionEncoder.Config(dim=64, blocks=1, heads=1, latent_dim=8),
            video_former=VideoFormer.Config(dim=32, depth=1, frames=frames, queries_per_frame=2, head_dim=8),
            head=ActionHead.Config(dim=32, context_blocks=1, action_blocks=1),
        ),
        feature_dim=feature_dim,
        tokens_per_frame=0,
        patch_dim=48,
        text_dim=text_dim,
        goal_dim=goal_dim,
    )
    return to_released(adapter.state_dict(), policy_rules(reads_proprio=False)).tensors


def test_a_gfdm_folder_comes_back_bit_identical(shared_parity: Path, tmp_path: Path) -> None:
    convert.reference_to_ours(shared_parity / "gfdm", tmp_path / "ours")
    convert.ours_to_reference(tmp_path / "ours", tmp_path / "back")
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert identical(load_file(shared_parity / "gfdm" / name), load_file(tmp_path / "back" / name))
    from defi_models.conversion import parity

    assert all(row.passed for row in parity._rows("gfdm", *outputs(tmp_path / "back")))


def outputs(folder: Path) -> tuple[dict, dict]:
    from defi_models.conversion import parity

    recording, ours = parity.gfdm_outputs(folder)
    return recording.outputs, ours


def test_an_incomplete_checkpoint_lists_its_missing_keys_and_writes_nothing(
    shared_parity: Path, tmp_path: Path, capsys
) -> None:
    whole = weights(shared_parity / "gidm.safetensors")
    del whole["weights.decoder.out.bias"]
    save_file(whole, tmp_path / "part.safetensors")
    arguments = [str(tmp_path / "part.safetensors"), str(tmp_path / "ours")]
    assert convert.main(["--from", "reference", "--to", "ours", *arguments]) == 2
    assert "missing keys: decoder.out.bias" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


class Harmful:
    """Unpickling it would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hook": Harmful(tmp_path / "ran")}, tmp_path / "bad.ckpt")
    with pytest.raises(ModelFolderError, match="could run code"):
        convert.reference_to_ours(tmp_path / "bad.ckpt", tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_named(shared_parity: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": weights(shared_parity / "gidm.safetensors")}, tmp_path / "gidm.ckpt")
    (tmp_path / "gidm.ckpt").write_bytes((tmp_path / "gidm.ckpt").read_bytes()[:100_000])
    with pytest.raises(ModelFolderError, match=r"gidm\.ckpt"):
        convert.reference_to_ours(tmp_path / "gidm.ckpt", tmp_path / "ours")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"embedding": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelFolderError, match="neither a policy's"):
        convert.reference_to_ours(tmp_path / "other.safetensors", tmp_path / "ours")


def test_options_that_the_reference_lacks_are_not_dropped_in_silence(
    policy: DeFIPolicy, tmp_path: Path
) -> None:
    policy.save_pretrained(tmp_path / "ours")
    with pytest.raises(ModelFolderError, match=r"video_former\.position_embedding"):
        convert.ours_to_reference(tmp_path / "ours", tmp_path / "back.safetensors")
