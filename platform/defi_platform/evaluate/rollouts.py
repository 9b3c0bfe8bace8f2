"""Closed-loop evaluation: simulator workers against a served policy, a random one and the expert.

Every policy under test starts from the same seeded initial states. The policy is not in this process: workers send it
observations over the websocket protocol a robot would use. Finished episodes are kept in a store (`evaluate.store`), in which
an interrupted evaluation is resumed and to which several drivers may add at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from defi_platform import logs, storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import EvaluateConfig
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.asked import asked, blocks, checked, seeds, settings, stop_rule
from defi_platform.evaluate.benchmarks.registry import benchmark_class, selected_view
from defi_platform.evaluate.episode import Rollout
from defi_platform.evaluate.fleet.run import Fleet
from defi_platform.evaluate.fleet.shared_units import SharedUnits
from defi_platform.evaluate.fleet.stop_rule import stopped_line
from defi_platform.evaluate.policy.fit import check_answer, check_fits
from defi_platform.evaluate.policy.recorded_seeds import recorded_states, seen_line, seen_seeds
from defi_platform.evaluate.policy.state_distances import distance_line, state_distances
from defi_platform.evaluate.policy.vla_eval import connect_policy
from defi_platform.evaluate.results.evaluation import SUMMARY, is_whole, write_results
from defi_platform.evaluate.results.protocol import protocol_of
from defi_platform.evaluate.simulation.interpreter import check_installed
from defi_platform.evaluate.store.episodes import EpisodeStore
from defi_platform.evaluate.store.identity import PROTOCOL, differences, policy_identity, stored
from defi_platform.evaluate.store.whole_json import read_json
from defi_platform.evaluate.success_table import success_lines
from defi_platform.storage.leases import Leases
from defi_platform.storage.writable import check_writable


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation; `<output>/summary.json` holds the same."""

    output: str
    details: dict[str, Any]
    """arms {arm: {tasks {task: rate}, pooled rate}}, latency_ms, example_episodes, settings, left_out, stopped, wall_s."""
    reused: bool = False

    def summary(self) -> str:
        """A table of success rates with 95 % intervals, and what it lacks."""
        lines = success_lines(self.details["arms"])
        latency = self.details["latency_ms"]
        if latency["count"]:
            lines.append(
                f"latency of {latency['count']} requests: p50 {latency['p50']:.0f} ms, "
                f"p95 {latency['p95']:.0f} ms"
            )
        lines += [
            f"left out: {unit['arm']} {unit['task']} seed {unit['seed']}, whose simulator failed {unit['tries']} times, "
            f"the last {unit['kind']}: {unit['message']}"
            for unit in self.details["left_out"]
        ]
        if errors := self.details["simulator_errors"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in errors.items())
            lines.append(f"simulator errors, none of them a failure of a policy: {kinds}")
        if stopped := self.details["stopped"]:
            lines.append(stopped_line(stopped))
        if seen := self.details.get("seeds_of_training"):
            lines.append(seen_line(seen))
        if distances := self.details.get("distances_to_training"):
            lines.append(distance_line(distances))
        state = "evaluated before, reused" if self.reused else f"{self.details['wall_s']:.0f} s"
        return "\n".join([*lines, f"{self.output} ({state})"])


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Runs the rollouts that `config` asks for and that are not there yet; serves the policy if need be.

    Raises:
        ConfigError: a setting cannot be, the policy does not fit or cannot be identified, or the output holds another
            evaluation.
        CheckpointError: the policy folder is not complete.
        ServeError: the policy cannot be served or does not answer.
        SimulatorError: the simulator cannot run.
    """
    config = checked(config)
    start = time.monotonic()
    output = storage.absolute(config.output)
    if not storage.exists(storage.join(output, SUMMARY)):  # a finished one may lie where nobody may write
        check_writable(config.output)
    deciding = settings(config)
    # Refuses an output of other settings before the policy is looked at.
    store = EpisodeStore(output, deciding)
    greeting, identity = _identified(config)
    recorded = _recorded(config)
    seen = _seen(config, recorded)
    if identity is not None:
        store.set_policy(identity)
    if (finished := _finished(config, output, store, deciding, identity)) is not None:
        return finished
    store.refresh()
    leases = Leases(output)
    units = SharedUnits(
        store,
        leases,
        blocks(config),
        retries=config.simulator.retries,
        rule=stop_rule(config.stop_rule),
        workers=config.workers,
    )
    everything = [unit for block in blocks(config) for unit in block]
    missing = [unit for unit in everything if units.is_open(unit)]
    there = [unit for unit in everything if units.row(unit) is not None]
    if missing and not units.is_enough():
        check_installed(config)
        with leases, ray_session(config.ray):
            register_run(output)
            with _policy(config, missing, greeting) as (url, greeting):
                Fleet(config, store, units).run(url, greeting, missing, there)
    return _published(config, output, store, units, greeting, seen, recorded, time.monotonic() - start)


# --------------------------------------------------------------------------- the policy


def _identified(config: EvaluateConfig) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(greeting as far as it is known before serving, identity) of the policy; both empty without the arm "policy"."""
    if "policy" not in config.arms:
        return {}, None
    if config.url:
        client = connect_policy(config.url, config.token_file, reconnect_s=0)
        with client:
            greeting = client.metadata
            check_fits(config, greeting, config.url)
            identity = policy_identity(greeting, config.policy_name, config.url)
            check_answer(config, client)
        return greeting, identity
    # Imported here: an evaluation by url does not load the models.
    from defi_platform.serve.deployment.folder_greeting import folder_greeting

    folder = config.serve.policy
    greeting = folder_greeting(config.serve)
    check_fits(config, greeting, folder)
    return greeting, policy_identity(greeting, config.policy_name, folder)


