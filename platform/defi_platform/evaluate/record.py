"""Records a simulator's scripted experts as LeRobot v3.0 datasets: the corpus that anyone can make.

Two datasets come of it: `video/` holds every episode's frames and instruction, `labelled/` the first few of
each task with actions and proprioception. Both follow from the configuration alone: attempt i of a task
starts from seed + i, what fails is dropped, and a task's episodes are its first successes in seed order.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from defi_client.recording.h264 import encode_h264
from defi_client.recording.lerobot import Camera, Episode, LeRobotWriter, Stats, Vector, frame_stats
from defi_platform import roles, storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import RecordConfig
from defi_platform.config.loader import to_mapping
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.metaworld.benchmark import MetaWorld
from defi_platform.evaluate.benchmarks.registry import selected_tasks, selected_view
from defi_platform.evaluate.fleet.actor_pool import ActorPool
from defi_platform.evaluate.resume_guard import bind_settings, ensure_same_settings
from defi_platform.evaluate.simulation.process import SimulatorProcess
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress

SUMMARY = "recording.json"
_ATTEMPTS = ".attempts"
_FPS = round(MetaWorld.control_hz)
_VECTORS = [Vector("action", MetaWorld.action.names), Vector("observation.state", MetaWorld.state_names)]


@dataclass(frozen=True)
class Attempt:
    """One try of the expert: the unit of work."""

    task: str
    seed: int


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


def record(config: RecordConfig) -> RecordSummary:
    """Records demonstrations, resumes an interrupted recording, or finds a finished one.

    Raises:
        ConfigError: a task or camera is unknown, or the output holds another recording.
        SimulatorError: Meta-World cannot run, or an expert keeps failing.
    """
    _check(config)
    start = time.monotonic()
    output = storage.absolute(config.output)
    settings = _settings(config)
    finished = storage.join(output, SUMMARY)
    if storage.exists(finished):
        content = json.loads(storage.read_text(finished))
        ensure_same_settings(settings, content["settings"], "a recording", output)
        return RecordSummary(**content["summary"], reused=True)
    attempts = _Attempts(storage.join(output, _ATTEMPTS), settings, output)
    with ray_session(config.ray):
        register_run(output)
        _fill(config, attempts)
    summary = _publish(config, attempts, output, start)
    content = {"settings": settings, "summary": {k: v for k, v in vars(summary).items() if k != "reused"}}
    storage.write_text(finished, json.dumps(content, indent=2))
    attempts.delete()
    return summary


# --------------------------------------------------------------------------- recording


class _Recorder:
    """Runs the expert, one episode per call, in a simulator's process of its own."""

    def __init__(self, config: RecordConfig):
        self._config = config
        self._process: SimulatorProcess | None = None

    def ready(self) -> None:
        """Returns once the process is up."""

    def work(self, attempt: Attempt) -> bytes:
        """Runs one episode.

        Returns:
            The packed episode; one without frames when the expert failed.
        """
        if self._process is None:
            self._process = SimulatorProcess(MetaWorld.name, _view(self._config), {})
        return _pack(_run_expert(self._process, attempt, self._config))


def _run_expert(simulator: SimulatorProcess, attempt: Attempt, config: RecordConfig) -> Episode:
    """One episode, ended `hold_steps` after the first success.

    With noise, the noisy action is executed but the expert's clean one is the label: the states then
    stray from the expert's path and the labels lead back to it, which is what a cloned policy needs.
    """
    most = config.max_steps + config.hold_steps
    random = np.random.default_rng([attempt.seed, *attempt.task.encode()])
    noise = random.normal(0.0, config.noise, (most, MetaWorld.action.dim)) if config.noise else None
    (task,), state = simulator.reset(attempt.task, attempt.seed)
    parts = [simulator.expert(config.max_steps, noise=noise, frame_every=1)]
    done = len(parts[0].steps)
    if not parts[0].steps[-1].success:
        return Episode(task.instruction, {}, {}, length=0)
    if config.hold_steps:
        held = None if noise is None else noise[done:]
        parts.append(simulator.expert(config.hold_steps, noise=held, frame_every=1, through=True))
    frames = [frame[config.camera] for part in parts for frame in part.frames]
    states = [state, *(step.state for part in parts for step in part.steps)][:-1]
    return Episode(
        text=task.instruction,
        videos={config.camera: encode_h264(frames, _FPS)},
        video_stats={config.camera: frame_stats(np.stack(frames))},
        length=len(frames),
        vectors={
            "action": np.concatenate([part.proposed for part in parts]),
            "observation.state": np.stack(states),
        },
    )


def _view(config: RecordConfig) -> View:
    return selected_view(MetaWorld, [config.camera], (config.height, config.width), videos=True)


def _fill(config: RecordConfig, attempts: _Attempts) -> None:
    """Runs attempts until every task has its episodes."""
    recorder: Any = ray.remote(num_cpus=1, **roles.options(roles.DECODE))(_Recorder)
    pool: ActorPool[Attempt] = ActorPool(lambda: recorder.remote(config), config.workers)
    wanted = config.episodes_per_task
    for task in config.tasks:
        for offset in range(wanted + len(attempts.failed(task))):
            if not attempts.done(Attempt(task, config.seed + offset)):
                pool.submit(Attempt(task, config.seed + offset))
    present = sum(len(attempts.succeeded(task)) for task in config.tasks)
    failed = sum(len(attempts.failed(task)) for task in config.tasks)
    with Progress("record", "episodes", wanted * len(config.tasks), initial=present) as progress:
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
                raise SimulatorError(
                    f"{attempt.task}: the expert failed {failures} of "
                    f"{failures + len(attempts.succeeded(attempt.task))} episodes; "
                    f"raise max_steps ({config.max_steps}), lower noise ({config.noise}) or drop the task."
                )
            # A task's attempts are numbered without gaps: M successes and F failures are seeds 0 to M+F-1.
            pool.submit(Attempt(attempt.task, config.seed + wanted + failures - 1))


