"""benchmarks/identical_losses.py finds the smallest difference; that it trains is shown by running it."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "identical_losses", repository / "benchmarks/identical_losses.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The part of a complete run folder that is compared."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    write_rows(folder, loss=0.1 + 0.2, data_s=0.5)
    (folder / "run_card.json").write_text(json.dumps({"data_fingerprint": "0123456789abcdef"}))
    save_file({"weight": np.arange(6, dtype=np.float32)}, folder / "model" / "model.safetensors")
    return folder


def write_rows(folder: Path, loss: float, data_s: float) -> None:
    rows = [
        {"step": 0, "split": "attempt", "source": "code"},
        {"step": 0, "split": "validation", "loss": 1.5, "wall_s": 3.0},
        {"step": 1, "split": "train", "loss": loss, "lr": 0.01, "data_s": data_s, "mfu": 0.3},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def last_bit_of_a_loss(folder: Path) -> None:
    write_rows(folder, loss=math.nextafter(0.1 + 0.2, 1.0), data_s=0.5)


def sign_of_a_zero_weight(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["weight"][0] = -0.0
    save_file(weights, file)


def data(folder: Path) -> None:
    (folder / "run_card.json").write_text(json.dumps({"data_fingerprint": "0123456789abcdee"}))


def a_missing_row(folder: Path) -> None:
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (last_bit_of_a_loss, "train 1 loss: 0.30000000000000004, there 0.3000000000000001"),
        (sign_of_a_zero_weight, "weights model.safetensors weight"),
        (data, "data fingerprint: 0123456789abcdef, there 0123456789abcdee"),
        (a_missing_row, "train 1 loss: 0.30000000000000004, there None"),
    ],
)
def test_a_difference_is_found(
    script: ModuleType, run: Path, tmp_path: Path, change: Callable[[Path], None], found: str
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    change(other)
    assert found in script.Result.of(run).differences(script.Result.of(other))


def test_the_time_that_a_step_took_is_no_difference(script: ModuleType, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    write_rows(other, loss=0.1 + 0.2, data_s=0.7)
    here = script.Result.of(run)
    assert here.differences(script.Result.of(other)) == []
    assert set(here.figures) == {"validation 0 loss", "train 1 loss", "train 1 lr"}
