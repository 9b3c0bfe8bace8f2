"""Initial states that a policy has learned from: an evaluation on them measures memory.

What is known is on disk: a policy folder lies in its run's folder, whose config names the corpora and the models that it
began with, whose runs have corpora of their own; and a corpus that jobs/record_demos.py made lists its episodes. A policy by url, or one that was moved, says nothing of it.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from defi_platform import logs, storage
from defi_platform.errors import ConfigError, UserError, one_line
from defi_platform.evaluate.benchmarks.interface import Benchmark
from defi_platform.evaluate.policy.training_run import part_of, run_folder, training_config

RECORDING = "recording.json"


def recorded_states(policy: str, benchmark: str) -> dict[str, dict[int, dict[str, float]]]:
    """Initial states of a benchmark in the corpora of a policy's training and pretrainings, as far as folders tell.

    What cannot be read is named in a warning: a policy may be evaluated where the corpora of its training are not.

    Args:
        policy: its folder.
        benchmark: name.

    Returns: task -> seed -> positions of objects and goals; {} where the recording noted none.
    """
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for task, seed, positions in _recorded_episodes(policy, benchmark):
        found[task][seed] = found[task].get(seed) or positions
    return dict(found)


def seen_seeds(
    policy: str,
    known: Mapping[str, Mapping[int, Any]],
    benchmark: type[Benchmark],
    options: Mapping[str, Any],
    seeds: Mapping[str, range],
) -> dict[str, list[int]]:
    """Initial states of an evaluation that were recorded for the policy's training, by task; tasks without are left out.

    Where the number of initial states is unbounded, others can be had, and such an evaluation is refused. Where it is
    fixed, there may be no others: the results are to name them.

    Args:
        policy: its folder, for the message.
        known: its `recorded_states`.
        benchmark: of the evaluation.
        options: of the benchmark.
        seeds: of the evaluation, by task.

    Raises:
        ConfigError: there are such, and seeds are unbounded; names another first seed.
    """
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


def _recorded_episodes(policy: str, benchmark: str) -> list[tuple[str, int, dict[str, float]]]:
    """(task, seed, positions) of a benchmark's episodes in the corpora of a policy's run and of those it began with."""
    models, done, found = [policy], set(), list[tuple[str, int, dict[str, float]]]()
    while models:
        model = models.pop()
        if run_folder(model) in done:
            continue
        done.add(run_folder(model))
        with _unknown_where_unreadable(f"the run of {model}"):
            config = training_config(model)
            begun = [config.get("gfdm"), config.get("gidm"), part_of(config, "model").get("init_from")]
            models += [name for name in begun if isinstance(name, str) and name]
            for corpus in part_of(config.get("data"), "corpora").values():
                path = corpus.get("path") if isinstance(corpus, dict) else None
                if path:
                    with _unknown_where_unreadable(path):
                        found += _of_corpus(path, benchmark)
    return found


def _of_corpus(path: str, benchmark: str) -> list[tuple[str, int, dict[str, float]]]:
    """(task, seed, positions) of the episodes of a corpus that `record_demos` has made."""
    described = storage.join(path, "meta", RECORDING)
    if not storage.exists(described):
        return []
    recording = json.loads(storage.read_text(described))
    if recording.get("benchmark") != benchmark:
        return []
    return [
        (str(episode["task"]), int(episode["seed"]), dict(episode.get("initial_positions") or {}))
        for episode in recording.get("episodes", ())
    ]


@contextlib.contextmanager
def _unknown_where_unreadable(what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logs.say(
            f"WARNING: {what} cannot be read ({one_line(error)}); whether the policy has learned from the initial states of "
            "this evaluation is known of its other corpora alone."
        )
