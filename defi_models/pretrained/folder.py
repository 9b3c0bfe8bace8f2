"""Model folders: config.json, model.safetensors, README.md, tokenizers; written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from defi_models.encoders.tokenizer import load_tokenizer
from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.pretrained.configuration import from_mapping, to_mapping
from defi_models.pretrained.replace_folder import replaced_folder
from defi_models.pretrained.skip_init import skip_init

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
TOKENIZERS_FOLDER = "tokenizers"
FORMAT_VERSION = 1
_SHOWN_KEYS = 5


class ModelFolder:
    """Saving and loading of a model as a folder that needs nothing else; mixed into every model class."""

    kind: ClassVar[str]
    """gfdm, gidm or policy."""
    config: Any
    """The `Config` of the class."""

    def __getstate__(self) -> Any:
        """State for copies and pickles: without what was compiled or recorded, which belongs to this model alone."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]  # that of nn.Module
        return state | {name: None for name in ("_functions", "_replayed") if name in state}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the folder; a reader sees the old one or the new one, never a part.

        Args:
            folder: the folder to write; one that exists is replaced.

        Returns:
            The folder. Weights keep their dtype; tied weights are stored once.
        """
        model = cast(nn.Module, self)

        def write(fresh: Path) -> None:
            save_file(_stored_tensors(model), fresh / WEIGHTS_FILE, metadata={"model": self.kind})
            (fresh / CONFIG_FILE).write_text(json.dumps(make_header(self.kind, self.config), indent=2) + "\n")
            (fresh / CARD_FILE).write_text(self._card())
            for name, text in self.side_files().items():
                (fresh / name).write_text(text)
            for name, module in _tokenized(model):
                if module.tokenizer is not None:
                    module.tokenizer.save_pretrained(fresh / TOKENIZERS_FOLDER / name)

        return write_folder(Path(folder), write)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> Self:
        """Reads a folder written by `save_pretrained`; the model comes back in eval mode.

        Args:
            folder: a model folder.
            device: where the model is moved.
            dtype: precision of the weights; None keeps the stored one.

        Returns:
            The model in eval mode.

        Raises:
            ModelFolderError: Naming the file and what was expected of it.
        """
        source = Path(folder)
        header = read_header(source)
        if header["model"] != cls.kind:
            raise ModelFolderError(
                f"{source / CONFIG_FILE} describes a '{header['model']}' model; '{cls.kind}' is expected here."
            )
        if header.get("absent"):
            raise ModelFolderError(
                f"{source} was converted without {', '.join(header['absent'])}, so it cannot run yet. Convert it "
                "again with the folders of those backbones; see python -m defi_models.convert --help."
            )
        config_class = cls.Config  # type: ignore[attr-defined]
        try:
            config = from_mapping(config_class, header["config"], f"{source / CONFIG_FILE}: config")
        except ConfigurationError as error:
            raise ModelFolderError(f"{error} Was the folder written by another version?") from error
        stored = read_weights(source / WEIGHTS_FILE)
        with skip_init():
            model = cls(config)  # type: ignore[call-arg]
        module = cast(nn.Module, model)
        _match_dtype(module, stored)
        load_exactly(module, stored, str(source / WEIGHTS_FILE))
        for name, encoder in _tokenized(module):
            if (source / TOKENIZERS_FOLDER / name).is_dir():
                encoder.tokenizer = load_tokenizer(source / TOKENIZERS_FOLDER / name)
        model.read_side_files(source)
        module.to(device=device, dtype=dtype)
        module.eval()
        return model

    def side_files(self) -> dict[str, str]:
        """Further text files of the folder, name -> content."""
        return {}

    def read_side_files(self, folder: Path) -> None:
        """Reads the files back that `side_files` wrote.

        Raises:
            ModelFolderError: When one is damaged.
        """

    def _card(self) -> str:
        module = cast(nn.Module, self)
        total = sum(p.numel() for p in module.parameters())
        parts = "\n".join(
            f"| {name} | {type(child).__name__} | {sum(p.numel() for p in child.parameters()):,} |"
            for name, child in module.named_children()
        )
        first_line = (type(self).__doc__ or "").strip().splitlines()[0]
        return (
            f"# {self.kind} ({self.config.preset})\n\n{first_line}\n\n"
            f"{total:,} parameters.\n\n| part | class | parameters |\n| --- | --- | --- |\n{parts}\n\n"
            f"Load it with `defi_models`:\n\n```python\n"
            f"from {type(self).__module__} import {type(self).__name__}\n\n"
            f'model = {type(self).__name__}.from_pretrained("THIS_FOLDER")\n```\n\n'
            f"`{CONFIG_FILE}` holds every size, `{WEIGHTS_FILE}` every tensor.\n"
            "Method: Disentangled Robot Learning via Separate Forward and Inverse Dynamics Pretraining, "
            "ICLR 2026, arXiv 2604.16391.\n"
        )


def write_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """Lets `write` fill a fresh folder and replaces `target` by it, whole or not at all."""
    with replaced_folder(target) as fresh:
        write(fresh)
    return target


def make_header(kind: str, config: Any, missing_parts: Sequence[str] = ()) -> dict[str, Any]:
    """Content of config.json.

    Args:
        kind: gfdm, gidm or policy.
        config: the model's `Config`.
        missing_parts: frozen parts whose weights the folder does not hold.

    Returns:
        A mapping ready for JSON.
    """
    header = {"format": "defi_models", "version": FORMAT_VERSION, "model": kind, "preset": config.preset}
    return (
        header | {"config": to_mapping(config)} | ({"absent": list(missing_parts)} if missing_parts else {})
    )


def read_header(folder: Path) -> dict[str, Any]:
    """The checked content of a model folder's config.json.

    Raises:
        ModelFolderError: When the folder or file is missing, damaged or of another format.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ModelFolderError(f"model folder {folder} does not exist.")
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:_SHOWN_KEYS]) or "nothing"
        raise ModelFolderError(f"{folder} has no {CONFIG_FILE}, so it is no model folder; it holds: {there}.")
    try:
        header = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != "defi_models" or "config" not in header:
        raise ModelFolderError(
            f"{path} was not written by defi_models ('format': 'defi_models' is expected)."
        )
    if header.get("version") != FORMAT_VERSION:
        raise ModelFolderError(f"{path} has version {header.get('version')}; {FORMAT_VERSION} is read here.")
    return header


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ModelFolderError: When it is missing, truncated or not safetensors.
    """
    if not path.is_file():
        raise ModelFolderError(f"weight file {path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise ModelFolderError(
            f"{path} ({size:,} bytes) is not a whole safetensors file: {error}. Copy or save it again."
        ) from error


def load_exactly(model: nn.Module, stored: Mapping[str, Tensor], source: str) -> None:
    """Copies `stored` into `model`, which must have exactly these tensors in these shapes.

    Args:
        model: the model to fill.
        stored: tensors by name.
        source: file that they come from, for the message.

    Raises:
        ModelFolderError: Listing the missing and unexpected tensors and those of another shape.
    """
    wanted = model.state_dict()
    present_storage = {wanted[name].data_ptr() for name in stored if name in wanted}
    missing = [n for n, t in wanted.items() if n not in stored and t.data_ptr() not in present_storage]
    unknown = [name for name in stored if name not in wanted]
    shapes = [
        f"{name} is {tuple(stored[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in stored
        if name in wanted and stored[name].shape != wanted[name].shape
    ]
    for problem, names in (("misses", missing), ("has unknown", unknown), ("has other shapes:", shapes)):
        if names:
            more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            raise ModelFolderError(
                f"{source} {problem} {len(names)} tensor(s): {', '.join(names[:_SHOWN_KEYS])}{more}. "
                "The weights do not belong to the config in the same folder."
            )
    model.load_state_dict(stored, strict=False)


def _stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors kept under their first name only."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor.detach().cpu().contiguous()
    return kept


def _match_dtype(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Gives the unset weights the stored precision, so that loading rounds nothing."""
    for name, parameter in model.named_parameters():
        if name in stored and stored[name].dtype != parameter.dtype:
            parameter.data = torch.empty_like(parameter, dtype=stored[name].dtype)


def _tokenized(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "tokenizer"))
