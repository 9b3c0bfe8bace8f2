"""The two repositories that CALVIN consists of: where the user's clones are, and what is taken from them.

Neither is on PyPI, and installing them with pip leaves out the robot and the furniture, so both stay where the
user cloned them; the environment says where.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from defi_platform.errors import SimulatorError, one_line

COMPLETE: Final = "complete.json"
"""In the folder of an environment, written by jobs/install_benchmark.py."""
FIX: Final = (
    "Clone https://github.com/mees/calvin and https://github.com/mees/calvin_env, then run: "
    "python jobs/install_benchmark.py calvin clones.calvin=FOLDER clones.calvin_env=FOLDER"
)

ORACLE: Final = "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"
ANNOTATIONS: Final = "calvin_models/conf/annotations/new_playtable_validation.yaml"
SCENE: Final = "conf/scene/calvin_scene_D.yaml"
TABLE: Final = "data/calvin_table_D/urdf/calvin_table_D.urdf"


@dataclass(frozen=True)
class Clones:
    """The folders of the two repositories."""

    calvin: Path
    calvin_env: Path

    @property
    def oracle(self) -> Path:
        """Description of the tasks' success, for calvin_env's own code."""
        return self.calvin / ORACLE

    @property
    def annotations(self) -> Path:
        """Instructions of the tasks, several of each; evaluations give the first."""
        return self.calvin / ANNOTATIONS

    def contents(self) -> dict[str, str]:
        """Digest of what is used of each repository: the simulator's code, settings and bodies; the two files."""
        simulator = [
            path
            for folder, pattern in (("calvin_env", "*.py"), ("conf", "*.yaml"), ("data", "*"))
            for path in (self.calvin_env / folder).rglob(pattern)
            if path.is_file() and "__pycache__" not in path.parts
        ]
        return {
            "calvin": _digest(self.calvin, [self.oracle, self.annotations]),
            "calvin_env": _digest(self.calvin_env, simulator),
        }


def clones(prefix: str = sys.prefix) -> Clones:
    """The clones that the environment at `prefix` names.

    Raises:
        SimulatorError: it names none, or a folder is no such clone.
    """
    file = Path(prefix) / COMPLETE
    try:
        named = json.loads(file.read_text())["clones"]
        found = Clones(Path(named["calvin"]), Path(named["calvin_env"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SimulatorError(
            f"the environment {prefix} does not say where the clones of CALVIN are ({one_line(error)}). {FIX}"
        ) from error
    if problem := lacks(found):
        raise SimulatorError(f"{problem}. {FIX}")
    return found


def lacks(found: Clones) -> str | None:
    """Says what a folder has not that a clone has; None where both are complete."""
    for folder, name, needed in (
        (found.calvin, "calvin", (ORACLE, ANNOTATIONS)),
        (found.calvin_env, "calvin_env", ("calvin_env/__init__.py", SCENE, TABLE)),
    ):
        for file in needed:
            if not (folder / file).is_file():
                return f"{name}: {folder} is no clone of mees/{name}: it has no {file}"
    return None


def _digest(root: Path, paths: list[Path]) -> str:
    """SHA-256 over names and contents, shortened to 16 digits."""
    total = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        total.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]
