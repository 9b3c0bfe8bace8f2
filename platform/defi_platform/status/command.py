"""jobs/status.py: the runs of folder trees and of a cluster."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence

from defi_platform.cluster import ray_session
from defi_platform.cluster.run_registry import registered_runs
from defi_platform.config import RayConfig
from defi_platform.config.loader import data_home
from defi_platform.errors import ConfigError
from defi_platform.status.find import DEPTH, Found, find_runs
from defi_platform.status.prices import Prices, read_prices
from defi_platform.status.table import plain, table

MAX_SKIPPED = 5


def show_status(argv: Sequence[str] | None = None) -> int:
    """Shows the state of runs, once or again and again.

    Args:
        argv: arguments; None: those of the process.

    Returns: the exit code.
    Raises: UserError for an option out of range, a cluster that does not answer, values without prices.
    """
    arguments = _parser().parse_args(argv)
    if arguments.depth < 0:
        raise ConfigError(f"--depth is {arguments.depth}; it must be 0 or more.")
    if arguments.every is not None and not 0 < arguments.every < math.inf:
        raise ConfigError(f"--every is {arguments.every:g}; it must be a number of seconds above 0.")
    prices = read_prices(arguments.prices) if arguments.prices else None
    address = arguments.address or os.environ.get("RAY_ADDRESS")
    if address:
        with ray_session(RayConfig(address=address)):
            return _repeat(arguments, prices, on_cluster=True)
    return _repeat(arguments, prices, on_cluster=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show all runs: progress, rate, last checkpoint, failures and cost, from their folders and, "
        "with --address (or RAY_ADDRESS), from a cluster."
    )
    parser.add_argument("folders", nargs="*", help="folder trees, local or s3://; default: DEFI_HOME")
    parser.add_argument(
        "--address", help="of a Ray cluster, such as auto: its nodes, jobs and runs are shown too"
    )
    parser.add_argument("--prices", metavar="FILE", help="values with prices of nodes, of cluster/values/")
    parser.add_argument("--depth", type=int, default=DEPTH, help="levels of folders to search (%(default)s)")
    parser.add_argument("--every", type=float, metavar="SECONDS", help="show it again and again until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one JSON object per run and line")
    return parser


def _repeat(arguments: argparse.Namespace, prices: Prices | None, on_cluster: bool) -> int:
    while True:
        print(_report(arguments, prices, on_cluster), flush=True)
        if arguments.every is None:
            return 0
        time.sleep(arguments.every)


def _report(arguments: argparse.Namespace, prices: Prices | None, on_cluster: bool) -> str:
    roots = list(arguments.folders)
    lines: list[str] = []
    if on_cluster:
        # Imported here: Serve takes seconds, which a look into folders need not.
        from defi_platform.status.cluster_view import cluster_lines

        roots += [run for run in registered_runs() if run not in roots]
        lines += cluster_lines()
    if not arguments.folders and not roots:
        roots = [data_home()]
    found = find_runs(outermost(roots), depth=arguments.depth)
    if arguments.json:
        return "\n".join(json.dumps(plain(run, prices)) for run in found.runs)
    lines.append(table(found.runs, prices) if found.runs else f"no runs in {', '.join(roots)}")
    lines += _skipped(found)
    return "\n".join(lines)


def outermost(folders: Sequence[str]) -> list[str]:
    """Folders without those that lie inside others of them."""
    return [
        folder
        for folder in dict.fromkeys(folders)
        if not any(other != folder and folder.startswith(f"{other.rstrip('/')}/") for other in folders)
    ]


def _skipped(found: Found) -> list[str]:
    more = len(found.skipped) - MAX_SKIPPED
    lines = [f"not searched: {line}" for line in found.skipped[:MAX_SKIPPED]]
    return [*lines, f"and {more:,} more folders not searched"] if more > 0 else lines
