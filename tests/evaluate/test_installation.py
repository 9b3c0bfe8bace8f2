"""Virtual environments of simulators: complete or not there, resumed, never half; pip and interpreters are real."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from defi_platform.config import InstallConfig
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.benchmarks import registry
from defi_platform.evaluate.benchmarks.interface import Registration
from defi_platform.evaluate.installation.environment import COMPLETE, Environment
from defi_platform.evaluate.installation.package_list import FOLDER, PackageList, package_list
from defi_platform.evaluate.simulation import interpreter
from defi_platform.evaluate.simulation.install import install

OWN = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path, name: str, content: str) -> Path:
    """A wheel of one module."""
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": content,
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text.encode())}\n")
    files[f"{about}/RECORD"] = "".join([*rows, f"{about}/RECORD,,\n"])
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return file


def written(folder: Path, *lines: str) -> PackageList:
    (folder / "toy.txt").write_text("\n".join(["--no-index", *lines, ""]))
    return package_list("toy", folder)


def said(environment: Environment, code: str) -> str:
    return subprocess.run(
        [environment.python, "-c", code], text=True, check=True, stdout=subprocess.PIPE
    ).stdout.strip()


def test_an_environment_is_made_once_and_again_when_its_list_changes(tmp_path: Path) -> None:
    first, second = (wheel(tmp_path, name, f"ANSWER = '{name}'\n") for name in ("toy_one", "toy_two"))
    (tmp_path / "clone/inner").mkdir(parents=True)
    (tmp_path / "clone/inner/toy_cloned.py").write_text("WHERE = __file__\n")
    asks = "# clone toy_clone/inner: https://example.org/toy_clone"
    packages = written(tmp_path, asks, str(first))
    environment = Environment(tmp_path / "environments", "toy")
    clones = {"toy_clone": str(tmp_path / "clone")}
    assert not environment.is_complete()
    with pytest.raises(
        ConfigError, match=r"git clone .*example\.org/toy_clone, then clones\.toy_clone=FOLDER"
    ):
        environment.make(packages, None, {}, ())
    assert environment.make(packages, sys.executable, clones, ("toy_one", "toy_cloned"))
    assert said(environment, "import toy_one; print(toy_one.ANSWER)") == "toy_one"
    assert said(environment, "import sys; print(sys.prefix)") == str(environment.path)
    assert "clone/inner" in said(environment, "import toy_cloned; print(toy_cloned.WHERE)")
    assert not environment.make(packages, None, clones, ("toy_one",)), "nothing is left to do"

    kept = environment.python.lstat().st_ino
    longer = written(tmp_path, asks, str(first), str(second))
    assert environment.make(longer, sys.executable, clones, ("toy_one", "toy_two"))
    assert said(environment, "import toy_two; print(toy_two.ANSWER)") == "toy_two"
    assert environment.python.lstat().st_ino == kept, "goes on with what is there"


def test_an_installation_that_fails_looks_unfinished_and_goes_on(tmp_path: Path) -> None:
    environment = Environment(tmp_path, "toy")
    good = wheel(tmp_path, "toy_one", "")
    with pytest.raises(SimulatorError, match=r"(?s)pip cannot install .*toy-absent.*same command again"):
        environment.make(written(tmp_path, str(good), "toy-absent==3"), sys.executable, {}, ())
    assert environment.python.exists() and not environment.is_complete()
    bad = wheel(tmp_path, "toy_bad", "import toy_needs_this\n")
    with pytest.raises(SimulatorError, match=r"cannot import toy_bad: .*toy_needs_this"):
        environment.make(written(tmp_path, str(bad)), sys.executable, {}, ("toy_bad",))
    assert not environment.is_complete()
    assert environment.make(written(tmp_path, str(good)), sys.executable, {}, ("toy_one",))
    assert environment.is_complete()
    environment.python.unlink()
    assert not environment.is_complete(), "its interpreter is gone"
    assert (environment.path / COMPLETE).exists()


def test_the_job_says_of_an_extra_whether_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = registry.REGISTERED["fetch"].where
    monkeypatch.setitem(registry.REGISTERED, "fetch", Registration(where, extra="fetch", needs=("json",)))
    config = InstallConfig(benchmark="fetch", environments=str(tmp_path))
    assert install(config) == f"fetch is installed in {sys.executable}"
    monkeypatch.setitem(registry.REGISTERED, "fetch", Registration(where, extra="fetch", needs=("absent_",)))
    with pytest.raises(SimulatorError, match=r"no module 'absent_'.* -m pip install .*\[fetch\]"):
        install(config)
    with pytest.raises(ConfigError, match="python: fetch needs no interpreter of its own"):
        install(replace(config, python="python3"))
    with pytest.raises(ConfigError, match="Did you mean 'fetch'"):
        install(replace(config, benchmark="fetsh"))
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else than a virtual environment"):
        Environment(tmp_path, "toy").make(written(tmp_path), sys.executable, {}, ())
    assert (tmp_path / "toy/thesis.tex").read_text() == "mine"


def test_two_processes_do_not_install_into_one_environment(tmp_path: Path) -> None:
    with (tmp_path / ".toy.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SimulatorError, match="being installed by another process"):
            Environment(tmp_path, "toy").make(written(tmp_path), sys.executable, {}, ())


@pytest.mark.parametrize(
    ("lines", "python", "clones", "message"),
    [
        (["# python: 9.9"], None, {}, r"needs Python 9\.9, and this machine has none .*set python=PATH"),
        (["# python: 2.7"], sys.executable, {}, rf"which is {OWN}; toy needs 2\.7"),
        ([], "/absent/python", {}, "does not run as an interpreter"),
        ([], "/bin/false", {}, "does not run as an interpreter: it says nothing"),
        ([], None, {"other": "/"}, "clones.other: toy needs no such clone, but none"),
        (
            ["# clone a: https://x"],
            None,
            {"a": "/absent"},
            r"clones\.a: /absent/? is no folder; clone https://x",
        ),
    ],
)
def test_what_does_not_suit_is_said_before_anything_is_made(
    tmp_path: Path, lines: list[str], python: str | None, clones: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Environment(tmp_path, "toy").make(written(tmp_path, *lines), python, clones, ())
    assert not (tmp_path / "toy").exists()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.txt")), ids=lambda file: file.stem)
def test_every_list_has_what_the_child_process_needs(file: Path) -> None:
    packages = package_list(file.stem)
    names = {
        line.split("==")[0].split("<")[0].split(">")[0].strip()
        for line in file.read_text().splitlines()
        if line and not line.startswith(("#", "-"))
    }
    assert {"numpy", "msgpack"} <= names
    assert packages.pythons, "its wheels are of some versions of Python only"


def test_the_command_that_installs_is_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has jobs/; an installed package has the command `defi`."""
    assert interpreter.installation("calvin") == "Install it with: python jobs/install_benchmark.py calvin"
    monkeypatch.setattr(interpreter, "_CHECKOUT", tmp_path)
    assert interpreter.installation("simplerenv") == "Install it with: defi install_benchmark simplerenv"
