"""Records the scripted experts of a benchmark as LeRobot v3.0 datasets: the corpus that anyone can make.

Two datasets come of it: `video/` holds every episode's frames and instruction, `labelled/` the first few of
each task with actions and proprioception. Both follow from the configuration alone: attempt i of a task
starts from seed + i, what fails is dropped, and a task's episodes are its first successes in seed order.
Only the compression of pictures is not the same bit for bit each time: x264's lookahead is not.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from defi_client.recording.h264 import encode_h264
from defi_client.recording.lerobot import Camera, Episode, LeRobotWriter, Vector, frame_stats
from defi_platform import roles, storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import RecordConfig
from defi_platform.config.loader import to_mapping
from defi_platform.errors import ConfigError, SimulatorError, SimulatorFault
from defi_platform.evaluate.asked import check_initial_states, check_limits
from defi_platform.evaluate.attempts import Attempt, Attempts, packed_episode
from defi_platform.evaluate.benchmarks.interface import LAST, Benchmark, Task, View
from defi_platform.evaluate.benchmarks.registry import (
    benchmark_class,
    selected_options,
    selected_tasks,
    selected_view,
)
from defi_platform.evaluate.fleet.actor_pool import ActorPool
from defi_platform.evaluate.resume_guard import ensure_same_settings
from defi_platform.evaluate.simulation.interpreter import check_installed, interpreter
from defi_platform.evaluate.simulation.process import SimulatorProcess
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress
from defi_platform.storage.writable import check_writable

SUMMARY = "recording.json"
_ATTEMPTS = ".attempts"


@dataclass(frozen=True)
class RecordSummary:
    """The result of a recording."""

    output: str
    tasks: list[str]
    episodes: int
    labelled_episodes: int
    frames: int
    failures: dict[str, int]
    """Attempts per task that did not succeed within max_steps and were replaced by the next seed."""
    wall_s: float
    """Of the run that finished it."""
    reused: bool = False
    """The recording was there already, finished."""

    def summary(self) -> str:
        """One line for the terminal."""
        failed = sum(self.failures.values())
        state = "already recorded" if self.reused else f"recorded in {self.wall_s:.0f} s"
        return (
            f"{self.output}: {self.episodes} episodes of {len(self.tasks)} tasks ({self.frames} frames), "
            f"{self.labelled_episodes} with actions; {failed} failed attempts replaced; {state}"
        )


@dataclass(frozen=True)
class _Plan:
    """A config looked up: the benchmark, its options, every task and the view."""

    benchmark: type[Benchmark]
    options: dict[str, Any]
    tasks: tuple[Task, ...]
    view: View

    @property
    def fps(self) -> int:
        return round(self.benchmark.control_hz)

    @property
    def cameras(self) -> list[Camera]:
        return [Camera(name, *self.view.size(name)) for name in self.view.cameras]

    @property
    def vectors(self) -> list[Vector]:
        return [
            Vector("action", self.benchmark.action.names),
            Vector("observation.state", self.benchmark.state_names),
        ]


def record(config: RecordConfig) -> RecordSummary:
    """Records demonstrations, resumes an interrupted recording, or finds a finished one.

    Raises:
        ConfigError: the benchmark, a task, option or camera is unknown, a task has no expert, or the output holds another
            recording.
        SimulatorError: the simulator cannot run, or an expert keeps failing.
    """
    plan = _checked(config)
    start = time.monotonic()
    output = storage.absolute(config.output)
    settings = _settings(config, plan)
    finished = storage.join(output, SUMMARY)
    if storage.exists(finished):
        content = json.loads(storage.read_text(finished))
        ensure_same_settings(settings, content["settings"], "a recording", output)
        return RecordSummary(**content["summary"], reused=True)
    check_writable(config.output)
    check_installed(config)
    attempts = Attempts(storage.join(output, _ATTEMPTS), settings, output)
    with ray_session(config.ray):
        register_run(output)
        _fill(config, plan, attempts)
    summary = _publish(config, plan, attempts, start)
    content = {"settings": settings, "summary": {k: v for k, v in vars(summary).items() if k != "reused"}}
    storage.write_text(finished, json.dumps(content, indent=2))
    attempts.delete()
    return summary


# --------------------------------------------------------------------------- recording


class _Recorder:
    """Runs the expert, one episode per call, in a simulator's process of its own."""

    def __init__(self, config: RecordConfig, plan: _Plan):
        self._config = config
        self._plan = plan
        self._process: SimulatorProcess | None = None

    def ready(self) -> None:
        """Returns once the process is up."""

    def work(self, attempt: Attempt) -> bytes:
        """Runs one episode, again where its simulator fails.

        Returns:
            The packed episode; one without frames when the expert failed.

        Raises:
            SimulatorError: the simulator cannot run here, or failed too often.
        """
        failures: list[SimulatorFault] = []
        while len(failures) <= self._config.simulator.retries:
            try:
                simulator = self._simulator()
                episode = _run_expert(simulator, attempt, self._config, self._plan)
                return packed_episode(episode, simulator.initial_positions)
            except SimulatorFault as fault:
                self._process = None
                failures.append(fault)
        last = failures[-1]
        raise SimulatorError(
            f"{attempt}: the simulator failed {len(failures)} times, the last: {last.kind}: {last.message}."
        )

    def _simulator(self) -> SimulatorProcess:
        if self._process is None:
            config, plan = self._config, self._plan
            python = interpreter(config.benchmark, config.simulator, config.output)
            self._process = SimulatorProcess(
                config.benchmark, plan.view, plan.options, python, config.simulator
            )
        return self._process


