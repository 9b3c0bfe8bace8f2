"""The run of an evaluation's missing episodes: workers, lost ones, progress, metrics."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import ray

from defi_platform import logs, roles
from defi_platform.config import EvaluateConfig
from defi_platform.errors import SimulatorError, SimulatorFault
from defi_platform.evaluate.episode import Outcome, Rollout
from defi_platform.evaluate.fleet.actor_pool import ActorPool
from defi_platform.evaluate.fleet.shared_units import SharedUnits
from defi_platform.evaluate.simulator import Simulator
from defi_platform.evaluate.statistics.intervals import wilson
from defi_platform.evaluate.store.episodes import EpisodeStore, Finished
from defi_platform.evaluate.store.steps import pack_steps
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress

MOST_LOST = 3
"""Units left out before any episode has finished; after so many the simulator cannot run here."""


class Fleet:
    """The run of one driver."""

    def __init__(self, config: EvaluateConfig, store: EpisodeStore, units: SharedUnits):
        """Prepares a run.

        Args:
            config: of the evaluation.
            store: that takes the episodes.
            units: of the evaluation, those that are finished included.
        """
        self._config, self._store, self._units = config, store, units
        self._solved = dict.fromkeys(config.arms, 0)
        self._done = dict.fromkeys(config.arms, 0)
        self._ran = 0
        self._lost = 0

    def run(
        self, url: str, greeting: Mapping[str, Any], missing: list[Rollout], finished: list[Rollout]
    ) -> None:
        """Runs what is missing, until it is there, left out or no longer needed.

        Args:
            url: of the policy server.
            greeting: of the policy's server.
            missing: units to run, in order.
            finished: units that are there already, for the progress.

        Raises:
            SimulatorError: the simulator cannot run.
            ServeError: the policy does not answer, or another one does.
        """
        worker: Any = ray.remote(num_cpus=1, **roles.options(roles.DECODE))(Simulator)
        self._say_if_crowded(len(missing))
        pool: ActorPool[Rollout] = ActorPool(
            lambda: worker.remote(self._config, url, dict(greeting), sys.path),
            self._config.workers,
            choice=self._units,
            on_fault=self._on_fault,
        )
        for unit in missing:
            pool.submit(unit)
        for unit in finished:
            self._tally(unit)
        with Progress(
            "evaluate", "episodes", len(missing) + len(finished), initial=len(finished)
        ) as progress:

            def found(unit: Rollout) -> None:
                self._tally(unit)
                progress.step(note=self.note())

            self._units.on_found = found
            results = pool.results()
            try:
                for unit, outcome in results:
                    self._ran += 1
                    self._keep(unit, outcome)
                    found(unit)
                    if self._units.is_enough():
                        break
            finally:
                results.close()

    def note(self) -> str:
        """Success so far with its interval, by policy under test."""
        return ", ".join(
            f"{arm} {self._solved[arm]}/{self._done[arm]} {wilson(self._solved[arm], self._done[arm])}"
            for arm in self._config.arms
            if self._done[arm]
        )

    def _keep(self, unit: Rollout, outcome: Outcome) -> None:
        row = dict(outcome.row)
        name = self._units.name(unit)
        row["simulator_errors"] = self._store.faults.get(name, [])
        steps = pack_steps(outcome.steps) if outcome.steps else b""
        self._store.add(Finished(row, steps, outcome.video, outcome.protocol))
        count(self._config.output, row)

    def _tally(self, unit: Rollout) -> None:
        row = self._units.row(unit)
        assert row is not None
        self._done[unit.arm] += 1
        self._solved[unit.arm] += row["success"]

    def _on_fault(self, unit: Rollout, fault: SimulatorFault) -> bool:
        """Counts a failed try. Returns: whether there is to be another one."""
        retries = self._config.simulator.retries
        place = {"kind": fault.kind, "message": fault.message, "place": fault.place}
        failed = self._store.add_fault(unit.arm, unit.task, unit.seed, place)
        catalogue.EVALUATE_SIMULATOR_ERRORS.add(run=self._config.output, kind=fault.kind)
        again = failed <= retries
        then = f"tried again ({failed} of {retries})" if again else f"left out after {failed} tries"
        logs.say(
            f"{unit.arm} {unit.task} seed {unit.seed}: simulator {fault}; {then}", run=self._config.output
        )
        if not again:
            self._lost += 1
            if not self._ran and self._lost >= MOST_LOST:
                raise SimulatorError(
                    f"no episode has finished and {self._lost} were left out after {failed} tries each, the last: {fault}."
                ) from fault
        return again

    def _say_if_crowded(self, missing: int) -> None:
        """Says how many workers have room beside what holds CPUs already, such as replicas of the policy."""
        asked, free = min(self._config.workers, missing), int(ray.available_resources().get("CPU", 0))
        if free < asked and roles.node_ids(roles.DECODE) is None:
            logs.say(
                f"{asked} simulator workers are asked for and {free} CPUs are free: the others wait until there is room"
            )


def count(run: str, row: dict[str, Any]) -> None:
    """Counts a finished episode in the metrics.

    Args:
        run: output of the evaluation.
        row: of the episode.
    """
    arm, outcome = row["arm"], "success" if row["success"] else "failure"
    catalogue.EVALUATE_EPISODES.add(run=run, arm=arm, outcome=outcome)
    catalogue.EVALUATE_STEPS.add(row["steps"], run=run, arm=arm)
    catalogue.EVALUATE_EPISODE_SECONDS.observe(row["wall_s"], run=run, arm=arm)
    for milliseconds in row["latency_ms"]:
        catalogue.EVALUATE_REQUEST_SECONDS.observe(milliseconds / 1000, run=run)
