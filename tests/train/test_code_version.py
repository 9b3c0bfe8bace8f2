from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from defi_platform.train.observability.code_version import code_version, source_digest

PACKAGES = (Path("platform/defi_platform"), Path("defi_models"))


def copied(repository: Path, folder: Path) -> list[Path]:
    return [
        Path(shutil.copytree(repository / package, folder / package, ignore=shutil.ignore_patterns("*.pyc")))
        for package in PACKAGES
    ]


def test_the_code_is_told_by_its_content_wherever_it_lies(repository: Path, tmp_path: Path) -> None:
    told = code_version()
    packages = copied(repository, tmp_path)
    assert source_digest(packages) == told["source"]
    changed = packages[1] / "gidm.py"
    changed.write_text(changed.read_text() + "#")
    assert source_digest(packages) != told["source"]


def test_in_a_checkout_the_commit_is_told_too(repository: Path) -> None:
    if not (repository / ".git").exists():
        assert code_version()["commit"] is None
        return
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert code_version()["commit"] == head.stdout.strip()
