"""The Python of a benchmark's simulator, and how one gets its packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from defi_platform import storage
from defi_platform.config import EvaluateConfig, RecordConfig, SimulatorConfig
from defi_platform.errors import SimulatorError
from defi_platform.evaluate.benchmarks.registry import registration
from defi_platform.evaluate.installation.environment import Environment

_CHECKOUT = Path(__file__).resolve().parents[4]


def environments_folder(simulator: SimulatorConfig, output: str) -> Path:
    """Folder of the benchmarks' virtual environments, one of the benchmark's name each.

    Args:
        simulator: its config.
        output: of the run, beside which they are looked for where the config names no folder.
    """
    if simulator.environments is not None:
        return Path(simulator.environments)
    place = storage.absolute(output)
    return (Path.cwd() if "://" in place else Path(place).parent) / "environments"


def interpreter(benchmark: str, simulator: SimulatorConfig, output: str) -> str:
    """The Python that has a benchmark's packages.

    Args:
        benchmark: its name, or module:Class.
        simulator: its config.
        output: of the run.

    Raises:
        SimulatorError: the benchmark needs an environment of its own, and there is none.
    """
    if simulator.python is not None:
        return simulator.python
    where = registration(benchmark)
    if where.environment is None:
        return sys.executable
    folder = environments_folder(simulator, output)
    own = Environment(folder, where.environment)
    if own.is_complete():
        return str(own.python)
    if where.extra is not None:
        return sys.executable
    raise SimulatorError(
        f"{benchmark} is not installed: there is no complete environment in {own.path}. {installation(benchmark)}, or "
        "set simulator.python to an interpreter that has it."
    )


def check_installed(config: EvaluateConfig | RecordConfig) -> None:
    """Checks, before a Ray is started on this machine, that its simulators could run; a cluster's nodes say it themselves.

    Args:
        config: of an evaluation or a recording.

    Raises:
        SimulatorError: the interpreter is none, or the benchmark is not installed here; says the one command.
    """
    if config.ray.address is not None or "RAY_ADDRESS" in os.environ:
        return
    python = interpreter(config.benchmark, config.simulator, config.output)
    if shutil.which(python) is None:
        raise SimulatorError(
            f"simulator.python is {python}, which is no program that can be run here. Name an interpreter that has the packages "
            f"of {config.benchmark}."
        )
    missing = missing_modules(config.benchmark) if python == sys.executable else []
    if missing:
        raise SimulatorError(
            f"{config.benchmark} is not installed here (no module '{missing[0]}'). {installation(config.benchmark)}."
        )


def missing_modules(benchmark: str) -> list[str]:
    """Modules of a benchmark's simulator that this interpreter does not have."""
    return [name for name in registration(benchmark).needs if importlib.util.find_spec(name) is None]


def installation(benchmark: str) -> str:
    """The remedy where a benchmark's packages are absent; the start of a sentence."""
    where = registration(benchmark)
    if where.extra is not None:
        if (_CHECKOUT / "pyproject.toml").is_file():
            what = f"-c {_CHECKOUT}/constraints.txt -e '{_CHECKOUT}[{where.extra}]'"
        else:
            what = f"'defi-platform[{where.extra}]'"
        return f"Install it with: {sys.executable} -m pip install {what}"
    if where.environment is not None:
        command = (
            "python jobs/install_benchmark.py"
            if (_CHECKOUT / "jobs/install_benchmark.py").is_file()
            else "defi install_benchmark"
        )
        return f"Install it with: {command} {benchmark}"
    return "Install its packages, or set simulator.python to an interpreter that has them"
