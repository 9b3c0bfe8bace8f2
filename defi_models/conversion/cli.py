"""Converter of released checkpoints into our model folders and back, bit for bit.

    python -m defi_models.convert --from reference --to ours SRC DST
    python -m defi_models.convert --from ours --to reference SRC DST

A reference is a Lightning .ckpt, a plain state dict or .safetensors file (GIDM, policy), or a diffusers Stable
Video Diffusion folder (GFDM). Ours is a model folder. Every key is printed as used or unexpected (in the source, not
in the target); missing keys are an error. Unexpected tensors are stored in the model folder for the way back.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from defi_models.conversion.infer_sizes import gidm_sizes, policy_sizes
from defi_models.conversion.name_map import gidm_rules, policy_rules, to_ours, to_released
from defi_models.conversion.released_checkpoint import ReleasedFile, read_released, write_released
from defi_models.conversion.report import Report
from defi_models.conversion.svd import ours_to_svd, svd_to_ours
from defi_models.encoders.clip_text import ClipText
from defi_models.encoders.dino import DinoPatches
from defi_models.encoders.t5_text import T5Text
from defi_models.encoders.tokenizer import load_tokenizer
from defi_models.errors import ModelFolderError
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM, build_gidm_text
from defi_models.inputs.normalization import Normalizer
from defi_models.policy import DeFIPolicy
from defi_models.pretrained.folder import (
    CONFIG_FILE,
    TOKENIZERS_FOLDER,
    WEIGHTS_FILE,
    make_header,
    read_header,
    read_weights,
    write_folder,
)

UNEXPECTED_FILE = "left.safetensors"
"""Released tensors that our models do not have."""
NOTES_FILE = "reference.json"
"""Prefix, metadata and tensor names of the released file."""
_BOOKKEEPING = (".usage", "action_normalizer.", "proprio_normalizer.")
"""Our buffers that a reference lacks and does not need to compute the same."""


@dataclass(frozen=True)
class Backbones:
    """Folders of frozen parts that a released file does not carry."""

    gfdm: Path | None = None
    clip: Path | None = None
    dino: Path | None = None
    t5: Path | None = None


def reference_to_ours(source: Path, target: Path, backbones: Backbones | None = None) -> Report:
    """Converts a released checkpoint into a model folder.

    Args:
        source: a checkpoint file, or a diffusers Stable Video Diffusion folder.
        target: the model folder to write; one that exists is replaced.
        backbones: folders of the frozen parts that the source does not carry.

    Returns:
        The report of every key.

    Raises:
        ModelFolderError: When the source is damaged, of no known kind, or has missing keys (the message lists them);
            nothing is written then.
    """
    backbones = backbones or Backbones()
    if source.is_dir():
        return svd_to_ours(source, target, backbones.clip)
    released = read_released(source)
    return (_policy_to_ours if released.kind == "policy" else _gidm_to_ours)(released, target, backbones)


def ours_to_reference(source: Path, target: Path) -> Report:
    """Converts a model folder into the released layout of its kind.

    Args:
        source: a model folder.
        target: the checkpoint file, or for a GFDM the diffusers folder, to write.

    Returns:
        The report of every key.

    Raises:
        ModelFolderError: When the source is damaged or has parts that the reference cannot express.
    """
    header = read_header(source)
    tensors = read_weights(source / WEIGHTS_FILE)
    if header["model"] == "gfdm":
        return ours_to_svd(source, target, header, tensors)
    report = Report()
    own = tensors
    rules = gidm_rules()
    if header["model"] == "policy":
        own = {name.removeprefix("adapter."): tensor for name, tensor in tensors.items()}
        rules = policy_rules(reads_proprio=bool(header["config"]["adapter"]["head"]["proprio_dim"]))
    translated = to_released(own, rules)
    report.used = translated.used
    report.unexpected_keys = [name for name in translated.unexpected_keys if not name.startswith("gfdm.")]
    lost = [name for name in report.unexpected_keys if not any(mark in f".{name}" for mark in _BOOKKEEPING)]
    if lost:
        raise ModelFolderError(
            f"{source} has weights that the reference lacks, so it would compute something else: "
            f"{', '.join(lost)}. Train with the released options (no positions, no weight-free encoders)."
        )
    notes = _read_notes(source)
    if "names" in notes:  # backbones that came from elsewhere do not go into the released file
        report.used = [pair for pair in report.used if pair[1] in notes["names"]]
        report.unexpected_keys += [name for name in translated.tensors if name not in notes["names"]]
        translated.tensors = {n: t for n, t in translated.tensors.items() if n in notes["names"]}
    if (source / UNEXPECTED_FILE).is_file():
        translated.tensors |= read_weights(source / UNEXPECTED_FILE)
    prefix = notes.get("prefix", "lam." if header["model"] == "gidm" and target.suffix == ".ckpt" else "")
    named = {prefix + name: tensor for name, tensor in translated.tensors.items()}
    write_released(target, named, notes.get("config", {}))
    return report


def _gidm_to_ours(released: ReleasedFile, target: Path, backbones: Backbones) -> Report:
    sizes = gidm_sizes(released.tensors, released.notes)
    translated = to_ours(released.tensors, gidm_rules())
    patches, patch_tensors = _dino(backbones, sizes.patch_dim)
    text, text_tensors = _t5(backbones, sizes.text_dim)
    config = GIDM.Config(patches=patches, text=text, encoder=sizes.encoder, decoder=sizes.decoder)
    given = _prefixed(patch_tensors, "patch_encoder.") | _prefixed(text_tensors, "text_encoder.")
    tokenizers = {"text_encoder": backbones.t5}
    frozen = ("patch_encoder", "text_encoder")
    return _write_ours(
        target,
        "gidm",
        config,
        lambda: GIDM(config),
        released,
        translated,
        given,
        frozen,
        tokenizers,
    )


def _policy_to_ours(released: ReleasedFile, target: Path, backbones: Backbones) -> Report:
    sizes = policy_sizes(released.tensors, released.notes)
    translated = to_ours(released.tensors, policy_rules(reads_proprio=False))
    own_names = [name for name in translated.tensors if not name.startswith("gidm_text.")]
    for name in own_names:
        translated.tensors[f"adapter.{name}"] = translated.tensors.pop(name)
    text, text_tensors = _t5(backbones, sizes.text_dim)
    frames = sizes.adapter.video_former.frames
    gfdm_config = GFDM.Config(frames=frames)
    given = _prefixed(text_tensors, "gidm_text.")
    tokenizers = {"gidm_text": backbones.t5}
    if backbones.gfdm is not None:
        gfdm = _read_gfdm(backbones)
        gfdm_config = gfdm.config
        given |= _prefixed(gfdm.state_dict(), "gfdm.")
        own = backbones.gfdm / TOKENIZERS_FOLDER / "text_encoder"
        tokenizers["gfdm.text_encoder"] = own if own.is_dir() else backbones.clip
        if gfdm_config.feature_dim != sizes.feature_dim or gfdm_config.frames != frames:
            raise ModelFolderError(
                f"{backbones.gfdm} gives {gfdm_config.frames} frames of {gfdm_config.feature_dim} channels; the "
                f"policy reads {frames} of {sizes.feature_dim}."
            )
    config = DeFIPolicy.Config(
        gfdm=gfdm_config, gidm_text=text, patch_dim=sizes.patch_dim, adapter=sizes.adapter
    )
    normalizer = Normalizer(sizes.adapter.head.action_dim, config.normalization)
    given |= _prefixed(normalizer.state_dict(), "action_normalizer.")

    def build() -> nn.Module:
        if backbones.gfdm is not None:
            return DeFIPolicy(config)
        # without a GFDM its sizes are not known; those that the adapter reads are
        known = {
            "adapter": sizes.build(),
            "action_normalizer": normalizer,
            "gidm_text": build_gidm_text(text),
        }
        return nn.ModuleDict(known)

    frozen = ("gfdm", "gidm_text")
    return _write_ours(target, "policy", config, build, released, translated, given, frozen, tokenizers)


def _write_ours(
    target: Path,
    kind: str,
    config: Any,
    build: Callable[[], nn.Module],
    released: ReleasedFile,
    translated: Any,
    given: Mapping[str, Tensor],
    frozen: tuple[str, ...],
    tokenizers: Mapping[str, Path | None],
) -> Report:
    tensors = given | translated.tensors
    for name in ("encoder.codebook", "adapter.latent_actions.codebook"):
        if f"{name}.weight" in tensors:
            tensors[f"{name}.usage"] = torch.zeros(len(tensors[f"{name}.weight"]), dtype=torch.int64)
    missing_parts = [part for part in frozen if not any(name.startswith(f"{part}.") for name in tensors)]
    with torch.device("meta"):
        wanted = _shapes(build(), skip=missing_parts)
    missing_keys = sorted(name for name in wanted if name not in tensors)
    wrong = [n for n, shape in wanted.items() if n in tensors and tensors[n].shape != shape]
    if missing_keys or wrong:
        raise ModelFolderError(
            f"{released.path} does not make a whole {kind}: missing keys: {', '.join(missing_keys) or 'none'}; "
            f"of another shape: {', '.join(wrong) or 'none'}. Was it trained with the released code, and copied whole?"
        )
    unexpected = {name: released.tensors[name] for name in translated.unexpected_keys}

    def write(folder: Path) -> None:
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(make_header(kind, config, missing_parts), indent=2))
        notes = {"prefix": released.prefix, "config": released.notes, "names": list(released.tensors)}
        (folder / NOTES_FILE).write_text(json.dumps(notes, indent=2))
        if unexpected:
            save_file(unexpected, folder / UNEXPECTED_FILE)
        for part, tokenizer_folder in tokenizers.items():
            if tokenizer_folder is not None:
                load_tokenizer(tokenizer_folder).save_pretrained(folder / TOKENIZERS_FOLDER / part)

    write_folder(target, write)
    return Report(translated.used, translated.unexpected_keys, missing_parts)


def _read_gfdm(backbones: Backbones) -> GFDM:
    assert backbones.gfdm is not None
    if (backbones.gfdm / CONFIG_FILE).is_file():
        return GFDM.from_pretrained(backbones.gfdm)
    if backbones.clip is None:
        raise ModelFolderError(f"{backbones.gfdm} is a diffusers folder; name CLIP's folder with --clip too.")
    return GFDM.from_svd(backbones.gfdm, ClipText.from_folder(backbones.clip))


def _dino(backbones: Backbones, dim: int) -> tuple[DinoPatches.Config, dict[str, Tensor]]:
    if backbones.dino is None:
        return DinoPatches.Config(hidden_size=dim, num_attention_heads=max(1, dim // 64)), {}
    encoder = DinoPatches.from_folder(backbones.dino)
    return encoder.config, dict(encoder.state_dict())


def _t5(backbones: Backbones, dim: int) -> tuple[T5Text.Config, dict[str, Tensor]]:
    if backbones.t5 is None:
        return T5Text.Config(d_model=dim), {}
    encoder = T5Text.from_folder(backbones.t5)
    return encoder.config, _untied(encoder)


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under their first name only, as safetensors wants it."""
    kept: dict[int, str] = {}
    state = module.state_dict()
    for name, tensor in state.items():
        kept.setdefault(tensor.data_ptr(), name)
    return {name: state[name] for name in kept.values()}


