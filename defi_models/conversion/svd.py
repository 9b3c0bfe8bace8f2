"""GFDM between a diffusers Stable Video Diffusion folder, as it is released, and our model folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from defi_models.conversion.report import Report
from defi_models.encoders.clip_text import ClipText
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.public_folder import read_public_config
from defi_models.encoders.tokenizer import load_tokenizer
from defi_models.encoders.vae import VaeCodec
from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.gfdm import GFDM
from defi_models.pretrained.configuration import from_mapping
from defi_models.pretrained.folder import (
    CONFIG_FILE,
    TOKENIZERS_FOLDER,
    WEIGHTS_FILE,
    make_header,
    write_folder,
)

UNEXPECTED_FOLDER = "left"
"""Parts of a diffusers folder that our GFDM does not have."""
_SVD_PARTS = ("unet", "vae", "scheduler")


def svd_to_ours(source: Path, target: Path, clip: Path | None) -> Report:
    """Converts a diffusers folder; its tensors keep their names under `unet.` and `codec.vae.`.

    Args:
        source: a diffusers Stable Video Diffusion folder.
        target: the model folder to write; one that exists is replaced.
        clip: CLIP folder for the text encoder, which a diffusers folder does not hold; without it the part is
            missing.

    Returns:
        The report of every key.

    Raises:
        ModelFolderError: Naming the file and what was expected.
    """
    text: ClipText | HashedText
    missing_parts = []
    if clip is not None:
        text = ClipText.from_folder(clip)
        model = GFDM.from_svd(source, text)
    else:
        missing_parts = ["text_encoder"]
        config = read_public_config(source / "unet", "UNetSpatioTemporalConditionModel")
        text = HashedText(HashedText.Config(dim=config.get("cross_attention_dim", 1024) // 2))
        model = GFDM.from_svd(source, text)
        model.config = replace(model.config, text=ClipText.Config(hidden_size=text.config.dim))
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if not n.startswith("text_encoder.")}
    others = [p for p in sorted(source.iterdir()) if p.name not in _SVD_PARTS]

    def write(folder: Path) -> None:
        stored = tensors | {f"text_encoder.{name}": tensor for name, tensor in text.state_dict().items()}
        save_file(stored, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(
            json.dumps(make_header("gfdm", model.config, missing_parts), indent=2)
        )
        for part in _SVD_PARTS:
            for config_file in (source / part).glob("*config.json"):
                (folder / UNEXPECTED_FOLDER / part).mkdir(parents=True, exist_ok=True)
                shutil.copy(config_file, folder / UNEXPECTED_FOLDER / part)
        for path in others:
            copy = shutil.copytree if path.is_dir() else shutil.copy
            (folder / UNEXPECTED_FOLDER).mkdir(exist_ok=True)
            copy(path, folder / UNEXPECTED_FOLDER / path.name)
        if clip is not None:
            load_tokenizer(clip).save_pretrained(folder / TOKENIZERS_FOLDER / "text_encoder")

    write_folder(target, write)
    used = [(name.replace("codec.", "", 1), name) for name in tensors]
    return Report(used, [p.name for p in others], missing_parts)


def ours_to_svd(source: Path, target: Path, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> Report:
    """Converts a GFDM folder of ours, already read; unexpected parts of the original folder are put back.

    Args:
        source: the model folder.
        target: the diffusers folder to write; one that exists is replaced.
        header: content of the model folder's config.json.
        tensors: content of its weight file.

    Returns:
        The report of every key.

    Raises:
        ModelFolderError: When its codec is not SVD's or keys are missing.
    """
    if header["config"]["codec"]["kind"] != "vae":
        raise ModelFolderError(
            f"{source} has a '{header['config']['codec']['kind']}' codec; the reference layout needs the SVD VAE."
        )
    # the text encoder is no part of a diffusers folder, so a stand-in of its width does for writing one
    try:
        config = from_mapping(GFDM.Config, header["config"], str(source / CONFIG_FILE))
    except ConfigurationError as error:
        raise ModelFolderError(str(error)) from error
    model = GFDM(replace(config, text=HashedText.Config(dim=config.text.dim)))
    own = {name: t for name, t in tensors.items() if not name.startswith("text_encoder.")}
    missing_keys = [name for name in model.state_dict() if name not in own]
    if missing_keys:
        raise ModelFolderError(
            f"{source / WEIGHTS_FILE} has missing keys: {', '.join(missing_keys[:5])}. Convert or copy the folder again."
        )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(own[name].dtype)
    model.load_state_dict(own)

    def write(folder: Path) -> None:
        assert isinstance(model.codec, VaeCodec)
        model.unet.save_pretrained(folder / "unet")
        model.codec.vae.save_pretrained(folder / "vae")
        model.scheduler.save_pretrained(folder / "scheduler")
        if (source / UNEXPECTED_FOLDER).is_dir():
            shutil.copytree(source / UNEXPECTED_FOLDER, folder, dirs_exist_ok=True)

    write_folder(target, write)
    used = [(name, name.replace("codec.", "", 1)) for name in own]
    return Report(used, [name for name in tensors if name.startswith("text_encoder.")])
