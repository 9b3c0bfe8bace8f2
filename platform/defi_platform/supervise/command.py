"""jobs/supervise.py: its command line, and what it submits."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from defi_models.errors import did_you_mean
from defi_platform.cluster.shipped_code import RUNTIME_ENV, check_shipped_code, read_runtime_env
from defi_platform.config import JOB_CONFIGS
from defi_platform.config.loader import data_home, parse_arguments
from defi_platform.errors import ConfigError
from defi_platform.supervise.attempts import AttemptPolicy, Budget, Submission
from defi_platform.supervise.work import JOBS, WorkSeen


def supervise(argv: Sequence[str] | None = None, description: str = "") -> int:
    """Submits a job to a Ray cluster, and again whenever it or the head dies, until its run is complete.

    Args:
        argv: arguments; None: those of the process.
        description: for --help.

    Returns: the exit code, see `Supervisor.run`.
    Raises: UserError: the job's config does not fit, no cluster answers, or it refuses the token or the job.
    """
    options = _parser(description).parse_args(argv)
    name = _job_name(options.job)
    if options.failures < 0:
        raise ConfigError(f"--failures is {options.failures}; it must be 0 or more.")
    if not 0 < options.hours < math.inf:
        raise ConfigError(f"--hours is {options.hours:g}; it must be a number above 0.")
    if os.environ.get("DEFI_HOME"):
        # Before the folder changes; where the job runs there is another one.
        os.environ["DEFI_HOME"] = data_home()
    if options.working_dir:
        # The job finds its config relative to that folder, so this process does too.
        os.chdir(_folder(options.working_dir))
    work = JOBS[name]
    config = parse_arguments(JOB_CONFIGS[name], options.arguments, work.flags)
    # Imported late: Ray takes seconds, and --help and mistakes in the config should not.
    from defi_platform.supervise.ray_jobs import RayJobs
    from defi_platform.supervise.supervisor import Supervisor

    signal.signal(signal.SIGTERM, _interrupt)
    supervisor = Supervisor(
        RayJobs(options.address, lambda line: print(line, flush=True)),
        submission(
            name, options.arguments, shipped=bool(options.working_dir), runtime_env=options.runtime_env
        ),
        WorkSeen(work.places(config), lambda line: print(f"supervise: {line}", flush=True)),
        AttemptPolicy(Budget(failures=options.failures, hours=options.hours)),
        is_service=work.is_service,
    )
    return supervisor.run()


def submission(
    name: str, arguments: Sequence[str], *, shipped: bool, runtime_env: str | None = None
) -> Submission:
    """The submission of a job from the working directory.

    Args:
        name: of the job.
        arguments: of the job.
        shipped: the working directory is sent along; otherwise the cluster's image holds the platform.
        runtime_env: file with the runtime environment; None: `RUNTIME_ENV` of a folder that is sent.

    Raises: ConfigError: the file cannot be read; ShippedCodeError: the folder is too large to be sent.
    """
    # Under another DEFI_HOME the same command is another run.
    home = os.environ.get("DEFI_HOME", "")
    key = hashlib.sha256(json.dumps([name, list(arguments), home]).encode()).hexdigest()[:8]
    program = ["python", f"jobs/{name}.py"] if shipped else ["python", "-m", f"defi_platform.jobs.{name}"]
    path = runtime_env or (RUNTIME_ENV if shipped else None)
    environment = read_runtime_env(path) if path else {}
    if shipped:
        check_shipped_code(".", environment.get("excludes") or ())
        environment["working_dir"] = "."
    if home:
        environment["env_vars"] = {"DEFI_HOME": home, **environment.get("env_vars", {})}
    return Submission(
        run=f"{name}-{key}", entrypoint=shlex.join([*program, *arguments]), runtime_env=environment
    )


def _parser(description: str) -> argparse.ArgumentParser:
    budget = Budget()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--address",
        metavar="URL",
        help="dashboard of the cluster; default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", help="checkout to send along; without it the cluster has the platform"
    )
    parser.add_argument(
        "--runtime-env", metavar="FILE", help=f"runtime environment; default: {RUNTIME_ENV} of --working-dir"
    )
    parser.add_argument(
        "--failures",
        type=int,
        default=budget.failures,
        help="failed attempts without progress after which there is no other (default: %(default)s)",
    )
    parser.add_argument(
        "--hours",
        type=float,
        default=budget.hours,
        help="hours after which a failure no longer counts (default: %(default)g)",
    )
    parser.add_argument("job", metavar="JOB", help=f"one of {', '.join(sorted(JOBS))}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the job's own arguments")
    return parser


def _job_name(given: str) -> str:
    name = given.rpartition("/")[2].removesuffix(".py").rpartition(".")[2]
    if name not in JOBS:
        raise ConfigError(
            f"'{given}' cannot be supervised.{did_you_mean(name, sorted(JOBS))} Choose one of "
            f"{', '.join(sorted(JOBS))}."
        )
    return name


def _folder(path: str) -> Path:
    folder = Path(path)
    if not (folder / "jobs").is_dir():
        raise ConfigError(
            f"--working-dir {path} has no jobs/ folder. Name the checkout of the platform, or leave it out where "
            "the cluster's image holds the platform."
        )
    return folder


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
