"""Export of GIDM's latent actions in LARYBench's layout: the job of jobs/export_larybench.py."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from defi_models.gidm import GIDM
from defi_platform.cluster import ray_session
from defi_platform.config import LaryBenchConfig
from defi_platform.config.data_checks import check_data
from defi_platform.config.paths import absolute_paths
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import BadVideo
from defi_platform.errors import ConfigError, CorpusError
from defi_platform.larybench.layout import (
    CLASSIFICATION,
    LATENT_COLUMN,
    REGRESSION,
    Layout,
    Row,
    read_rows,
    write_rows,
)
from defi_platform.larybench.own_corpora import Video, videos_of
from defi_platform.larybench.pictures import PAIR, VIDEO, frames_of_pairs, frames_of_videos
from defi_platform.progress import Progress
from defi_platform.train.recipes.video_base import load_folder, model_errors

OWN_SPLITS = {"train": "train", "validation": "val"}
"""Split of a manifest -> its name in LARYBench."""


@dataclass
class Exported:
    """Result of an export: its tables, rows and what was left out."""

    tables: list[str] = field(default_factory=list)
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows or videos that could not be read."""
    first_skipped: str = ""
    shape: tuple[int, ...] = ()
    """Of the tokens of a row."""

    def skip(self, problem: BadVideo) -> None:
        """Counts a row or video that could not be read."""
        self.skipped[problem.reason] = self.skipped.get(problem.reason, 0) + 1
        self.first_skipped = self.first_skipped or str(problem)

    def text(self) -> str:
        """A few lines for people."""
        lines = [f"{self.rows} rows, tokens of shape {self.shape}", *self.tables]
        if self.skipped:
            counts = ", ".join(f"{number} {reason}" for reason, number in sorted(self.skipped.items()))
            lines.append(f"left out: {counts}; the first: {self.first_skipped}")
        return "\n".join(lines)


