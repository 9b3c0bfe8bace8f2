"""Batch scripts of Slurm: Ray on the allocated nodes, one job on it, queued again until it is complete."""

from __future__ import annotations

import json
import shlex

from defi_platform.errors import MEND
from rendering.shell import exports
from rendering.values import ClusterValues, JobValues, NodeValues
from rendering.work import GIB, command, node_labels

WARNING_S = 300
"""Seconds before the time limit at which the job is asked to stop at a checkpoint."""

_SCRIPT = """\
#!/usr/bin/env bash
{options}
# Submit with: sbatch {file}
# The job is queued again when a node or its time limit ends it, and goes on at its last checkpoint. Exit code {mend}
# says that somebody has to change something first.
set -euo pipefail
{setup}
{exports}
# One token for all jobs, in the home folder that the nodes share.
ray get-auth-token --generate >/dev/null
ulimit -n "$(ulimit -Hn)"
# Ray keeps sockets below its folder, whose path has to be short.
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID

head=$(scontrol show hostnames "${{{nodelist}}}" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 {{ print $1 }}')
export RAY_ADDRESS=$address:6379

again() {{
  if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {retries} ]; then
    echo "not queued again: {retries} restarts are used up" >&2
    return 1
  fi
  scontrol requeue "$SLURM_JOB_ID"
}}

# The time limit is near: the job writes a checkpoint and ends, and the next start goes on from there.
job="" ending=""
trap 'ending=yes; [ -z "$job" ] || kill -TERM "$job"' USR1

{starts}
nodes={nodes}
for try in $(seq 120); do
  up=$(python -c {count} 2>/dev/null || echo 0)
  [ "$up" -lt "$nodes" ] || break
  if [ "$try" = 120 ]; then
    echo "$up of $nodes nodes have joined the Ray cluster of $head" >&2
    again
    exit
  fi
  sleep 5
done

{command} &
job=$!
code=0
wait "$job" || code=$?
if [ -n "$ending" ]; then
  # The first wait was ended by the signal, not by the job.
  code=0
  wait "$job" || code=$?
fi
case $code in
  0) [ -z "$ending" ] || again ;;
  {mend}) exit {mend} ;;
  *) again || exit "$code" ;;
esac
"""

_COUNT = """\
import ray
ray.init(log_to_driver=False, logging_level="error")
print(sum(node["Alive"] for node in ray.nodes()))"""

# Slurm from 22.05 on does not give `srun` the --cpus-per-task of the batch script.
_HEAD = """\
{labels}srun {group}--nodes=1 --ntasks=1 --cpus-per-task={cpus} --nodelist="$head" \\
  ray start --head --node-ip-address="$address" --port=6379 --dashboard-host=127.0.0.1 \\
  {resources} --block &
# shellcheck disable=SC2016
timeout 300 bash -c 'until ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 2; done'"""

_NODES = """\
{labels}srun {group}--nodes={count} --ntasks={count} --ntasks-per-node=1 --cpus-per-task={cpus} {exclude}\\
  ray start --address="$RAY_ADDRESS" {resources} --block &"""


def render(values: ClusterValues) -> dict[str, str]:
    """File name -> shell script."""
    return {f"slurm-{name}.sh": _script(values, name, job) for name, job in values.jobs.items()}


def _script(values: ClusterValues, name: str, job: JobValues) -> str:
    slurm = values.slurm
    parts = {kind: (values.nodes[kind], count) for kind, count in slurm.nodes.items() if count}
    several = len(parts) > 1
    options = "\n#SBATCH hetjob\n".join(
        _options(values, name, kind, node, count, first=number == 0)
        for number, (kind, (node, count)) in enumerate(parts.items())
    )
    return _SCRIPT.format(
        options=options,
        file=f"slurm-{name}.sh",
        setup="\n".join(slurm.setup),
        exports=exports(values),
        nodelist="SLURM_JOB_NODELIST" + ("_HET_GROUP_0" if several else ""),
        retries=job.retries,
        mend=MEND,
        starts=_starts(list(parts.values())),
        nodes=sum(slurm.nodes.values()),
        count=shlex.quote(_COUNT),
        command=shlex.join(command(job)),
    )


def _options(
    values: ClusterValues, name: str, kind: str, node: NodeValues, count: int, *, first: bool
) -> str:
    slurm = values.slurm
    found = {
        "nodes": count,
        "ntasks-per-node": 1,
        "cpus-per-task": node.cpus,
        "mem": f"{node.memory_gib}G",
        "partition": slurm.partitions.get(kind),
    }
    if node.gpus:
        found[slurm.gpus_per_node] = f"gpu:{node.gpus}" if slurm.gpus_per_node == "gres" else node.gpus
    if first:
        minutes = round(slurm.hours * 60)
        whole = {
            "job-name": f"{values.name}-{name}",
            "account": slurm.account,
            "time": f"{minutes // 60}:{minutes % 60:02}:00",
            "signal": f"B:USR1@{WARNING_S}",
            "output": "slurm-%x-%j.log",
            "open-mode": "append",
        }
        found = {**whole, **found}
    lines = [f"#SBATCH --{option}={value}" for option, value in found.items() if value is not None]
    return "\n".join([*lines, "#SBATCH --requeue", "#SBATCH --exclusive"])


def _starts(parts: list[tuple[NodeValues, int]]) -> str:
    # Roles mean something only where both kinds of node are there.
    roles = len({node.role for node, _ in parts}) > 1
    lines = []
    for number, (node, count) in enumerate(parts):
        group = f"--het-group={number} " if len(parts) > 1 else ""
        labels = f"RAY_OVERRIDE_LABELS={shlex.quote(json.dumps(node_labels(node)))} " if roles else ""
        store = round(node.memory_gib * node.object_store * GIB)
        resources = f"--num-cpus={node.cpus} --num-gpus={node.gpus} --object-store-memory={store}"
        if number == 0:
            lines.append(_HEAD.format(group=group, labels=labels, cpus=node.cpus, resources=resources))
            count -= 1
        if count:
            exclude = '--exclude="$head" ' if number == 0 else ""
            lines.append(
                _NODES.format(
                    group=group,
                    labels=labels,
                    cpus=node.cpus,
                    resources=resources,
                    count=count,
                    exclude=exclude,
                )
            )
    return "\n".join(lines)
