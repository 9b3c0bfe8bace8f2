"""jobs/check_cluster.py: checks that a cluster can run a job, before it is submitted."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.requirements import check_demands, waits_for
from defi_platform.config import JOB_CONFIGS, RayConfig
from defi_platform.config.loader import load_config
from defi_platform.errors import ConfigError
from defi_platform.preflight.demands import demands_of
from defi_platform.preflight.findings import has_failed, summary
from defi_platform.preflight.folders import DEFAULT_MIB, Folder
from defi_platform.preflight.job_needs import folders, listens, load_any
from defi_platform.preflight.run import Needs, check, nodes


def check_cluster(argv: Sequence[str] | None = None) -> int:
    """Checks the cluster that a job would run on, and prints one line per check.

    Args:
        argv: arguments; None: those of the process.

    Returns: the exit code: 0 when every check passed, 1 when one failed.
    Raises: UserError for a config of no job, or a cluster that cannot be reached.
    """
    arguments = _parser().parse_intermixed_args(argv)
    connection, needs = _needs(arguments)
    findings = []
    with ray_session(connection):
        count = len(nodes())
        for finding in check(needs, arguments.mib, arguments.timeout):
            findings.append(finding)
            print(finding.line(), flush=True)
    print(summary(findings, count), flush=True)
    return int(has_failed(findings))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check, on every node, that a cluster can run a job: versions, resources, storage, memory, clock, "
        "decoders, GPUs, network, token, ports. One line per check: ok, or what to do. Exit code 1 if one failed."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="of the job that is to run; none: only the cluster is checked"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of that config, such as ray.address=auto"
    )
    parser.add_argument(
        "--job", choices=sorted(JOB_CONFIGS), help="the job; default: the first whose config the file can be"
    )
    parser.add_argument(
        "--folder", action="append", default=[], metavar="URI", help="another folder to write to"
    )
    parser.add_argument(
        "--mib", type=int, default=DEFAULT_MIB, help="MiB that each node writes and reads (%(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="for one check on a node (%(default)g)"
    )
    return parser


def _needs(arguments: argparse.Namespace) -> tuple[RayConfig, Needs]:
    extra = [Folder(storage.absolute(uri), "--folder", True) for uri in arguments.folder]
    if arguments.mib < 1:
        raise ConfigError(f"--mib is {arguments.mib}; it must be 1 or more.")
    if arguments.config is None and arguments.job is None:
        for override in arguments.overrides:
            if not override.startswith("ray."):
                raise ConfigError(
                    f"'{override}' is of a job's config: name it with --config FILE, or --job NAME."
                )
        only = [override.removeprefix("ray.") for override in arguments.overrides]
        return load_config(RayConfig, None, only), Needs(extra)
    _, config = load_any(arguments.config, arguments.overrides, arguments.job)
    served = listens(config)
    connection: RayConfig = config.ray
    return connection, Needs(
        folders=[*folders(config), *extra],
        host=served.host if served else "",
        port=served.port if served else None,
        schedulable=functools.partial(_schedulable, config),
    )


def _schedulable(config: Any) -> str:
    demands = demands_of(config)
    if not demands:
        return ""
    waiting = waits_for(demands, check_demands(demands))
    asked = "; ".join(demand.text() for demand in demands)
    return f"{asked}: " + (f"would wait now ({waiting})" if waiting else "there is room now")