def _run_expert(simulator: SimulatorProcess, attempt: Attempt, config: RecordConfig, plan: _Plan) -> Episode:
    """One episode, ended `hold_steps` after the first success; at its horizon where the last state decides.

    With noise, the noisy action is executed but the expert's clean one is the label: the states then
    stray from the expert's path and the labels lead back to it, which is what a cloned policy needs.
    """
    chain, state = simulator.reset(attempt.task, attempt.seed)
    if len(chain) != 1:
        raise SimulatorError(f"{attempt}: it has {len(chain)} subtasks; only tasks of one can be recorded.")
    most = config.max_steps or chain[0].horizon
    random = np.random.default_rng([attempt.seed, *attempt.task.encode()])
    shape = (most + config.hold_steps, plan.benchmark.action.dim)
    noise = random.normal(0.0, config.noise, shape) if config.noise else None
    simulator.begin(0)
    through = chain[0].decided == LAST
    parts = [simulator.expert(most, noise=noise, frame_every=1, through=through)]
    if parts[0].steps[-1].instruction is not None:
        raise SimulatorError(
            f"{attempt}: its instruction changes on the way; only episodes of one can be recorded."
        )
    done = len(parts[0].steps)
    if not parts[0].steps[-1].success:
        return Episode(chain[0].instruction, {}, {}, length=0)
    if config.hold_steps and not through and not parts[0].steps[-1].done:
        held = None if noise is None else noise[done:]
        parts.append(simulator.expert(config.hold_steps, noise=held, frame_every=1, through=True))
    frames = [frame for part in parts for frame in part.frames]
    states = [state, *(step.state for part in parts for step in part.steps)][:-1]
    by_camera = {camera: [frame[camera] for frame in frames] for camera in plan.view.cameras}
    return Episode(
        text=chain[0].instruction,
        videos={camera: encode_h264(pictures, plan.fps) for camera, pictures in by_camera.items()},
        video_stats={camera: frame_stats(np.stack(pictures)) for camera, pictures in by_camera.items()},
        length=len(frames),
        vectors={
            "action": np.concatenate([part.proposed for part in parts]),
            "observation.state": np.stack(states),
        },
    )


def _fill(config: RecordConfig, plan: _Plan, attempts: Attempts) -> None:
    """Runs attempts until every task has its episodes."""
    recorder: Any = ray.remote(num_cpus=1, **roles.options(roles.DECODE))(_Recorder)
    pool: ActorPool[Attempt] = ActorPool(lambda: recorder.remote(config, plan), config.workers)
    wanted, names = config.episodes_per_task, [task.name for task in plan.tasks]
    for task in names:
        for offset in range(wanted + len(attempts.failed(task))):
            if not attempts.done(Attempt(task, config.seed + offset)):
                pool.submit(_existing(Attempt(task, config.seed + offset), config, plan, attempts))
    present = sum(len(attempts.succeeded(task)) for task in names)
    failed = sum(len(attempts.failed(task)) for task in names)
    with Progress("record", "episodes", wanted * len(names), initial=present) as progress:
        progress.step(0, f"{failed} failed")
        for attempt, packed in pool.results():
            kept = attempts.add(attempt, packed)
            outcome = "kept" if kept else "failed"
            catalogue.EVALUATE_RECORDED.add(run=config.output, outcome=outcome)
            if kept:
                progress.step()
                continue
            failed += 1
            progress.step(0, f"{failed} failed")
            failures = len(attempts.failed(attempt.task))
            if failures > max(5, 2 * wanted):
                raise SimulatorError(f"{_tally(attempt.task, attempts)}; {_remedy(config)}.")
            # A task's attempts are numbered without gaps: M successes and F failures are seeds 0 to M+F-1.
            following = Attempt(attempt.task, config.seed + wanted + failures - 1)
            pool.submit(_existing(following, config, plan, attempts))


