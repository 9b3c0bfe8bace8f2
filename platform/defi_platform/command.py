"""The command `defi NAME ...`, which runs a job of the folder jobs/."""

import ast
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from defi_models import __version__
from defi_models.errors import did_you_mean
from defi_platform.errors import ConfigError, exit_code

JOBS = Path(__file__).parent / "jobs"


def job_names() -> list[str]:
    """Names of the jobs, in alphabetical order."""
    return sorted(file.stem for file in JOBS.glob("*.py") if file.stem.isidentifier() and file.stem[0] != "_")


def descriptions() -> Mapping[str, str]:
    """Job -> the first sentence of its module, which is not imported for it."""
    texts = {}
    for name in job_names():
        module = ast.parse((JOBS / f"{name}.py").read_text(encoding="utf-8"))
        texts[name] = (ast.get_docstring(module) or "").split("\n\n")[0].replace("\n", " ")
    return texts


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the job that the command line names first, with the rest of it.

    Args:
        argv: arguments; None: those of the process.

    Returns: the job's exit code; 0 after `--help` and `--version`.
    Raises: ConfigError for a job that does not exist; what the job raises.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        width = max(map(len, job_names()))
        lines = [f"  {name:{width}}  {text}" for name, text in descriptions().items()]
        print(
            "\n".join(
                [
                    "usage: defi JOB [--config FILE] [key=value ...]",
                    "",
                    *lines,
                    "",
                    "defi JOB --help lists its keys.",
                ]
            )
        )
        return 0
    name, *arguments = given
    if name == "--version":
        print(__version__)
        return 0
    if name not in job_names():
        raise ConfigError(
            f"there is no job '{name}'.{did_you_mean(name, job_names())} `defi --help` lists them."
        )
    # The job's parser names the command in its usage line, and reads the process's arguments.
    sys.argv = [f"defi {name}", *arguments]
    return int(import_module(f"defi_platform.jobs.{name}").main())


def main() -> int:
    """Runs `defi`. Returns: the process's exit code; see `defi_platform.errors.exit_code`."""
    return exit_code(run)
