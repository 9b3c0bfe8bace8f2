"""Checks of the values of a data configuration: what no corpus could fit is said before anything starts."""

from __future__ import annotations

import dataclasses
import math
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any

from defi_models.errors import ConfigurationError
from defi_models.inputs.state_layout import check_choice
from defi_platform.config.data import CorpusConfig, DataConfig
from defi_platform.config.train import ProbeConfig
from defi_platform.errors import ConfigError

LONGEST_NAME = 200
"""Bytes of a corpus's name; file systems allow 255 for a folder."""

UNITS = ("frames", "seconds", "videos")
WINDOW_MODES = ("none", "shots", "stride")
PROBE_TARGETS = ("mean", "change")
DISTRACTORS = ("background", "lighting", "object")


def check_data(data: DataConfig, part: str = "data") -> None:
    """Checks every value against its range.

    Args:
        data: the settings.
        part: dotted config key of the part, for messages.

    Raises: ConfigError naming key, value and what is allowed.
    """
    numbers = _Ranges(part)
    for name in ("height", "width"):
        numbers.within(name, getattr(data, name), 1, 8192, "pixels")
    numbers.within("clip_frames", data.clip_frames, 2, 10_000, "frames")
    numbers.above_zero("clip_span_s", data.clip_span_s, "seconds")
    numbers.above_zero("pair_interval_s", data.pair_interval_s, "seconds")
    numbers.within("holdout", data.holdout, 0, 1, "the share of the videos")
    decode = _Ranges(f"{part}.decode")
    decode.within("processes", data.decode.processes, 1, 1024, "processes")
    decode.within("memory_mb", data.decode.memory_mb, 1, 2**24, "MiB")
    decode.within("recycle_after", data.decode.recycle_after, 1, 2**31, "videos")
    decode.above_zero("timeout_s", data.decode.timeout_s, "seconds")
    decode.within("storage_patience_s", data.decode.storage_patience_s, 0, math.inf, "seconds")
    check_corpora(data.corpora, f"{part}.corpora")


def check_corpora(corpora: Mapping[str, CorpusConfig], part: str) -> None:
    """Checks corpora: their names, weights, cameras, windows, filters and sampling.

    Args:
        corpora: by name.
        part: dotted config key of the mapping, for messages.

    Raises: ConfigError.
    """
    for name, corpus in corpora.items():
        check_corpus_name(name, part)
        _check_corpus(corpus, f"{part}.{name}")
    if corpora and not any(corpus.weight > 0 for corpus in corpora.values()):
        raise ConfigError(
            f"{part}: the weight of every corpus is 0 ({', '.join(corpora)}). Give at least one a weight above 0."
        )


def check_corpus_name(name: str, part: str = "data.corpora") -> None:
    """Checks that the tables of a corpus can lie in a folder of its name, on disks and in object stores.

    Args:
        name: of the corpus.
        part: dotted config key of the corpora, for messages.

    Raises: ConfigError.
    """
    problem = None
    if not name.strip():
        problem = "it is empty"
    elif name != name.strip():
        problem = "it begins or ends with a space"
    elif name in (".", ".."):
        problem = "it means another folder"
    elif any(character in '/\\:*?"<>|#%' for character in name):
        problem = 'it has one of / \\ : * ? " < > | # %'
    elif any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        problem = "it has a character that cannot be printed"
    elif len(name.encode()) > LONGEST_NAME:
        problem = f"it is longer than {LONGEST_NAME} bytes"
    if problem:
        raise ConfigError(
            f"{part}: the corpus name {name[:80]!r} cannot be a folder of the manifest: {problem}."
        )