def _existing(attempt: Attempt, config: RecordConfig, plan: _Plan, attempts: Attempts) -> Attempt:
    """The attempt, where the benchmark has that initial state."""
    most = plan.benchmark.initial_states(attempt.task, plan.options)
    if most is not None and attempt.seed >= most:
        raise SimulatorError(
            f"{_tally(attempt.task, attempts)}, and the {most} initial states of "
            f"{config.benchmark} are used up; ask for fewer episodes_per_task, or {_remedy(config)}."
        )
    return attempt


def _tally(task: str, attempts: Attempts) -> str:
    failures, solved = len(attempts.failed(task)), len(attempts.succeeded(task))
    return f"{task}: the expert failed {failures} of {failures + solved} episodes"


def _remedy(config: RecordConfig) -> str:
    limit = "the task's horizon" if config.max_steps is None else config.max_steps
    return f"raise max_steps ({limit}), lower noise ({config.noise}) or drop the task"


def _publish(config: RecordConfig, plan: _Plan, attempts: Attempts, start: float) -> RecordSummary:
    """Writes both datasets, each appearing whole."""
    output, robot = storage.absolute(config.output), plan.benchmark.robot or plan.benchmark.name
    frames = labelled = 0
    for name, vectors in (("video", []), ("labelled", plan.vectors)):
        per_task = config.episodes_per_task if name == "video" else config.labelled_per_task
        if per_task == 0:
            continue
        with storage.committed_folder(storage.join(output, name)) as folder:
            writer = LeRobotWriter(folder, plan.fps, plan.cameras, vectors, robot)
            sources = []
            for task in plan.tasks:
                for seed in attempts.succeeded(task.name)[:per_task]:
                    attempt = Attempt(task.name, seed)
                    episode = attempts.episode(attempt)
                    writer.add(episode)
                    sources.append(
                        {
                            "task": task.name,
                            "seed": seed,
                            "length": episode.length,
                            "initial_positions": attempts.positions(attempt),
                        }
                    )
                    frames += episode.length if name == "video" else 0
                    labelled += name == "labelled"
            writer.finish()
            # Next to LeRobot's own files: the settings that reproduce this dataset.
            details = {"fps": plan.fps, **attempts.settings}
            (folder / "meta" / SUMMARY).write_text(json.dumps({**details, "episodes": sources}, indent=1))
    return RecordSummary(
        output=output,
        tasks=[task.name for task in plan.tasks],
        episodes=config.episodes_per_task * len(plan.tasks),
        labelled_episodes=labelled,
        frames=frames,
        failures={task.name: len(attempts.failed(task.name)) for task in plan.tasks},
        wall_s=round(time.monotonic() - start, 1),
    )


# --------------------------------------------------------------------------- checks


def _settings(config: RecordConfig, plan: _Plan) -> dict[str, Any]:
    """The settings that decide the content: all but the resources and the output."""
    resources = ("ray", "simulator", "workers", "output", "cameras", "height", "width")
    return {
        **{key: value for key, value in to_mapping(config).items() if key not in resources},
        "options": plan.options,
        "tasks": [task.name for task in plan.tasks],
        "view": {camera: list(plan.view.size(camera)) for camera in plan.view.cameras},
    }


def _checked(config: RecordConfig) -> _Plan:
    benchmark = benchmark_class(config.benchmark)
    options = selected_options(benchmark, config.options)
    tasks = selected_tasks(benchmark, options, config.tasks)
    view = selected_view(benchmark, config.cameras, (config.height, config.width), videos=True)
    if without := [task.name for task in tasks if not benchmark.expert_can(task.name)]:
        raise ConfigError(
            f"tasks: {config.benchmark} has no expert for {', '.join(without[:5])}"
            f"{' and others' if len(without) > 5 else ''}, which can therefore not be recorded; leave "
            f"{'them' if len(without) > 1 else 'it'} out."
        )
    least = {"episodes_per_task": 1, "labelled_per_task": 0, "hold_steps": 0, "seed": 0, "workers": 1}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be {value} or more.")
    if config.max_steps is not None and config.max_steps < 1:
        raise ConfigError(f"max_steps is {config.max_steps}; it must be 1 or more.")
    if config.labelled_per_task > config.episodes_per_task:
        raise ConfigError(
            f"labelled_per_task ({config.labelled_per_task}) is more than episodes_per_task "
            f"({config.episodes_per_task}); lower the one or raise the other."
        )
    check_limits(config.simulator)
    if not 0 <= config.noise < math.inf:
        raise ConfigError(f"noise is {config.noise}; it is a standard deviation, 0 or more.")
    known = {task.name: benchmark.initial_states(task.name, options) for task in tasks}
    check_initial_states(config, config.seed, known)
    return _Plan(benchmark, options, tasks, view)
