"""The wheel for robot computers: Python 3.8, few packages, nothing of the platform."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "defi_client").rglob("*.py"))
ALLOWED = {"numpy", "msgpack", "websockets", "defi_client"}
FOR_RECORDING = {"av", "pyarrow"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_module_is_python_3_8_and_imports_little(file: Path) -> None:
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    allowed = ALLOWED | (FOR_RECORDING if file.parent.name == "recording" else set())
    assert imported - set(sys.stdlib_module_names) <= allowed


def test_without_the_extra_the_client_works_and_recording_says_what_to_install() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('av', 'pyarrow') else find(name, *a)\n"
        "import defi_client.control\n"
        "assert not {'av', 'pyarrow', 'defi_platform'} & set(sys.modules)\n"
        "import defi_client.recording.recorder"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip().endswith("recording needs av and pyarrow: pip install 'defi-client[record]'")


def test_the_wheel_holds_the_package_and_asks_for_three(tmp_path: Path) -> None:
    source = tmp_path / "defi_client"
    shutil.copytree(
        ROOT / "defi_client", source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=clean)
    assert not (source / "build").exists(), "it would count as modules of the package"
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        text = files.read(metadata).decode()
    assert {str(file.relative_to(ROOT)) for file in FILES} <= names
    wanted = [line.split(": ")[1] for line in text.splitlines() if line.startswith("Requires-Dist")]
    assert [name for name in wanted if "extra" not in name] == [
        "numpy>=1.21",
        "msgpack>=1.0",
        "websockets>=13",
    ]
    assert "Requires-Python: >=3.8" in text and any(name.endswith("LICENSE") for name in names)
