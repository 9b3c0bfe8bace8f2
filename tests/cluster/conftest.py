"""What tests of rendered files share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from defi_platform.config import JOB_CONFIGS
from defi_platform.config.loader import load_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "cluster"))


@pytest.fixture
def job_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Sequence[str]], Any]:
    """Loads the config that a job's command line asks for, as the job would in a folder of its own."""
    monkeypatch.setenv("DEFI_HOME", "/home")
    monkeypatch.chdir(tmp_path)
    return lambda arguments: _load(tuple(arguments))


@cache
def _load(arguments: tuple[str, ...]) -> Any:
    job, *rest = arguments
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(rest)
    return load_config(JOB_CONFIGS[job], options.config, options.overrides)
