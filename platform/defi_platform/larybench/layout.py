"""LARYBench's files: tables of rows, latent actions, actions and pictures, as its commands read them.

    OUTPUT/data/SPLIT_la_DATASET_STRIDE_MODEL.csv        rows of a regression, with `la_path`
    OUTPUT/data/SPLIT_la_DATASET_MODEL.csv               rows of a classification
    OUTPUT/latent_actions/DATASET/SPLIT/MODEL/latent_action_00000000.npz    `tokens` and `indices` of a row
    OUTPUT/data/DATASET_metadata_SPLIT.csv               rows of a corpus of one's own, for other models
    OUTPUT/regression/DATASET/...                        its pictures and actions

`la_path` is relative to LARYBench's LARY_LA_DIR, which is OUTPUT/latent_actions; other paths are relative to its DATA_DIR,
which is OUTPUT for a corpus of one's own. Rows of a regression are pairs of frames `STRIDE` apart, with the STRIDE actions
between them; rows of a classification are videos, of which the latent actions of consecutive frames are kept.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from defi_platform import storage
from defi_platform.errors import ConfigError

REGRESSION, CLASSIFICATION = "regression", "classification"
LATENTS, LATENT_COLUMN = "latent_actions", "la_path"
Row = dict[str, str]


@dataclass(frozen=True)
class Layout:
    """Places of the files of one split of a data set."""

    output: str
    """Folder, local or remote."""
    task: str
    """regression | classification."""
    dataset: str
    split: str
    model: str
    stride: int

    @property
    def table(self) -> str:
        """Uri of the table that LARYBench's `regress` or `classify` reads."""
        between = f"{self.dataset}_{self.stride}" if self.task == REGRESSION else self.dataset
        return storage.join(self.output, "data", f"{self.split}_la_{between}_{self.model}.csv")

    @property
    def metadata(self) -> str:
        """Uri of the table that LARYBench's `extract` reads."""
        return storage.join(self.output, "data", f"{self.dataset}_metadata_{self.split}.csv")

    def latent(self, number: int) -> str:
        """Path of a row's latent action, relative to LARY_LA_DIR."""
        return f"{self.dataset}/{self.split}/{self.model}/latent_action_{number:08d}.npz"

    def write_latent(self, number: int, tokens: np.ndarray, indices: np.ndarray) -> str:
        """Writes the latent action of a row.

        Args:
            number: of the row in its table of metadata.
            tokens: float32 (K, D), or (P, K, D) of P consecutive pairs of frames.
            indices: int64 (K,) or (P, K); empty without a codebook.

        Returns: its `la_path`.
        """
        packed = io.BytesIO()
        np.savez_compressed(packed, tokens=tokens, indices=indices)
        path = self.latent(number)
        storage.write_bytes(storage.join(self.output, LATENTS, path), packed.getvalue())
        return path

    def write_array(self, path: str, values: np.ndarray) -> None:
        """Writes a NumPy file at a path relative to DATA_DIR."""
        packed = io.BytesIO()
        np.save(packed, values)
        storage.write_bytes(storage.join(self.output, path), packed.getvalue())

    def write_picture(self, path: str, picture: np.ndarray) -> None:
        """Writes uint8 (H, W, 3) as PNG at a path relative to DATA_DIR."""
        packed = io.BytesIO()
        Image.fromarray(picture).save(packed, "PNG")
        storage.write_bytes(storage.join(self.output, path), packed.getvalue())


def read_rows(path: str, needed: Sequence[str]) -> list[Row]:
    """The rows of a table.

    Args:
        path: of the CSV file.
        needed: columns that it has to have.

    Raises: ConfigError when it is absent, empty, or lacks a column.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(storage.read_text(path))))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"metadata: {path} cannot be read as a CSV table ({error}).") from error
    absent = [name for name in needed if not rows or name not in rows[0]]
    if absent:
        have = f"it has the columns {', '.join(rows[0])}" if rows else "it has no rows"
        raise ConfigError(f"metadata: {path} has no column {' or '.join(absent)}; {have}.")
    return rows


def write_rows(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table; all rows have the columns of the first one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_text(path, text.getvalue())
