"""Comparison of our models with tensors recorded from the reference implementation: a row per recorded output.

    python -m defi_models.parity FOLDER

FOLDER holds any of `gidm.safetensors`, `policy.safetensors` and `gfdm/`; sizes come from the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from defi_models.conversion.infer_sizes import gidm_sizes, policy_sizes
from defi_models.conversion.name_map import gidm_rules, policy_rules, to_ours
from defi_models.encoders.block_dct import BlockDctPatches
from defi_models.encoders.hashed_text import HashedText
from defi_models.errors import ModelFolderError
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.layers.latent_actions import LatentActionEncoder
from defi_models.pretrained.folder import load_exactly

OUTPUT_TOLERANCE = 1e-4
"""Absolute, on outputs of order 1."""
UNET_TOLERANCE = 1e-5
"""Absolute, on GFDM's loss and UNet output."""


@dataclass(frozen=True)
class Row:
    """One recorded output compared with ours."""

    model: str
    """gidm, policy or gfdm."""
    output: str
    """Name of the recorded output."""
    difference: float | None
    """Largest absolute difference; None where we compute no such output."""
    tolerance: float
    """0 means exact."""

    @property
    def passed(self) -> bool:
        """True when the difference is within the tolerance."""
        return self.difference is not None and self.difference <= self.tolerance


@dataclass(frozen=True)
class Recording:
    """One file of recorded tensors."""

    path: Path
    """The file."""
    config: dict[str, Any]
    """Configuration of the reference, from the file's metadata."""
    weights: dict[str, Tensor]
    """Weights by their released names."""
    inputs: dict[str, Tensor]
    """Recorded inputs by name."""
    outputs: dict[str, Tensor]
    """Recorded outputs by name."""


def read_recording(path: Path) -> Recording:
    """Recorded tensors of a file.

    Raises:
        ModelFolderError: When the file is missing, damaged or has no config in its metadata.
    """
    if not path.is_file():
        raise ModelFolderError(f"recorded tensors {path} do not exist.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is not a whole safetensors file: {error}") from error
    if "config" not in metadata:
        raise ModelFolderError(f"{path} has no 'config' in its metadata; sizes are read from there.")
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "input": {}, "output": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group not in groups:
            raise ModelFolderError(f"{path} holds '{name}'; names start with weights., input. or output.")
        groups[group][rest] = tensor
    config = json.loads(metadata["config"])
    return Recording(path, config, groups["weights"], groups["input"], groups["output"])


@torch.no_grad()
def gidm_outputs(recording: Recording) -> dict[str, Tensor]:
    """Every output of the latent action model."""
    inputs, sizes = recording.inputs, gidm_sizes(recording.weights, recording.config)
    model = GIDM(
        GIDM.Config(
            patches=_stand_in_patches(sizes.patch_dim),
            text=HashedText.Config(dim=sizes.text_dim),
            encoder=_with_quirks(sizes.encoder),
            decoder=sizes.decoder,
        )
    ).eval()
    translated = to_ours(recording.weights, gidm_rules())
    _refuse_unexpected(recording.path, translated.unexpected_keys)
    load_exactly(
        model, translated.tensors | {"encoder.codebook.usage": _usage(model.encoder)}, str(recording.path)
    )
    found = model.loss(inputs["dino_features"], inputs["text_features"], inputs["text_mask"].bool())
    actions = found.actions
    assert actions.indices is not None and model.codebook is not None
    return {
        "pre_quant": actions.latents,
        "code": model.codebook.look_up(actions.indices),
        "z_q": actions.tokens[:, None],
        "indices": actions.indices,
        "recon": found.predicted[:, None],
        "target": inputs["dino_features"][:, 1:],
        "mse_loss": found.reconstruction_loss,
        "q_loss": actions.codebook_loss,
        "commit_loss": actions.commitment_loss,
        "loss": found.loss,
    }


@torch.no_grad()
def policy_outputs(recording: Recording) -> dict[str, Tensor]:
    """Every output of the fused policy from GFDM's features on."""
    inputs, sizes = recording.inputs, policy_sizes(recording.weights, recording.config)
    quirky = replace(sizes.adapter, latent_actions=_with_quirks(sizes.adapter.latent_actions))
    adapter = replace(sizes, adapter=quirky).build().eval()
    translated = to_ours(recording.weights, policy_rules(reads_proprio=False))
    unused = ("model.inner_model.goal_emb.", "model.inner_model.proprio_emb.", "model.inner_model.pos_emb")
    _refuse_unexpected(
        recording.path, [name for name in translated.unexpected_keys if not name.startswith(unused)]
    )
    usage = {"latent_actions.codebook.usage": _usage(adapter.latent_actions)}
    load_exactly(adapter, translated.tensors | usage, str(recording.path))

    views = [inputs[name] for name in ("features_static", "features_gripper") if name in inputs]
    features = torch.stack(views, dim=1)
    perception = adapter.perceive(features, inputs["text_features"], inputs["text_mask"].bool())
    context = adapter.context(perception, inputs["lang_goal"][:, 0], None)
    action_loss, output = adapter.head.loss(
        context, inputs["actions"], sigma=inputs["sigma"], noise=inputs["noise"]
    )
    assert perception.actions.indices is not None
    return {
        "gidm_input": adapter.projector(features[:, 0]),
        "video_former": perception.video,
        "pre_quant": perception.actions.latents,
        "indices": perception.actions.indices,
        "motion_tokens": perception.motion,
        "q_loss": perception.actions.codebook_loss,
        "model_output": output,
        "action_loss": action_loss,
        "total_loss": action_loss + perception.actions.vq_loss,
        "sigmas": adapter.head.sigmas(output.device),
        "sampled_actions": adapter.head.sample(context, inputs["sample_noise"]),
    }


