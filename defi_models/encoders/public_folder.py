"""Backbones from local folders in the layouts that diffusers and transformers save."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from defi_models.errors import ModelFolderError

_SHOWN_KEYS = 5


def load_backbone(loader: Any, folder: str | Path, **options: Any) -> Any:
    """`loader.from_pretrained(folder)`, strictly local, with every tensor present and in shape.

    Args:
        loader: a diffusers or transformers model class.
        folder: the local folder.
        options: passed on to it.

    Returns:
        The model.

    Raises:
        ModelFolderError: Naming the folder or file and what was expected.
    """
    source, name = Path(folder), loader.__name__
    read_public_config(source, name)
    if loader.__module__.startswith("diffusers"):
        options["low_cpu_mem_usage"] = False  # its default warns where accelerate is not installed
    try:
        with _quiet("transformers", "diffusers"):
            model, report = loader.from_pretrained(
                source, local_files_only=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        files = ", ".join(
            f"{p.name} ({p.stat().st_size:,} bytes)" for p in sorted(source.glob("*")) if p.is_file()
        )
        raise ModelFolderError(
            f"{name} cannot be read from {source}: {str(error).strip()}. Expected its config.json and whole "
            f"weight files; the folder holds {files}."
        ) from error
    wrong = [("misses", report["missing_keys"]), ("has other shapes for", report["mismatched_keys"])]
    for problem, keys in wrong:
        if keys:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
            more = f" and {len(names) - _SHOWN_KEYS} more" if len(names) > _SHOWN_KEYS else ""
            raise ModelFolderError(
                f"the weights in {source} {problem} {len(names)} tensor(s) of {name}: "
                f"{', '.join(names[:_SHOWN_KEYS])}{more}."
            )
    # Tensors mapped from a file may lie at odd addresses, for which CPU kernels round differently: copied, the
    # model computes bit for bit what it will compute after we save and load it.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def _quiet(*libraries: str) -> Iterator[None]:
    """Holds back the libraries' loading reports; what matters of them is checked and raised here."""
    loggers = [logging.getLogger(name) for name in libraries]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_public_config(folder: Path, expected: str, file: str = "config.json") -> Mapping[str, Any]:
    """Content of a backbone's own config file.

    Args:
        folder: the local folder.
        expected: class of the backbone, for the message.
        file: name of the config file.

    Returns:
        The file's mapping.

    Raises:
        ModelFolderError: When the folder or file is missing or not JSON.
    """
    if not folder.is_dir():
        raise ModelFolderError(
            f"folder {folder} does not exist; a local {expected} folder is expected there."
        )
    path = folder / file
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:_SHOWN_KEYS]) or "nothing"
        raise ModelFolderError(f"{folder} has no {file}, which a {expected} folder has; it holds: {there}.")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelFolderError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds no mapping; the config of a {expected} is expected.")
    return content


def known_fields(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Picks our fields (ours -> theirs) out of a backbone's config, lists as tuples."""
    picked = {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in picked.items()}
