from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import pkgutil, sys
import defi_models
for module in pkgutil.walk_packages(defi_models.__path__, "defi_models."):
    __import__(module.name)
found = [name for name in sys.modules if name.split(".")[0] in ("ray", "defi_platform", "omegaconf", "deepspeed")]
print(found)
"""


def test_the_models_import_neither_ray_nor_the_platform() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
