"""Tokenizers of the text backbones: optional, because a model built from random weights has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from defi_models.errors import ModelFolderError

_FILES = ("tokenizer.json", "spiece.model", "vocab.json")


def load_tokenizer(folder: Path) -> Any:
    """Reads the tokenizer in a backbone's folder.

    Raises:
        ModelFolderError: When the folder holds none of a tokenizer's files or they are damaged.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _FILES):
        raise ModelFolderError(
            f"{folder} holds no tokenizer; one of {', '.join(_FILES)} is expected beside the weights."
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(f"the tokenizer in {folder} cannot be read: {error}") from error


def require_tokenizer(tokenizer: Any, encoder: str) -> Any:
    """The tokenizer, or an error that says where one comes from."""
    if tokenizer is None:
        raise ModelFolderError(
            f"this {encoder} was built from its configuration alone and has no tokenizer; "
            "load it from a folder that holds one (weights and tokenizer files of the public layout)."
        )
    return tokenizer
