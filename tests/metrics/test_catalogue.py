"""Metrics: their names follow one scheme, and values reach Ray's metrics as they were given."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from defi_platform.metrics.catalogue import CATALOGUE, DATA_SAMPLES, PARTS, SERVE_LATENCY, TRAIN_STEP
from defi_platform.metrics.metric import Counter, Gauge, Histogram, Metric

MANY_VALUES = {"video", "video_id", "sample", "uri", "step", "seed", "task", "worker", "pid"}
"""Labels with a series for each of millions of values, or of values that change all the time."""


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_a_metric_is_named_by_part_and_unit_and_described_in_a_sentence(metric: Metric) -> None:
    assert re.fullmatch(r"defi_[a-z]+(_[a-z]+)+", metric.name)
    assert metric.part in PARTS
    ending = "_total" if isinstance(metric, Counter) else ""
    named_by_unit = metric.name.endswith(f"_{metric.unit}{ending}")
    # The "_total" of what is counted and what a gauge is of are the same word: answers_total, loss.
    assert named_by_unit, f"{metric.name} does not end with its unit, {metric.unit}{ending}"
    assert metric.help.endswith(".") and "\n" not in metric.help
    assert not MANY_VALUES & set(metric.labels)


def test_names_are_unique_and_panels_hold_one_unit() -> None:
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    panels: dict[tuple[str, str], set[tuple[str, type[Metric]]]] = {}
    for metric in CATALOGUE:
        kind = (metric.unit if not isinstance(metric, Counter) else "rate", type(metric))
        panels.setdefault((metric.part, metric.panel), set()).add(kind)
    assert {panel: kinds for panel, kinds in panels.items() if len(kinds) > 1} == {}


def test_bounds_of_histograms_rise_and_are_positive_as_ray_asks() -> None:
    histograms = [metric for metric in CATALOGUE if isinstance(metric, Histogram)]
    assert histograms
    assert all(metric.buckets[0] > 0 for metric in histograms)
    assert all(list(metric.buckets) == sorted(set(metric.buckets)) for metric in histograms)


def test_values_reach_rays_metrics(recorded_metrics: dict[tuple[str, ...], float]) -> None:
    DATA_SAMPLES.add(8, run="r", corpus="bridge")
    DATA_SAMPLES.add(run="r", corpus="bridge")
    DATA_SAMPLES.add(0, run="r", corpus="other")
    TRAIN_STEP.set(3, run="r", kind="gfdm")
    TRAIN_STEP.set(2, run="r", kind="gfdm")
    SERVE_LATENCY.observe(0.5, policy_digest="d", phase="total")
    assert recorded_metrics == {
        ("defi_data_samples_total", "r", "bridge"): 9,
        ("defi_train_step", "r", "gfdm"): 2,
        ("defi_serve_latency_seconds", "d", "total"): 0.5,
    }


def test_labels_are_checked_also_where_nobody_listens() -> None:
    with pytest.raises(ValueError, match=r"defi_train_step has the labels \('run', 'kind'\), not \('run',\)"):
        TRAIN_STEP.set(1, run="r")


def test_a_process_without_ray_emits_nothing_and_imports_no_ray() -> None:
    code = (
        "import sys\nfrom defi_platform.metrics.catalogue import DATA_SAMPLES\n"
        "DATA_SAMPLES.add(run='r', corpus='c')\nassert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_kind_is_in_use() -> None:
    assert {type(metric) for metric in CATALOGUE} == {Counter, Gauge, Histogram}
