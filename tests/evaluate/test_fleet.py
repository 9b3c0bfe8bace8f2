"""The fleet of an evaluation: whose unit is next, faults that are counted and survived, when it is enough."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_server import policy_server

from defi_platform.config import EvaluateConfig, ServeConfig, SimulatorConfig, StopRuleConfig
from defi_platform.errors import ConfigError, SimulatorError, SimulatorFault
from defi_platform.evaluate import asked, rollouts
from defi_platform.evaluate.asked import blocks, checked, stop_rule
from defi_platform.evaluate.episode import Rollout
from defi_platform.evaluate.fleet import run as fleet_run
from defi_platform.evaluate.fleet.run import Fleet
from defi_platform.evaluate.fleet.shared_units import REFRESH_S, SharedUnits
from defi_platform.evaluate.results.episodes import write_episodes
from defi_platform.evaluate.rollouts import evaluate
from defi_platform.evaluate.store.episodes import EpisodeStore, Finished
from defi_platform.storage.leases import Leases

REPOSITORY = Path(__file__).parents[2]
POLICY = {"name": "the test's"}
Values = dict[tuple[str, ...], float]


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float, /) -> None:
        self.now += seconds


class Driver:
    """One driver of an evaluation, without workers."""

    def __init__(self, config: EvaluateConfig):
        self.clock = Clock()
        self.store = EpisodeStore(config.output, {}, POLICY)
        self.store.refresh()
        self.leases = Leases(config.output, clock=self.clock)
        self.leases._beat()
        self.units = SharedUnits(
            self.store,
            self.leases,
            blocks(config),
            retries=config.simulator.retries,
            rule=stop_rule(config.stop_rule),
            workers=config.workers,
            clock=self.clock,
        )
        self.fleet = Fleet(config, self.store, self.units)
        self.queue = [unit for block in blocks(config) for unit in block]

    def take(self, last_task: str | None = None) -> Rollout | None:
        self.queue = self.units.remaining(self.queue)
        unit = self.units.take(self.queue, last_task, [])
        if unit is not None:
            self.queue.remove(unit)
        return unit

    def finish(self, unit: Rollout, success: bool = True) -> None:
        self.store.add(Finished({**vars(unit), "success": success}))


def small(output: Path, **changes: Any) -> EvaluateConfig:
    config = EvaluateConfig(
        serve=ServeConfig(policy="unused"),
        tasks=["open", "close"],
        arms=["policy"],
        episodes_per_task=3,
        seed=0,
        workers=2,
        output=str(output),
    )
    return replace(config, **changes)


def test_two_drivers_share_the_units_and_find_each_others_episodes(tmp_path: Path) -> None:
    one, two = Driver(small(tmp_path)), Driver(small(tmp_path))
    first, other = one.take(), two.take()
    assert first is not None and other is not None and first != other
    one.finish(first)
    found: list[Rollout] = []
    two.units.on_found = found.append
    assert two.take() not in (first, other, None), "the finished one is not known yet, but its lease is"
    two.clock.now += 2 * REFRESH_S
    two.queue = two.units.remaining(two.queue)
    assert found == [first]
    taken = {one.take() for _ in range(6)} | {two.take() for _ in range(6)}
    assert len(taken - {None}) == 3, "each of the other three once"


def test_a_unit_finished_between_two_looks_is_not_run_again(tmp_path: Path) -> None:
    with Leases(str(tmp_path)):
        one, two = Driver(small(tmp_path, tasks=["open"], episodes_per_task=1)), None
        two = Driver(small(tmp_path, tasks=["open"], episodes_per_task=1))
        unit = one.take()
        assert unit is not None
        one.finish(unit)
        Path(one.leases._driver(one.leases.owner)).unlink()  # it has ended
        assert two.take() is None and two.units.remaining([unit]) == []


def test_faults_are_counted_and_a_unit_is_left_out_after_its_retries_in_every_driver(
    tmp_path: Path, recorded_metrics: Values, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, simulator=SimulatorConfig(retries=2))
    one, two = Driver(config), Driver(config)
    unit = Rollout("policy", "open", 1)
    assert one.fleet._on_fault(unit, SimulatorFault("hang", "no progress in 60 s", "host-a"))
    assert one.fleet._on_fault(unit, SimulatorFault("worker", "the actor died"))
    assert not two.fleet._on_fault(unit, SimulatorFault("abort", "ended by SIGABRT"))
    assert (
        "policy open seed 1: simulator abort: ended by SIGABRT; left out after 3 tries"
        in capsys.readouterr().out
    )
    one.clock.now += 2 * REFRESH_S
    assert unit not in one.units.remaining(one.queue) and one.units.is_left_out(unit)
    assert {key[-1]: value for key, value in recorded_metrics.items()} == {"hang": 1, "worker": 1, "abort": 1}
    again = Driver(replace(config, simulator=SimulatorConfig(retries=5)))
    assert again.units.is_open(unit), "more retries are asked for"
    assert [fault["kind"] for fault in again.store.faults[again.units.name(unit)]] == [
        "hang",
        "worker",
        "abort",
    ]


def test_a_table_without_an_episode_that_was_finished_later_is_made_again(tmp_path: Path) -> None:
    config = checked(small(tmp_path, tasks=["drawer-close-v3"], arms=["random"]))
    deciding, output = asked.settings(config), str(tmp_path)
    store = EpisodeStore(output, deciding)
    unit = {"arm": "random", "task": "drawer-close-v3", "seed": 1}
    details = {
        "asked": asked.asked(config),
        "settings": deciding,
        "identity": None,
        "left_out": [{**unit, "tries": 4}],
    }
    details["episodes_sha256"] = write_episodes(output, [], {})
    (tmp_path / "summary.json").write_text(json.dumps(details))
    assert rollouts._finished(config, output, store, deciding, None) is not None
    more = replace(config, simulator=SimulatorConfig(retries=4))
    assert rollouts._finished(more, output, store, deciding, None) is None, "it is to be tried again"
    write_episodes(output, [], {"of": "another run"})
    assert rollouts._finished(config, output, store, deciding, None) is None, "two tables"
    write_episodes(output, [], {})
    store.add(Finished({**unit, "success": True}))
    other = EpisodeStore(output, deciding)
    assert rollouts._finished(config, output, other, deciding, None) is None, "another driver has finished it"


def test_a_simulator_that_never_finishes_an_episode_ends_the_run(
    tmp_path: Path, recorded_metrics: Values
) -> None:
    driver = Driver(small(tmp_path, simulator=SimulatorConfig(retries=0)))
    fault = SimulatorFault("render", "no EGL")
    for seed in range(fleet_run.MOST_LOST - 1):
        assert not driver.fleet._on_fault(Rollout("policy", "open", seed), fault)
    with pytest.raises(SimulatorError, match=r"no episode has finished and 3 were left out .*render: no EGL"):
        driver.fleet._on_fault(Rollout("policy", "close", 0), fault)


@pytest.mark.parametrize("order", [1, -1])
def test_a_stop_rule_ends_at_the_same_episode_in_whatever_order_they_finish(
    tmp_path: Path, order: int
) -> None:
    rule = StopRuleConfig(p0=0.5, p1=0.7)
    driver = Driver(small(tmp_path, episodes_per_task=50, stop_rule=rule))
    ran = 0
    while True:
        at_work = [unit for unit in (driver.take() for _ in range(2)) if unit is not None]
        if not at_work:
            break
        for unit in at_work[::order]:
            driver.finish(unit, success=unit.seed != 1)
            ran += 1
    decision = driver.units.decision()
    assert decision is not None and decision.found == "at least 0.7"
    # Log ratio: 0.336 for a success, -0.511 for a failure, and 2.996 to reach.
    assert (decision.successes, decision.episodes) == (12, 14)
    table = driver.units.table()
    assert [unit.seed for unit in table] == [seed for seed in range(7) for _ in range(2)]
    assert 14 <= ran <= 16, "hardly more than needed was run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stop_rule": StopRuleConfig(p0=0.7, p1=0.5)},
            r"p0 is 0.7 and stop_rule.p1 is 0.5.*0 < p0 < p1 < 1",
        ),
        ({"stop_rule": StopRuleConfig(p0=0.7)}, "set both"),
        ({"stop_rule": StopRuleConfig(p0=0.5, p1=0.7, alpha=0.5)}, "stop_rule.alpha is 0.5"),
        ({"stop_rule": StopRuleConfig(p0=0.5, p1=0.7), "arms": ["random"]}, "add policy"),
    ],
)
def test_a_stop_rule_that_cannot_be_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(small(tmp_path, **{"tasks": ["drawer-close-v3"], **changes}))


# --------------------------------------------------------------------------- with workers


def test_simulators_that_hang_abort_leak_or_lose_their_context_are_named_counted_and_survived(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = {"hang": "hang", "abort": "abort", "leak": "memory", "lost_context": "render"}
    config = small(
        tmp_path / "run",
        benchmark="faulty_benchmark:Faulty",
        tasks=["nothing", *faulty],
        arms=["expert"],
        episodes_per_task=1,
        simulator=SimulatorConfig(retries=1, step_timeout_s=5, memory_gb=0.25),
    )
    details = evaluate(config).details
    assert details["arms"]["expert"]["tasks"]["nothing"]["rate"] == 1.0
    assert details["arms"]["expert"]["pooled"]["episodes"] == 1, "no fault is a failure of the policy"
    assert {unit["task"]: (unit["kind"], unit["tries"]) for unit in details["left_out"]} == {
        task: (kind, 2) for task, kind in faulty.items()
    }
    assert details["simulator_errors"] == dict.fromkeys(sorted(faulty.values()), 2)
    again = evaluate(config)
    assert again.reused
    table = again.summary()
    assert "left out: expert hang seed 0, whose simulator failed 2 times, the last hang: " in table
    assert "no outcome, 1 left out" in table


@pytest.mark.slow
def test_the_benchmark_of_evaluations_in_small(tmp_path: Path, ray_cluster: None) -> None:
    """make bench-eval: one worker, two, a killed driver, two drivers: the same rows."""
    import ray

    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    import evaluation

    def turn(observation: dict[str, Any], connection: object) -> dict[str, Any]:
        # Depends on all of the observation, as a policy's answer does.
        random = np.random.default_rng(
            [observation["seed"], int(observation["observation/images/workspace"].sum())]
        )
        return {"actions": random.uniform(-1, 1, (8, 4)).astype(np.float32)}

    config = evaluation.EvaluationBenchmarkConfig(
        tasks=["coffee-button-v3", "button-press-v3"], seeds=2, max_steps=16, kills=1
    )
    with policy_server(turn, {"policy_digest": "ab"}) as server:
        address = ray.get_runtime_context().gcs_address
        passes = evaluation.measure(config, tmp_path, server.url, address)
    assert evaluation.report(passes) == 0
    assert [len(passed.rows) for passed in passes] == [4] * 4 and passes[2].lost == 1
    wrong = replace(passes[1], rows=[{**passes[1].rows[0], "steps_file": "another"}, *passes[1].rows[1:]])
    assert "differs in steps_file" in evaluation.differences(passes[0], wrong)[0]
    assert json.loads((tmp_path / "1_worker/summary.json").read_text())["identity"] == {"digest": "ab"}
