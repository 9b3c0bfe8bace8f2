"""Reader and writer of released checkpoint files; unsafe pickles are never executed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from defi_models.errors import ModelFolderError

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_RECORDED = "weights."
_LIGHTNING_GIDM = "lam."


@dataclass(frozen=True)
class ReleasedFile:
    """A state dict under its released names."""

    path: Path
    """The file that was read."""
    tensors: dict[str, Tensor]
    """Tensors by name, without the prefix."""
    prefix: str
    """Common start of every name of the file: '', 'lam.' (Lightning's GIDM) or 'weights.' (recordings)."""
    notes: dict[str, Any]
    """Configuration in the file's metadata."""

    @property
    def kind(self) -> str:
        """'policy' or 'gidm'.

        Raises:
            ModelFolderError: When it is neither.
        """
        if any(name.startswith("Video_Former.") for name in self.tensors):
            return "policy"
        if "action_latent" in self.tensors and "patch_up.weight" in self.tensors:
            return "gidm"
        shown = ", ".join(sorted(self.tensors)[:4])
        raise ModelFolderError(
            f"{self.path} holds tensors that are neither a policy's (Video_Former.*) nor a GIDM's (action_latent, patch_up.*): {shown}. "
            "Name a checkpoint of one of them; a GFDM is a diffusers folder."
        )


def read_released(path: Path) -> ReleasedFile:
    """Reads a Lightning .ckpt, a plain state dict or a safetensors file.

    Raises:
        ModelFolderError: When it is missing, damaged, holds no tensors, or is a pickle that would run code.
    """
    if not path.is_file():
        raise ModelFolderError(f"checkpoint {path} does not exist.")
    notes: dict[str, Any] = {}
    if path.suffix in _PICKLES:
        tensors = _read_pickle(path)
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                notes = json.loads((file.metadata() or {}).get("config", "{}"))
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(f"{path} is not a whole safetensors file: {error}") from error
    else:
        raise ModelFolderError(f"{path}: one of .safetensors, {', '.join(_PICKLES)} is expected.")
    if any(name.startswith(_RECORDED) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(_RECORDED)}
    prefix = ""
    for candidate in (_RECORDED, _LIGHTNING_GIDM):
        if tensors and all(name.startswith(candidate) for name in tensors):
            prefix = candidate
    return ReleasedFile(path, {name.removeprefix(prefix): t for name, t in tensors.items()}, prefix, notes)


def write_released(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Writes a state dict: Lightning's layout for pickles, else safetensors.

    Args:
        path: the file; its suffix chooses the layout.
        tensors: tensors by their released names.
        notes: configuration, for the metadata of a safetensors file.

    Raises:
        ModelFolderError: For another suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.writing")
    if path.suffix in _PICKLES:
        torch.save({"state_dict": dict(tensors)}, fresh)
    elif path.suffix == ".safetensors":
        metadata = {"config": json.dumps(notes)} if notes else None
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, fresh, metadata)
    else:
        raise ModelFolderError(f"{path}: a name ending in .safetensors or {', '.join(_PICKLES)} is expected.")
    fresh.replace(path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelFolderError(
            f"{path} holds more than tensors, or is damaged, and is not opened, since unpickling it could run "
            f"code: {str(error).splitlines()[0]} Save its state dict alone and convert that."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ModelFolderError(
            f"{path} is not a whole torch checkpoint: {str(error).splitlines()[0]}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ModelFolderError(f"{path} holds a {type(content).__name__}; a state dict is expected.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelFolderError(
            f"{path} holds no tensors under names; it has: {', '.join(map(str, content))}."
        )
    return tensors