def _publish(config: RecordConfig, attempts: _Attempts, output: str, start: float) -> RecordSummary:
    """Writes both datasets, each appearing whole."""
    cameras = [Camera(config.camera, config.height, config.width)]
    frames = labelled = 0
    for name, vectors in (("video", []), ("labelled", _VECTORS)):
        per_task = config.episodes_per_task if name == "video" else config.labelled_per_task
        if per_task == 0:
            continue
        with storage.committed_folder(storage.join(output, name)) as folder:
            writer = LeRobotWriter(folder, _FPS, cameras, vectors, MetaWorld.robot)
            sources = []
            for task in config.tasks:
                for seed in attempts.succeeded(task)[:per_task]:
                    episode = attempts.episode(Attempt(task, seed))
                    writer.add(episode)
                    sources.append({"task": task, "seed": seed, "length": episode.length})
                    frames += episode.length if name == "video" else 0
                    labelled += name == "labelled"
            writer.finish()
            # Next to LeRobot's own files: the settings that reproduce this dataset.
            details = {"benchmark": MetaWorld.name, "fps": _FPS, **attempts.settings}
            (folder / "meta" / SUMMARY).write_text(json.dumps({**details, "episodes": sources}, indent=1))
    return RecordSummary(
        output=output,
        tasks=list(config.tasks),
        episodes=config.episodes_per_task * len(config.tasks),
        labelled_episodes=labelled,
        frames=frames,
        failures={task: len(attempts.failed(task)) for task in config.tasks},
        wall_s=round(time.monotonic() - start, 1),
    )


# --------------------------------------------------------------------------- the store of attempts


class _Attempts:
    """The finished attempts of a recording, one file each, so that an interrupted one can be resumed."""

    def __init__(self, folder: str, settings: dict[str, Any], output: str):
        self.settings = settings
        self._folder = folder
        self._lengths: dict[str, dict[int, int]] = {task: {} for task in settings["tasks"]}
        bind_settings(folder, settings, "a recording", output)
        for name in storage.names(folder):
            if not name.endswith(".npz") or name.startswith("."):
                continue
            task, seed, length = name.removesuffix(".npz").split("_")
            self._lengths[task][int(seed)] = int(length)

    def done(self, attempt: Attempt) -> bool:
        return attempt.seed in self._lengths[attempt.task]

    def succeeded(self, task: str) -> list[int]:
        """Seeds, ascending."""
        return sorted(seed for seed, length in self._lengths[task].items() if length)

    def failed(self, task: str) -> list[int]:
        """Seeds, ascending."""
        return sorted(seed for seed, length in self._lengths[task].items() if not length)

    def add(self, attempt: Attempt, packed: bytes) -> bool:
        """Stores an attempt.

        Returns:
            Whether it succeeded.
        """
        length = _unpack(packed).length
        storage.write_bytes(self._path(attempt, length), packed)
        self._lengths[attempt.task][attempt.seed] = length
        return length > 0

    def episode(self, attempt: Attempt) -> Episode:
        return _unpack(storage.read_bytes(self._path(attempt, self._lengths[attempt.task][attempt.seed])))

    def delete(self) -> None:
        storage.delete(self._folder)

    def _path(self, attempt: Attempt, length: int) -> str:
        # The outcome is in the name, so that a resume needs a listing and no reading.
        return storage.join(self._folder, f"{attempt.task}_{attempt.seed}_{length}.npz")


def _pack(episode: Episode) -> bytes:
    arrays: dict[str, Any] = {"text": np.array(episode.text), "length": np.array(episode.length)}
    for camera, video in episode.videos.items():
        arrays[f"video/{camera}"] = np.frombuffer(video, np.uint8)
        for name, value in episode.video_stats[camera].items():
            arrays[f"stats/{camera}/{name}"] = value
    for key, values in episode.vectors.items():
        arrays[f"vector/{key}"] = values
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Episode:
    videos: dict[str, bytes] = {}
    stats: dict[str, Stats] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        for name in arrays.files:
            kind, _, rest = name.partition("/")
            if kind == "video":
                videos[rest] = arrays[name].tobytes()
            elif kind == "stats":
                camera, _, statistic = rest.partition("/")
                stats.setdefault(camera, {})[statistic] = arrays[name]
            elif kind == "vector":
                vectors[rest] = arrays[name]
        return Episode(str(arrays["text"]), videos, stats, int(arrays["length"]), vectors)


# --------------------------------------------------------------------------- checks


def _settings(config: RecordConfig) -> dict[str, Any]:
    """The settings that decide the content: all but the resources and the output."""
    return {k: v for k, v in to_mapping(config).items() if k not in ("ray", "workers", "output")}


def _check(config: RecordConfig) -> None:
    selected_tasks(MetaWorld, {}, config.tasks)
    _view(config)
    for name, least in (
        ("episodes_per_task", 1),
        ("labelled_per_task", 0),
        ("max_steps", 1),
        ("hold_steps", 0),
    ):
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be {least} or more.")
    if config.labelled_per_task > config.episodes_per_task:
        raise ConfigError(
            f"labelled_per_task ({config.labelled_per_task}) is more than episodes_per_task "
            f"({config.episodes_per_task}); lower the one or raise the other."
        )
    if config.noise < 0:
        raise ConfigError(f"noise is {config.noise}; it is a standard deviation, 0 or more.")