def _shapes(model: nn.Module, skip: Iterable[str]) -> dict[str, torch.Size]:
    """Names and shapes that a folder needs, without those of missing parts and tied copies."""
    skipped = tuple(f"{part}." for part in skip)
    return {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.startswith(skipped) and not name.endswith("model.encoder.embed_tokens.weight")
    }


def _read_notes(folder: Path) -> dict[str, Any]:
    path = folder / NOTES_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def _prefixed(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m defi_models.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sides = ("reference", "ours")
    parser.add_argument("--from", dest="source_side", choices=sides, required=True)
    parser.add_argument("--to", dest="target_side", choices=sides, required=True)
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    parser.add_argument("--gfdm", type=Path, help="GFDM or SVD folder, for a policy")
    parser.add_argument(
        "--clip", type=Path, help="CLIP folder, for a GFDM, or a policy whose --gfdm is SVD's"
    )
    parser.add_argument("--dino", type=Path, help="DINOv2-with-registers folder, for a GIDM")
    parser.add_argument("--t5", type=Path, help="T5 folder, for a GIDM or a policy")
    given = parser.parse_args(argv)
    if given.source_side == given.target_side:
        parser.error("--from and --to name the same side")
    try:
        if given.source_side == "reference":
            backbones = Backbones(gfdm=given.gfdm, clip=given.clip, dino=given.dino, t5=given.t5)
            report = reference_to_ours(given.source, given.target, backbones)
        else:
            report = ours_to_reference(given.source, given.target)
    except ModelFolderError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    for line in report.lines():
        print(line)
    print(f"wrote {given.target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
