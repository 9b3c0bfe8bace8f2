"""Initial states that a policy has learned from: an evaluation on them measures memory.

What is known is on disk: a policy folder lies in its run's folder, whose config names the corpora and the models that it
began with, whose runs have corpora of their own; and a corpus that jobs/record_demos.py made lists its episodes. A policy by url, or one that was moved, says nothing of it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from defi_platform import storage
from defi_platform.errors import ConfigError
from defi_platform.evaluate.benchmarks.interface import Benchmark
from defi_platform.evaluate.policy.training_run import part_of, run_folder, training_config

RECORDING = "recording.json"


def recorded_states(policy: str, benchmark: str) -> dict[str, dict[int, dict[str, float]]]:
    """Initial states of a benchmark in the corpora of a policy's training and pretrainings, as far as folders tell.

    Args:
        policy: its folder.
        benchmark: name.

    Returns: task -> seed -> positions of objects and goals; {} where the recording noted none.
    """
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for recording in _recordings(policy):
        if recording.get("benchmark") == benchmark:
            for episode in recording.get("episodes", ()):
                positions = episode.get("initial_positions") or {}
                found[str(episode["task"])].setdefault(int(episode["seed"]), positions)
    return dict(found)


def seen_seeds(
    policy: str, benchmark: type[Benchmark], name: str, options: Mapping[str, Any], seeds: Mapping[str, range]
) -> dict[str, list[int]]:
    """Initial states of an evaluation that were recorded for the policy's training, by task; tasks without are left out.

    Where the number of initial states is unbounded, others can be had, and such an evaluation is refused. Where it is
    fixed, there may be no others: the results are to name them.

    Args:
        policy: its folder.
        benchmark: its class.
        name: of the benchmark, as recordings have it.
        options: of the benchmark.
        seeds: of the evaluation, by task.

    Raises:
        ConfigError: there are such, and seeds are unbounded; names another first seed.
    """
    known = recorded_states(policy, name)
    seen = {task: sorted(known.get(task, {}).keys() & set(some)) for task, some in seeds.items()}
    seen = {task: found for task, found in seen.items() if found}
    if endless := [task for task in seen if benchmark.initial_states(task, options) is None]:
        worst = max(endless, key=lambda task: len(seen[task]))
        free = 1 + max(seed for task in seeds for seed in known.get(task, ()))
        raise ConfigError(
            f"the policy in {policy} was trained on recordings of {len(seen[worst])} of the {len(seeds[worst])} initial states "
            f"of {worst} (seeds from {seen[worst][0]}); they do not show what it can do elsewhere. Set seed={free} or more."
        )
    return seen


def seen_line(seen: Mapping[str, Sequence[int]]) -> str:
    """Warning about results on initial states that the policy was trained on."""
    worst = max(seen, key=lambda task: len(seen[task]))
    return (
        f"the policy was trained on recordings of {sum(map(len, seen.values()))} of these initial states, in "
        f"{len(seen)} tasks ({worst}: {len(seen[worst])}, seeds from {seen[worst][0]}): rates on them show memory too"
    )


def _recordings(policy: str) -> Iterator[dict[str, Any]]:
    """Recordings among the corpora of a policy's run and of the runs of the models it began with, as they describe themselves."""
    models, done = [policy], set()
    while models:
        model = models.pop()
        if run_folder(model) in done:
            continue
        done.add(run_folder(model))
        config = training_config(model)
        for corpus in part_of(config.get("data"), "corpora").values():
            path = corpus.get("path") if isinstance(corpus, dict) else None
            if path and storage.exists(storage.join(path, "meta", RECORDING)):
                yield json.loads(storage.read_text(storage.join(path, "meta", RECORDING)))
        begun = [config.get("gfdm"), config.get("gidm"), part_of(config, "model").get("init_from")]
        models += [name for name in begun if isinstance(name, str) and name]
