from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from defi_platform.train.observability.code_version import code_version, source_digest

PACKAGES = (Path("platform/defi_platform"), Path("defi_models"), Path("defi_client"))


def copied(repository: Path, folder: Path) -> list[Path]:
    return [
        Path(shutil.copytree(repository / package, folder / package, ignore=shutil.ignore_patterns("*.pyc")))
        for package in PACKAGES
    ]


def test_the_code_is_identified_by_its_content_in_any_folder(repository: Path, tmp_path: Path) -> None:
    version = code_version()
    packages = copied(repository, tmp_path)
    assert source_digest(packages) == version["source"]
    changed = packages[1] / "gidm.py"
    changed.write_text(changed.read_text() + "#")
    assert source_digest(packages) != version["source"]


def test_a_checkout_reports_its_commit_too(repository: Path) -> None:
    if not (repository / ".git").exists():
        assert code_version()["commit"] is None
        return
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert code_version()["commit"] == head.stdout.strip()