class Labeller:
    """Infers latent actions between consecutive frames.

    Args:
        model: GIDM in evaluation mode.
        vectors: tokens | latents; behind or before the codebook.
        batch: pairs of a forward pass.
    """

    def __init__(self, model: GIDM, vectors: str, batch: int) -> None:
        self._model, self._vectors, self._batch = model, vectors, batch

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, text: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Latent actions of T frames.

        Args:
            frames: uint8 (T, H, W, 3).
            text: instruction; "" where there is none, or where it would give away a label.

        Returns: tokens float32 (T - 1, K, D), and codes int64 (T - 1, K), or (T - 1, 0) without a codebook.
        """
        pairs = torch.from_numpy(np.stack([frames[:-1], frames[1:]], axis=1))
        tokens, codes = [], []
        for part in torch.split(pairs, self._batch):
            found = self._model.encode(part, [text] * len(part))
            tokens.append(
                (found.latents if self._vectors == "latents" else found.tokens).float().cpu().numpy()
            )
            none = np.zeros((len(part), 0), np.int64)
            codes.append(none if found.indices is None else found.indices.cpu().numpy())
        return np.concatenate(tokens), np.concatenate(codes)


def export_larybench(config: LaryBenchConfig) -> Exported:
    """Exports the latent actions of LARYBench's own rows, or of labelled corpora.

    Raises: ConfigError; CorpusError when no row could be read.
    """
    config = absolute_paths(config)
    _check(config)
    with model_errors():
        model = load_folder(GIDM.from_pretrained, config.model).to(config.device or _device()).eval()
    label = Labeller(model, config.vectors, config.batch)
    done = Exported()
    if config.metadata:
        of_metadata(config, label, done)
    else:
        assert config.data is not None
        with ray_session(config.ray):
            manifest = ingest(config.data)
        of_corpora(config, manifest, label, done)
    return done


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def of_metadata(config: LaryBenchConfig, label: Labeller, done: Exported) -> None:
    """Labels the rows of one of LARYBench's tables.

    Args:
        config: with `metadata` and `pictures`.
        label: the model.
        done: is added to.

    Raises: ConfigError for a table of another kind; CorpusError when none of its rows could be read.
    """
    assert config.metadata and config.pictures and config.split
    layout = _layout(config, config.split)
    size = (config.height, config.width)
    pairs = config.task == REGRESSION
    rows = read_rows(config.metadata, PAIR if pairs else VIDEO)
    found = (
        frames_of_pairs(rows, config.pictures, size)
        if pairs
        else frames_of_videos(rows, config.pictures, size, config.decode)
    )
    written: dict[int, Row] = {}
    with Progress("larybench", "rows", len(rows)) as progress:
        for place, frames in found:
            progress.step(1)
            if isinstance(frames, BadVideo):
                done.skip(frames)
                continue
            tokens, codes = label(frames)
            tokens, codes = (tokens[0], codes[0]) if pairs else (tokens, codes)
            done.shape = tokens.shape
            written[place] = rows[place] | {LATENT_COLUMN: layout.write_latent(place, tokens, codes)}
    _finish(layout, [written[place] for place in sorted(written)], done)


def of_corpora(config: LaryBenchConfig, manifest: Manifest, label: Labeller, done: Exported) -> None:
    """Labels both splits of labelled corpora.

    Args:
        config: of the export.
        manifest: of `config.data`.
        label: the model.
        done: is added to.

    Raises: CorpusError when a split has no row.
    """
    assert config.data is not None
    for split, name in OWN_SPLITS.items():
        layout = _layout(config, name)
        rows: list[Row] = []
        for found in videos_of(manifest, config.data, split, layout):
            if isinstance(found, BadVideo):
                done.skip(found)
            elif found.rows:
                rows += _labelled(found, layout, label, len(rows), done)
        if rows:
            write_rows(layout.metadata, [_without_latent(row) for row in rows])
            done.tables.append(layout.metadata)
        _finish(layout, rows, done)


def _labelled(video: Video, layout: Layout, label: Labeller, first: int, done: Exported) -> Iterator[Row]:
    tokens, codes = label(video.frames, video.text)
    by_row: Sequence[tuple[np.ndarray, np.ndarray]] = (
        [(tokens, codes)] if layout.task == CLASSIFICATION else list(zip(tokens, codes, strict=True))
    )
    for number, row in enumerate(video.rows):
        done.shape = by_row[number][0].shape
        yield row | {LATENT_COLUMN: layout.write_latent(first + number, *by_row[number])}


def _without_latent(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != LATENT_COLUMN}


def _finish(layout: Layout, rows: Sequence[Row], done: Exported) -> None:
    if not rows:
        raise CorpusError(
            f"no row of the {layout.split} split of {layout.dataset} could be read"
            + (f"; the first: {done.first_skipped}" if done.first_skipped else "")
            + ". A regression needs videos with actions and more frames than the stride, a classification videos with texts."
        )
    write_rows(layout.table, rows)
    done.tables.append(layout.table)
    done.rows += len(rows)


def _layout(config: LaryBenchConfig, split: str) -> Layout:
    return Layout(config.output, config.task, config.dataset, split, config.name, config.stride)


def _check(config: LaryBenchConfig) -> None:
    for key, choices in (("task", (REGRESSION, CLASSIFICATION)), ("vectors", ("tokens", "latents"))):
        if getattr(config, key) not in choices:
            raise ConfigError(f"{key} is '{getattr(config, key)}'; choose {' or '.join(choices)}.")
    for key in ("stride", "batch", "height", "width"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key} is {getattr(config, key)}; it is 1 or more.")
    for key in ("dataset", "name", "split"):
        value = getattr(config, key)
        if value is not None and not re.fullmatch(r"[\w-]+", value):
            raise ConfigError(f"{key} is '{value}'; it has letters, digits, - and _ only.")
    if config.metadata and not (config.pictures and config.split):
        raise ConfigError(
            "metadata needs `pictures`, the folder that the paths in it are relative to, and `split`, its split in "
            "LARYBench (train, val, seen_train, ...)."
        )
    if not config.metadata and not (config.data and config.data.corpora):
        raise ConfigError(
            "nothing to export: set metadata=LARYBench's table, or name a labelled corpus "
            "(data.corpora.NAME.path=FOLDER)."
        )
    if config.data:
        check_data(config.data)
