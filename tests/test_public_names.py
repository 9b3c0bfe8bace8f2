"""The names that the platform package exports, and its version."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import defi_client
import defi_models
import defi_platform

CHEAP = """
import sys
sys.modules.update(torch=None, ray=None)
import defi_platform
from defi_platform import UserError, load_config
print(defi_platform.__version__)
"""


@pytest.mark.parametrize("name", defi_platform.__all__)
def test_every_exported_name_exists_and_is_no_module_s(name: str) -> None:
    value = getattr(defi_platform, name)
    assert name == "__version__" or callable(value)
    assert find_spec(f"defi_platform.{name}") is None, "importing that module would replace the function"


def test_importing_the_package_imports_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", CHEAP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == defi_models.__version__


def test_the_version_is_written_in_one_place(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())
    assert "version" not in settings["project"] and settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "defi_models.__version__"}
    assert defi_platform.__version__ == defi_models.__version__
    assert defi_client.__version__ == defi_models.__version__, "its wheel cannot read that of the models"
