"""Values of a data configuration outside their ranges, and corpora that are taken away, before anything starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defi_platform.config import (
    CorpusConfig,
    DataConfig,
    FilterConfig,
    IngestConfig,
    PretrainConfig,
    SamplingConfig,
    WindowConfig,
)
from defi_platform.config.data_checks import check_corpus_name, check_data
from defi_platform.config.loader import load_config
from defi_platform.errors import ConfigError

NAN, INF = math.nan, math.inf

OF_DATA: list[tuple[dict[str, Any], str]] = [
    *(({"holdout": v}, rf"data\.holdout is {v}; .*0 to 1") for v in (-0.1, 1.5, NAN, INF)),
    *(({name: v}, rf"data\.{name} is {v}") for name in ("height", "width") for v in (0, -1, 100_000)),
    *(({"pair_interval_s": v}, rf"data\.pair_interval_s is {v}; .*above 0") for v in (0.0, -1.0, NAN, INF)),
    *(({"clip_span_s": v}, rf"data\.clip_span_s is {v}; .*above 0") for v in (0.0, -1.0, NAN, INF)),
    ({"clip_frames": 1}, r"data\.clip_frames is 1; .*2 to"),
]
OF_CORPUS: list[tuple[dict[str, Any], str]] = [
    *(({"weight": v}, rf"data\.corpora\.c\.weight is {v}; .*0 or more") for v in (-1.0, NAN, INF)),
    ({"weight": 0.0}, r"the weight of every corpus is 0 \(c\)"),
    *(({"fps": v}, rf"corpora\.c\.fps is {v}; .*0.01 to 1000") for v in (0.0, -10.0, 1e-6, 1e6, NAN, INF)),
    *(({"cameras": {"left": v}}, rf"c\.cameras\.left is {v}") for v in (-1.0, NAN, INF)),
    ({"windows": WindowConfig(mode="scenes")}, r"c\.windows\.mode is 'scenes'; it is one of none, shots, stride"),
    *(({"windows": WindowConfig(length_s=v)}, rf"windows\.length_s is {v}") for v in (0.0, -1.0, NAN)),
    *(({"windows": WindowConfig(stride_s=v)}, rf"windows\.stride_s is {v}") for v in (0.0, -1.0, NAN, INF)),
    ({"windows": WindowConfig("stride", 2.0, shortest_s=3.0)}, r"shortest_s=3.0 is more than length_s=2.0"),
    ({"windows": WindowConfig(shot_threshold=300)}, "shot_threshold is 300"),
    ({"filters": FilterConfig(duplicate_bits=193)}, r"duplicate_bits is 193; .*0 to 192"),
    ({"filters": FilterConfig(black=-1.0)}, r"filters\.black is -1"),
    ({"filters": FilterConfig(too_short_s=NAN)}, r"filters\.too_short_s is nan"),
    ({"sampling": SamplingConfig(unit="hours")}, r"sampling\.unit is 'hours'; it is one of frames, seconds, videos"),
    ({"sampling": SamplingConfig(stride=0)}, r"sampling\.stride is 0"),
    ({"sampling": SamplingConfig(start_every=0)}, r"sampling\.start_every is 0"),
    ({"sampling": SamplingConfig(max_frames=1)}, r"sampling\.max_frames is 1; .*2 or more"),
    ({"sampling": SamplingConfig(span_s=INF)}, r"sampling\.span_s is inf"),
    ({"sampling": SamplingConfig(whole=True, stride=2)}, r"sampling sets stride and whole"),
]  # fmt: skip


def data_of(corpus: CorpusConfig | None = None, **change: Any) -> DataConfig:
    return DataConfig(corpora={"c": corpus or CorpusConfig(path="p")}, manifest="m", **change)


@pytest.mark.parametrize(("change", "message"), OF_DATA)
def test_a_value_outside_its_range_is_refused_with_key_value_and_range(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_data(data_of(**change))


@pytest.mark.parametrize(("change", "message"), OF_CORPUS)
def test_a_value_of_a_corpus_outside_its_range_is_refused_too(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_data(data_of(CorpusConfig(path="p", **change)))


@pytest.mark.parametrize(
    "override", ["data.holdout=.nan", "data.corpora.c.weight=-1", "data.corpora.c.fps=0"]
)
def test_a_job_refuses_such_a_value_when_it_reads_its_config(override: str) -> None:
    given_ = ["data.manifest=m", "data.corpora.c.path=p", "train.output=o", override]
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        load_config(PretrainConfig, None, given_)


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "..",
        ".",
        "",
        " ",
        " a",
        "a ",
        "x" * 201,
        "con\nline",
        "a\\b",
        "a*",
        "a?",
        "s3:",
        "a#b",
        "50%",
        "\udcff",
    ],
)
def test_corpus_names_that_cannot_be_folders_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.corpora: the corpus name .* cannot be a folder"):
        check_corpus_name(name)


@given(name=st.text(max_size=40))
def test_every_accepted_name_is_one_part_of_a_path(name: str) -> None:
    try:
        check_corpus_name(name)
    except ConfigError:
        return
    assert Path("corpora", name).parts == ("corpora", name) and "\0" not in name


@pytest.mark.parametrize("name", ["robot", "ä b", "a.b", "A", "fractal20220817_data", "数据"])
def test_usual_names_are_accepted(name: str) -> None:
    check_corpus_name(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config of two corpora, one of them from the file that it extends."""
    (tmp_path / "base.yaml").write_text("data: {corpora: {demo: {path: /d, weight: 2}}, manifest: /m}")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\ndata: {corpora: {mine: {path: /v}}}")
    return tmp_path / "run.yaml"


