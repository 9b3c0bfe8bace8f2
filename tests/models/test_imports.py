from __future__ import annotations

import subprocess
import sys

import pytest

import defi_models

PROGRAM = """
import pkgutil, sys
import defi_models
for module in pkgutil.walk_packages(defi_models.__path__, "defi_models."):
    __import__(module.name)
found = [name for name in sys.modules if name.split(".")[0] in ("ray", "defi_platform", "omegaconf", "deepspeed")]
print(found)
"""


NAMES = """
import sys
import defi_models
assert "torch" not in sys.modules, "the version alone must not cost the import of torch"
assert set(defi_models.__all__) <= set(dir(defi_models))
from defi_models import *
print(GFDM.kind, GIDM.kind, DeFIPolicy.kind, presets.gfdm("nano").preset, defi_models.__version__)
"""


def test_the_package_exports_its_models_and_presets_and_loads_torch_only_when_they_are_used() -> None:
    run = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["gfdm", "gidm", "policy", "nano", defi_models.__version__]


def test_a_name_that_the_package_does_not_export_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GDFM'"):
        _ = defi_models.GDFM


def test_the_models_import_neither_ray_nor_the_platform() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
