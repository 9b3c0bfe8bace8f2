"""Task files of SkyPilot: one managed job each, on spot nodes where the values say so, started again when they are lost."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from defi_platform.errors import TRY_AGAIN
from rendering.shell import exports
from rendering.values import ClusterValues, JobValues
from rendering.work import command, without_empty

RESTARTS = 3
"""Times that a job is started again after a failure that is not known to be one of the machines."""

# uv is SkyPilot's own. The folder of the virtual environment does not go away between two starts on the same nodes.
_SETUP = """\
test -x ~/defi/bin/python || uv venv --seed --python 3.11 ~/defi
source ~/defi/bin/activate
uv pip install --constraint constraints.txt ".[sim]"
sudo bash cluster/system_libraries.sh
"""

# The template asks for an older click than the one that is pinned; the override lets it find all it needs.
_RUN = """\
set -eo pipefail
source ~/defi/bin/activate
{exports}
export UV_OVERRIDE=$HOME/sky_workdir/constraints.txt
~/sky_templates/ray/start_cluster
[ "$SKYPILOT_NODE_RANK" = 0 ] || exit 0
export RAY_ADDRESS=127.0.0.1:6379
exec {command}
"""


def render(values: ClusterValues) -> dict[str, str]:
    """File name -> YAML."""
    return {
        f"sky-{name}.yaml": yaml.dump(_task(values, name, job), Dumper=_Dumper, sort_keys=False, width=110)
        for name, job in values.jobs.items()
    }


def _task(values: ClusterValues, name: str, job: JobValues) -> dict[str, Any]:
    sky = values.skypilot
    assert sky.nodes is not None
    node = values.nodes[sky.nodes]
    resources = {
        "infra": sky.infra,
        "accelerators": f"{node.accelerator}:{node.gpus}" if node.gpus else None,
        "cpus": f"{node.cpus}+",
        "memory": f"{node.memory_gib}+",
        "use_spot": node.spot,
        "disk_size": node.disk_gib + 50,
        "job_recovery": {"max_restarts_on_errors": RESTARTS, "recover_on_exit_codes": [TRY_AGAIN]},
    }
    task = {
        "name": f"{values.name}-{name}",
        "resources": without_empty(resources),
        "num_nodes": sky.count,
        "workdir": ".",
        # Values come from the command line: sky jobs launch --secret RAY_AUTH_TOKEN ...
        "secrets": {"RAY_AUTH_TOKEN": None} | ({"WANDB_API_KEY": None} if values.secrets.wandb else {}),
        "setup": _SETUP,
        "run": _RUN.format(exports=exports(values), command=shlex.join(command(job))),
    }
    return task


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts of several lines as blocks, so that a person can read the script."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