def test_null_takes_a_corpus_of_the_file_away(file: Path) -> None:
    assert set(load_config(IngestConfig, file).data.corpora) == {"demo", "mine"}
    config = load_config(IngestConfig, file, ["data.corpora.demo=null", "data.corpora.other.path=/o"])
    assert set(config.data.corpora) == {"mine", "other"}
    (file.parent / "less.yaml").write_text("extends: run.yaml\ndata: {corpora: {demo: null}}")
    assert set(load_config(IngestConfig, file.parent / "less.yaml").data.corpora) == {"mine"}


def test_null_takes_a_corpus_of_the_probe_away_too(tmp_path: Path) -> None:
    probe = "{manifest: /p, corpora: {a: {path: /a}, b: {path: /b}}}"
    (tmp_path / "run.yaml").write_text(f"data: {{manifest: /m}}\ntrain: {{output: /o, probe: {probe}}}")
    config = load_config(PretrainConfig, tmp_path / "run.yaml", ["train.probe.corpora.a=null"])
    assert config.train.probe and set(config.train.probe.corpora) == {"b"}
    with pytest.raises(ConfigError, match=r"train\.probe\.pairs is 0"):
        load_config(PretrainConfig, tmp_path / "run.yaml", ["train.probe.pairs=0"])


def test_null_for_a_corpus_that_is_not_there_names_the_nearest(file: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.corpora\.demp=null takes nothing away.*Did you mean 'demo'"
    ):
        load_config(IngestConfig, file, ["data.corpora.demp=null"])


def test_a_corpus_of_weight_0_needs_no_path(file: Path) -> None:
    config = load_config(IngestConfig, file, ["data.corpora.later.weight=0", "data.corpora.demo.weight=0"])
    assert {name: corpus.weight for name, corpus in config.data.corpora.items()} == {"demo": 0, "mine": 1}
    with pytest.raises(ConfigError, match=r"'data\.corpora\.later\.path' has no value"):
        load_config(IngestConfig, file, ["data.corpora.later.weight=1"])
    with pytest.raises(ConfigError, match=r"no key 'data\.corpora\.later\.wait'"):
        load_config(IngestConfig, file, ["data.corpora.later.weight=0", "data.corpora.later.wait=1"])