@contextlib.contextmanager
def _policy(
    config: EvaluateConfig, missing: list[Rollout], greeting: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (url, greeting) of the policy: the one at config.url, or one served here for the time being.

    The url is empty when none of the missing episodes needs it.
    """
    if config.url or not any(unit.arm == "policy" for unit in missing):
        yield config.url or "", greeting
        return
    # Imported here: a worker that needs only the simulator does not load the models.
    from defi_platform.serve.deployment.server import deploy

    logs.say(f"serving {config.serve.policy}")
    with deploy(config.serve, guest=True) as server:
        check_fits(config, server.metadata, config.serve.policy)
        # A guest is served by what is there, which computes as its own job has said.
        if changed := list(
            differences(greeting["inference"], server.metadata.get("inference", {}), "serve.model.")
        ):
            raise ConfigError(
                f"the cluster's server computes the policy {config.serve.policy} in another way than is asked for "
                f"({'; '.join(changed)}). Set these to what is there, or leave out ray.address for a cluster of your own."
            )
        yield server.url, server.metadata


Recorded = dict[str, dict[int, dict[str, float]]]
"""See `recorded_states`."""


def _recorded(config: EvaluateConfig) -> Recorded:
    """Initial states that the policy to be served here was trained on; empty where nobody knows."""
    if config.url or "policy" not in config.arms:
        return {}
    return recorded_states(config.serve.policy, config.benchmark)


def _seen(config: EvaluateConfig, recorded: Recorded) -> dict[str, list[int]]:
    """Those of them, by task, that are to be evaluated on."""
    seen = seen_seeds(
        config.serve.policy,
        recorded,
        benchmark_class(config.benchmark),
        config.options,
        {task: seeds(config, task) for task in config.tasks},
    )
    if seen:
        logs.say(f"WARNING: {seen_line(seen)}.")
    return seen


def _distances(recorded: Recorded, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Distances of the policy's initial states to those of its training, by task; empty where nobody knows them."""
    tested: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if row["arm"] == "policy" and row.get("initial_positions"):
            positions = {one["name"]: one["value"] for one in row["initial_positions"]}
            tested.setdefault(row["task"], []).append(positions)
    return state_distances({task: list(states.values()) for task, states in recorded.items()}, tested)


# --------------------------------------------------------------------------- results


def _finished(
    config: EvaluateConfig,
    output: str,
    store: EpisodeStore,
    deciding: dict[str, Any],
    identity: dict[str, Any] | None,
) -> EvaluationResult | None:
    """The result that is there already, of the same settings, policy and units, whose files are all of it."""
    path = storage.join(output, SUMMARY)
    if not storage.exists(path):
        return None
    details = read_json(path)
    now = json.loads(json.dumps([asked(config), deciding, identity]))
    if [details.get("asked"), details.get("settings"), details.get("identity")] != now:
        return None
    if any(
        unit["tries"] <= config.simulator.retries
        or store.look_up(store.unit(unit["arm"], unit["task"], unit["seed"])) is not None
        for unit in details["left_out"]
    ):
        return None  # they are to be tried again, or another driver has since finished one
    return EvaluationResult(output, details, reused=True) if is_whole(output, details) else None


def _published(
    config: EvaluateConfig,
    output: str,
    store: EpisodeStore,
    units: SharedUnits,
    greeting: dict[str, Any],
    seen: dict[str, list[int]],
    recorded: Recorded,
    wall_s: float,
) -> EvaluationResult:
    benchmark, table = benchmark_class(config.benchmark), units.table()
    rows = [row for unit in table if (row := _row(config, store, units, unit)) is not None]
    if all(row["success"] is None for row in rows):
        raise SimulatorError(f"{output}: every episode was left out; its faults are in {output}/faults.")
    decision, rule = units.decision(), stop_rule(config.stop_rule)
    identity = policy_identity(greeting, config.policy_name, "") if greeting else None
    protocol = protocol_of(
        benchmark,
        options=config.options,
        view=selected_view(
            benchmark, config.cameras, (config.height, config.width), videos=config.video_every > 0
        ),
        tasks=config.tasks,
        max_steps=config.max_steps,
        execute_steps=_executed(config, store, rows),
        seeds={task: sorted({unit.seed for unit in table if unit.task == task}) for task in config.tasks},
        simulator=stored(output, PROTOCOL),
        policy={**(identity or {}), **({"name": config.policy_name} if config.policy_name else {})},
        rows=rows,
    )
    details = write_results(
        output,
        rows,
        ((row, store.steps(row)) for row in rows if row["success"] is not None),
        arms=config.arms,
        protocol=protocol,
        benchmark=benchmark,
        more={
            "policy": greeting,
            "identity": identity,
            "asked": asked(config),
            "settings": settings(config),
            "stopped": decision.as_mapping(rule) if decision and rule else None,
            "skipped": {},
            "seeds_of_training": seen,
            "distances_to_training": _distances(recorded, rows),
            "video_every": config.video_every,
            "wall_s": round(wall_s, 1),
        },
    )
    return EvaluationResult(output, details)


def _row(
    config: EvaluateConfig, store: EpisodeStore, units: SharedUnits, unit: Rollout
) -> dict[str, Any] | None:
    """The row of an episode with all its failed tries; without an outcome where it is left out, None where not run."""
    faults = store.faults.get(units.name(unit), [])
    if (row := units.row(unit)) is not None:
        return {**row, "simulator_errors": faults or row["simulator_errors"]}
    if not units.is_left_out(unit):
        return None
    lost = {"benchmark": config.benchmark, **vars(unit), "unit": units.name(unit)}
    return {**lost, "success": None, "simulator_errors": faults}


def _executed(config: EvaluateConfig, store: EpisodeStore, rows: list[dict[str, Any]]) -> int | None:
    """Actions of a chunk that were executed: as configured, or as the steps show; None where no chunk ended."""
    if config.execute_steps is not None:
        return config.execute_steps
    for row in rows:
        # What is left of the last chunk of a subtask is not executed, so only a chunk with a successor tells.
        if row["success"] is not None and len(row["latency_ms"]) > len(row["subtasks"]):
            steps = store.steps(row)
            if steps is None:
                continue
            sent = [
                (step, subtask)
                for step, subtask, digest in zip(
                    *(steps[name].to_pylist() for name in ("step", "subtask", "observation_sha256")),
                    strict=True,
                )
                if digest
            ]
            # The longest: a change of the instruction cuts a chunk short.
            pairs = itertools.pairwise(sent)
            return max((later - step for (step, a), (later, b) in pairs if a == b), default=None)
    return None
