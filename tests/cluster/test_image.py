"""The image: what its build reads is there and is sent along, and its user is that of the pods."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from rendered import REPOSITORY, VALUES
from rendering.kubernetes.pods import USER

DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"


def instructions() -> list[str]:
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return text.replace("\\\n", " ").splitlines()


def test_all_that_is_copied_exists_and_is_not_left_out() -> None:
    ignored = (REPOSITORY / "cluster" / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored, "what is not named is not sent"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = [
        line.split()[1:-1] for line in instructions() if line.startswith("COPY") and "--from" not in line
    ]
    sources = {source for line in copied for source in line}
    assert sources == sent
    assert all((REPOSITORY / source).exists() for source in sources)


def test_every_installation_is_pinned() -> None:
    installs = [part for line in instructions() for part in re.findall(r"pip install [^;&]*", line)]
    assert len(installs) == 3
    assert all("-c constraints.txt" in install for install in installs)
    script = REPOSITORY / "cluster" / "image_requirements.py"
    listed = subprocess.run(
        [sys.executable, str(script), str(REPOSITORY / "pyproject.toml")], capture_output=True, text=True
    ).stdout.splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) < set(listed)
    pinned = {
        _name(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert {_name(line) for line in listed} - pinned == set()


def test_the_user_is_that_of_the_pods_and_no_root() -> None:
    assert f"USER {USER}:{USER}" in instructions()
    assert f"--uid {USER}" in DOCKERFILE.read_text()


def test_docker_s_own_name_for_the_list_is_used() -> None:
    # Docker reads .dockerignore only at the root of what is sent; beside a Dockerfile it has to bear its name.
    assert not (REPOSITORY / ".dockerignore").exists()
    assert VALUES.is_dir() and Path(f"{DOCKERFILE}.dockerignore").is_file()


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=;! ]", requirement, maxsplit=1)[0].lower().replace("_", "-")
