"""Render the files of a cluster, or those of its monitoring: write one of the kinds below first.

kuberay | ray-up | skypilot | slurm: from the values of --config. grafana | prometheus | table: from the metrics' catalogue.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]

from rendering import monitoring, ray_up, skypilot, slurm  # noqa: E402
from rendering.checks import check  # noqa: E402
from rendering.kubernetes import kuberay  # noqa: E402
from rendering.values import ClusterValues  # noqa: E402

from defi_platform.config.loader import parse_arguments  # noqa: E402
from defi_platform.errors import ConfigError, exit_code  # noqa: E402

RENDERERS: dict[str, Callable[[ClusterValues], dict[str, str]]] = {
    "kuberay": kuberay.render,
    "ray-up": ray_up.render,
    "skypilot": skypilot.render,
    "slurm": slurm.render,
}
MONITORING: dict[str, Callable[[], dict[str, str]]] = {
    "grafana": monitoring.grafana,
    "prometheus": monitoring.prometheus,
    "table": lambda: {"metrics.md": monitoring.table()},
}


@dataclass
class MonitoringValues:
    """Where the files of a cluster's monitoring go."""

    output: str | None = None
    """Folder to write into; null: standard output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Renders what the command line asks for.

    Args:
        argv: kind, --config FILE and key=value; None: those of the process.

    Returns: the exit code.
    Raises: ConfigError: a value that does not fit.
    """
    kind, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if kind in MONITORING:
        _write(MONITORING[kind](), parse_arguments(MonitoringValues, rest, description=__doc__).output)
        return 0
    if kind in ("-h", "--help"):
        rest = [kind]
    elif kind not in RENDERERS:
        kinds = ", ".join([*RENDERERS, *MONITORING])
        raise ConfigError(f"'{kind}' is nothing that is rendered; write one of {kinds} first.")
    values = parse_arguments(ClusterValues, rest, description=__doc__)
    check(values, kind)
    _write(RENDERERS[kind](values), values.output)
    return 0


def _write(files: dict[str, str], output: str | None) -> None:
    if output is None:
        print("\n".join(f"# {name}\n{text}" if len(files) > 1 else text for name, text in files.items()))
        return
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
            print(folder / name)
    except OSError as error:
        raise ConfigError(f"output={output}: {error}; name a folder that can be written to.") from error


if __name__ == "__main__":
    sys.exit(exit_code(main))