def _check_corpus(corpus: CorpusConfig, part: str) -> None:
    numbers = _Ranges(part)
    numbers.within("weight", corpus.weight, 0, None, "a share relative to the others")
    numbers.within("fps", corpus.fps, 0.01, 1000, "frames per second")
    cameras = _Ranges(f"{part}.cameras")
    for camera, probability in corpus.cameras.items():
        cameras.within(camera, probability, 0, None, "a probability")
    try:
        check_choice(corpus.state, f"{part}.state")
    except ConfigurationError as error:
        raise ConfigError(str(error)) from error
    windows, of_windows = corpus.windows, _Ranges(f"{part}.windows")
    of_windows.choice("mode", windows.mode, WINDOW_MODES)
    of_windows.above_zero("length_s", windows.length_s, "seconds")
    of_windows.above_zero("stride_s", windows.stride_s, "seconds")
    of_windows.within("shortest_s", windows.shortest_s, 0, None, "seconds")
    of_windows.within("shot_threshold", windows.shot_threshold, 0, 255, "grey levels")
    if windows.mode != "none" and windows.shortest_s > windows.length_s:
        raise ConfigError(
            f"{part}.windows.shortest_s={windows.shortest_s} is more than length_s={windows.length_s}: every window "
            "would be rejected as too_short. Set it lower, or length_s higher."
        )
    of_filters = _Ranges(f"{part}.filters")
    of_filters.within("black", corpus.filters.black, 0, 255, "grey levels")
    of_filters.within("static", corpus.filters.static, 0, 255, "grey levels")
    of_filters.within("blurred", corpus.filters.blurred, 0, None, "the variance of the Laplacian")
    of_filters.within("too_short_s", corpus.filters.too_short_s, 0, None, "seconds")
    of_filters.within("duplicate_bits", corpus.filters.duplicate_bits, 0, 192, "bits")
    sampling, of_sampling = corpus.sampling, _Ranges(f"{part}.sampling")
    of_sampling.choice("unit", sampling.unit, UNITS)
    of_sampling.above_zero("span_s", sampling.span_s, "seconds")
    of_sampling.above_zero("pair_interval_s", sampling.pair_interval_s, "seconds")
    of_sampling.within("stride", sampling.stride, 1, 100_000, "frames")
    of_sampling.within("start_every", sampling.start_every, 1, 100_000, "frames")
    of_sampling.within("max_frames", sampling.max_frames, 2, None, "frames")
    given = [name for name in ("span_s", "stride") if getattr(sampling, name) is not None]
    given += ["whole"] * sampling.whole
    if len(given) > 1:
        raise ConfigError(
            f"{part}.sampling sets {' and '.join(given)}: each says by itself what a clip covers. Set one of them."
        )


def check_probe(probe: ProbeConfig, part: str = "train.probe") -> None:
    """Checks the settings of the linear probe, as `check_data` those of a training. Raises: ConfigError."""
    numbers = _Ranges(part)
    numbers.within("pairs", probe.pairs, 1, 10**9, "pairs")
    numbers.within("holdout", probe.holdout, 0, 1, "the share of the episodes")
    numbers.choice("target", probe.target, PROBE_TARGETS)
    for kind in probe.distractors:
        numbers.choice("distractors", kind, DISTRACTORS)
    check_corpora(probe.corpora, f"{part}.corpora")


def check_all(config: Any, part: str = "") -> None:
    """Checks every data configuration and probe within a job's config.

    Args:
        config: a dataclass of `defi_platform.config`.
        part: dotted config key of it.

    Raises: ConfigError.
    """
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{part}.{field.name}".lstrip(".")
        if isinstance(value, DataConfig):
            check_data(value, key)
        elif isinstance(value, ProbeConfig):
            check_probe(value, key)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            check_all(value, key)


class _Ranges:
    """Checks of the values below one key."""

    def __init__(self, part: str) -> None:
        self._part = part

    def within(self, name: str, value: float | None, least: float, most: float | None, unit: str) -> None:
        if value is None or (least <= value <= (sys.float_info.max if most is None else most)):
            return
        allowed = f"{least:g} or more" if most in (None, math.inf) else f"{least:g} to {most:g}"
        raise ConfigError(f"{self._part}.{name} is {value}; it is {unit}, {allowed}.")

    def above_zero(self, name: str, value: float | None, unit: str) -> None:
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{self._part}.{name} is {value}; it is a number of {unit} above 0.")

    def choice(self, name: str, value: str, choices: tuple[str, ...]) -> None:
        if value not in choices:
            raise ConfigError(f"{self._part}.{name} is '{value}'; it is one of {', '.join(choices)}.")