@torch.no_grad()
def gfdm_outputs(folder: Path) -> tuple[Recording, dict[str, Tensor]]:
    """Training and feature-extraction outputs of a diffusers SVD folder with `tensors.safetensors`."""
    recording = read_recording(folder / "tensors.safetensors")
    inputs, config = recording.inputs, recording.config
    height, width = inputs["image"].shape[-2:]
    model = GFDM.from_svd(
        folder,
        HashedText(HashedText.Config(dim=inputs["text_features"].shape[-1])),
        height=height,
        width=width,
        frames=inputs["sample_noise"].shape[1],
        sigma_mean=config["P_mean"],
        sigma_std=config["P_std"],
        fps=float(config["fps_train"]),
        feature_fps=float(config["fps_extract"]),
        motion_bucket=float(config["motion_bucket_id"]),
        noise_augmentation=float(config["noise_aug_strength"]),
        feature_blocks=tuple(config["extract_up_blocks"]),
        feature_steps=config["num_inference_steps"],
    )
    captured: list[Tensor] = []
    hook = model.unet.register_forward_hook(lambda _module, _args, result: captured.append(result.sample))
    loss, _ = model.loss(
        inputs["latents"],
        inputs["text_features"],
        sigma_normal=inputs["sigma_normal"].flatten(),
        noise=inputs["noise"],
        keep_draw=inputs["text_keep_draw"],
    )
    hook.remove()
    condition = model.codec.encode(inputs["image"].flatten(0, 1))
    features = model.features_from_latents(condition, inputs["text_features"], inputs["sample_noise"])
    return recording, {
        "unet": captured[0],
        "loss": loss,
        "image_latents": condition,
        "first_timestep": torch.tensor(model.first_step.timestep),
        "init_noise_sigma": torch.tensor(model.first_step.noise_scale),
        "features": features,
    }


def compare(folder: str | Path) -> list[Row]:
    """A row per recorded output of every file in `folder`.

    Attention runs through the plain kernel, whose rounding is that of the reference's hand-made attention;
    the fused CPU kernel computes the same within about twice the float32 noise.

    Args:
        folder: holds any of `gidm.safetensors`, `policy.safetensors` and `gfdm/`.

    Raises:
        ModelFolderError: When the folder holds none of them or one is damaged.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return _compare(Path(folder))


def _compare(folder: Path) -> list[Row]:
    rows: list[Row] = []
    parts: dict[str, Callable[[Recording], dict[str, Tensor]]] = {
        "gidm": gidm_outputs,
        "policy": policy_outputs,
    }
    for model, compute in parts.items():
        if (folder / f"{model}.safetensors").is_file():
            recording = read_recording(folder / f"{model}.safetensors")
            rows += _rows(model, recording.outputs, compute(recording))
    if (folder / "gfdm").is_dir():
        recording, ours = gfdm_outputs(folder / "gfdm")
        rows += _rows("gfdm", recording.outputs, ours)
    if not rows:
        raise ModelFolderError(f"{folder} holds none of gidm.safetensors, policy.safetensors, gfdm/.")
    return rows


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 all within tolerance, 1 not all, 2 an unreadable folder."""
    parser = argparse.ArgumentParser(prog="python -m defi_models.parity", description=__doc__)
    parser.add_argument("folder", help="folder of recorded tensors")
    arguments = parser.parse_args(argv)
    try:
        rows = compare(arguments.folder)
    except ModelFolderError as error:
        print(f"parity: {error}", file=sys.stderr)
        return 2
    print(f"{'model':8}{'output':20}{'max abs difference':>20}{'tolerance':>12}  result")
    for row in rows:
        difference = "not computed" if row.difference is None else f"{row.difference:.3e}"
        tolerance = "exact" if row.tolerance == 0 else f"{row.tolerance:.0e}"
        result = "ok" if row.passed else "FAIL"
        print(f"{row.model:8}{row.output:20}{difference:>20}{tolerance:>12}  {result}")
    failed = sum(not row.passed for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} outputs within tolerance")
    return 1 if failed else 0


def _rows(model: str, recorded: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> list[Row]:
    rows = []
    for name, expected in recorded.items():
        exact = not expected.is_floating_point()
        tolerance = UNET_TOLERANCE if model == "gfdm" and name in ("loss", "unet") else OUTPUT_TOLERANCE
        difference = None
        if name in ours and ours[name].shape == expected.shape:
            difference = float((ours[name].double() - expected.double()).abs().max())
        rows.append(Row(model, name, difference, 0.0 if exact else tolerance))
    return rows


def _stand_in_patches(dim: int) -> BlockDctPatches.Config:
    """Recorded features replace the patch encoder; only its width counts."""
    block = 8 if dim <= 3 * 64 else 16
    return BlockDctPatches.Config(block=block, luma=dim - 2 * (dim // 3), chroma=dim // 3)


def _with_quirks(encoder: LatentActionEncoder.Config) -> LatentActionEncoder.Config:
    """The parity preset: the reference's quirks on."""
    return replace(encoder, tiled_text_mask=True)


def _usage(encoder: LatentActionEncoder) -> Tensor:
    assert encoder.codebook is not None
    return encoder.codebook.usage


def _refuse_unexpected(path: Path, keys: list[str]) -> None:
    if keys:
        raise ModelFolderError(f"{path} has unexpected keys, which no rule takes: {', '.join(keys[:5])}.")


if __name__ == "__main__":
    raise SystemExit(main())
