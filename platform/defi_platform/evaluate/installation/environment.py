"""Virtual environments of simulators: made once from a list, complete or not there.

What marks a complete one is a file that is written last. An installation that was interrupted goes on with the packages
that it has; one whose list has changed since is brought up to date.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from defi_platform.errors import ConfigError, SimulatorError, one_line
from defi_platform.evaluate.installation.package_list import PackageList

COMPLETE = "complete.json"
_PATHS = "clones.pth"
_LAST_LINES = 15
"""Of pip's output that an error quotes."""


class Environment:
    """A virtual environment `folder`/`name`, which may not be there yet."""

    def __init__(self, folder: str | Path, name: str):
        self.name = name
        self.path = Path(folder).absolute() / name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"

    def is_complete(self) -> bool:
        """Whether everything was installed into it and its interpreter is still there."""
        return bool(self._record()) and self.python.exists()

    def is_made_from(self, packages: PackageList, clones: Mapping[str, str]) -> bool:
        """Whether it is complete and has just what is asked for.

        Args:
            packages: its list.
            clones: name to folder, absolute.
        """
        record = self._record()
        return self.is_complete() and (record["packages"], record["clones"]) == (
            packages.digest,
            dict(clones),
        )

    def make(
        self, packages: PackageList, python: str | None, clones: Mapping[str, str], needs: Sequence[str]
    ) -> bool:
        """Installs what is missing.

        Args:
            packages: its list.
            python: interpreter that it is made of; None: the first on this machine that the list names.
            clones: name to folder of the clones that the list asks for.
            needs: modules that it must be able to import.

        Returns:
            False where it was complete before.

        Raises:
            ConfigError: the interpreter or a clone is not what the list asks for, or the folder holds something else.
            SimulatorError: pip fails, another process is at it, or a module cannot be imported afterwards.
        """
        clones = _checked_clones(packages, clones)
        with self._alone():
            if self.is_made_from(packages, clones):
                return False
            (self.path / COMPLETE).unlink(missing_ok=True)
            self._ensure_interpreter(python, packages)
            self._pip("install", "--requirement", str(packages.file))
            paths = [os.path.join(clones[clone.name], clone.below) for clone in packages.clones]
            (self._site_packages() / _PATHS).write_text("".join(f"{path}\n" for path in paths))
            self._check_imports(needs)
            record = {"packages": packages.digest, "clones": dict(clones)}
            partial = self.path / f"{COMPLETE}.partial"
            partial.write_text(json.dumps(record))
            partial.replace(self.path / COMPLETE)
        return True

    def _record(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads((self.path / COMPLETE).read_text())
        except FileNotFoundError:
            return {}
        return record

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.path.parent / f".{self.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SimulatorError(
                    f"{self.path} is being installed by another process; wait until it has ended."
                ) from error
            yield

    def _ensure_interpreter(self, python: str | None, packages: PackageList) -> None:
        wanted, version = _interpreter(python, packages)
        if self._has_version(version):
            return  # of an installation that was interrupted
        if self.path.exists():
            if any(self.path.iterdir()) and not (self.path / "pyvenv.cfg").exists():
                raise ConfigError(
                    f"{self.path} holds something else than a virtual environment; set environments to another folder."
                )
            shutil.rmtree(self.path)
        # Without pip, which many systems' Python cannot install offline or at all: ours installs into it.
        made = subprocess.run([wanted, "-m", "venv", "--without-pip", str(self.path)], text=True, **_CAUGHT)
        if made.returncode:
            raise SimulatorError(
                f"{wanted} cannot make a virtual environment: {_last_line(made.stdout)}. On Debian and Ubuntu: "
                f"apt-get install -y python{version}-venv; or set python to another interpreter."
            )

    def _has_version(self, version: str) -> bool:
        try:
            return self.python.exists() and _version(str(self.python)) == version
        except ConfigError:
            return False

    def _pip(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        last: deque[str] = deque(maxlen=_LAST_LINES)
        with subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_own_environment(),
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last.append(line.rstrip())
        if process.returncode:
            raise SimulatorError(
                f"pip cannot install the packages of '{self.name}' into {self.path}; it ends with:\n  "
                + "\n  ".join(last)
                + "\nRun the same command again when that is mended: it goes on with what is installed."
            )

    def _site_packages(self) -> Path:
        asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        said = subprocess.run([self.python, "-c", asked], text=True, check=True, stdout=subprocess.PIPE)
        return Path(said.stdout.strip())

    def _check_imports(self, needs: Sequence[str]) -> None:
        for module in needs:
            tried = subprocess.run(
                [self.python, "-c", f"import {module}"], text=True, env=_own_environment(), **_CAUGHT
            )
            if tried.returncode:
                raise SimulatorError(
                    f"everything is installed in {self.path}, but it cannot import {module}: {_last_line(tried.stdout)}"
                )


_CAUGHT: dict[str, Any] = {
    "stdin": subprocess.DEVNULL,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.STDOUT,
}


def _own_environment() -> dict[str, str]:
    """The process's variables without those that would lead another interpreter to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["it says nothing"])[-1]


def _checked_clones(packages: PackageList, clones: Mapping[str, str]) -> dict[str, str]:
    asked = {clone.name: clone for clone in packages.clones}
    for name in clones:
        if name not in asked:
            raise ConfigError(
                f"clones.{name}: {packages.file.stem} needs no such clone, but {', '.join(asked) or 'none'}."
            )
    missing = [clone for name, clone in asked.items() if name not in clones]
    if missing:
        lines = [f"git clone {clone.url}, then clones.{clone.name}=" for clone in missing]
        raise ConfigError(
            f"{packages.file.stem} needs clones of repositories that are on no package index. Make them, and name their "
            "folders:\n  " + "\n  ".join(f"{line}FOLDER" for line in lines)
        )
    folders = {name: str(Path(clones[name]).expanduser().absolute()) for name in asked}
    for name, clone in asked.items():
        if not Path(folders[name], clone.below).is_dir():
            raise ConfigError(
                f"clones.{name}: {Path(folders[name], clone.below)} is no folder; clone {clone.url}."
            )
    return folders


def _interpreter(python: str | None, packages: PackageList) -> tuple[str, str]:
    """The interpreter to use and its version, such as "3.11"."""
    if python is not None:
        version = _version(python)
        if packages.pythons and version not in packages.pythons:
            raise ConfigError(
                f"python is {python}, which is {version}; {packages.file.stem} needs {' or '.join(packages.pythons)}."
            )
        return python, version
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    for version in packages.pythons or (own,):
        # Not this process's virtual environment: what is made of it follows it when it is removed.
        found = shutil.which(f"python{version}") or (sys.executable if version == own else None)
        if found and _version(found) == version:
            return found, version
    raise ConfigError(
        f"{packages.file.stem} needs Python {' or '.join(packages.pythons)}, and this machine has none on its PATH. "
        "Install one, or set python=PATH of its interpreter."
    )


def _version(python: str) -> str:
    """Version of an interpreter, such as "3.11". Raises: ConfigError where it does not run."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        said = subprocess.run([python, "-c", asked], text=True, timeout=60, env=_own_environment(), **_CAUGHT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"python is {python}, which does not run as an interpreter: {one_line(error)}"
        ) from error
    if said.returncode:
        raise ConfigError(
            f"python is {python}, which does not run as an interpreter: {_last_line(said.stdout)}"
        )
    return str(said.stdout).strip()
