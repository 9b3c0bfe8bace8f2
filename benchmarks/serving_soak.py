"""Mixed load while replicas are killed, the listener is killed, the policy is replaced and replicas come and go.

    python benchmarks/serving_soak.py [minutes=10] [clients=24] [hz=2] [kill_every_s=60] [replicas=2]

openpi's client, our own, vla-eval's and plain HTTP ask a served nano policy for actions. Every answer is compared
with the actions that the policy named in it gives for this client's observation, computed here beforehand. Ends
with 1 and says why if an answer was another's or of a policy of no name, a socket ended without a word while
nothing was killed, a gap was over its goal, or a process grew by more than 10 %.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from load import soak_report
from load.soak_clients import Settings
from load.soak_report import Event, Report

from defi_models import presets
from defi_models.policy import DeFIPolicy
from defi_platform.cluster import ray_session
from defi_platform.config import RayConfig, ServeConfig
from defi_platform.config.loader import load_config
from defi_platform.serve.deployment.policy_digest import policy_digest
from defi_platform.serve.deployment.server import PolicyServer, deploy
from defi_platform.serve.listener.actor import listeners

HERE = Path(__file__).parent


@dataclass
class SoakConfig:
    """benchmarks/serving_soak.py."""

    minutes: float = 10.0
    clients: int = 24
    hz: float = 2.0
    """Observations per second of each client."""
    burst_hz: float = 12.0
    """While replicas are to be added."""
    kill_every_s: float = 60.0
    keep: str | None = None
    """File for a line for each observation (benchmarks/load/soak_clients.py); null: not kept."""
    replicas: int = 2
    """Of the first policy; its successor has 1 to this many."""


@dataclass(frozen=True)
class Policies:
    """Two policies, and what they answer."""

    folders: tuple[str, str]
    digests: tuple[str, str]
    observations: Path


def make_policies(folder: Path, clients: int) -> Policies:
    """Two nano policies of other weights, and the actions of both for each client's observation.

    Args:
        folder: for them.
        clients: each has its own observation.
    """
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (clients, 64, 64, 3), dtype=np.uint8)
    state = draw.normal(size=(clients, 4)).astype(np.float32)
    arrays: dict[str, Any] = {"images": images, "state": state}
    folders, digests = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        policy = DeFIPolicy(presets.policy("nano", cameras=["front"])).eval()
        folders.append(str(policy.save_pretrained(folder / f"policy{seed}")))
        digests.append(policy_digest(folders[-1]))
        arrays[f"actions/{digests[-1]}"] = np.stack(
            [actions_of(policy, images[n], state[n], f"open drawer {n % 3}", n) for n in range(clients)]
        )
    np.savez(folder / "observations.npz", **arrays)
    return Policies((folders[0], folders[1]), (digests[0], digests[1]), folder / "observations.npz")


def actions_of(
    policy: DeFIPolicy, image: np.ndarray, state: np.ndarray, prompt: str, seed: int
) -> np.ndarray:
    """The actions of one observation, alone in its batch, straight from the model: (chunk, A) float32.

    Args:
        policy: the model.
        image: (64, 64, 3) uint8, the policy's own size.
        state: (4,) float32.
        prompt: of the client.
        seed: of the noise.
    """
    batch = {
        "images": torch.from_numpy(image[None, None]),
        "text": [prompt],
        "proprio": torch.from_numpy(state[None]),
    }
    with torch.inference_mode():
        return policy.act(batch, generator=[torch.Generator().manual_seed(seed)])[0].float().numpy()


class Soak:
    """One run."""

    def __init__(self, config: SoakConfig, policies: Policies) -> None:
        self._config, self._policies = config, policies
        self._events: list[Event] = []
        self._memory: dict[str, list[tuple[float, float]]] = {}
        self._failed: list[str] = []
        self._over = threading.Event()
        self._server: PolicyServer

    def run(self) -> Report:
        """Serves, disturbs, and reads what the clients saw."""
        config, seconds = self._config, self._config.minutes * 60
        first, second = (self._serve_config(folder) for folder in self._policies.folders)
        first.replicas = config.replicas
        second.replicas = {"min": 1, "max": config.replicas}
        second.scaling.downscale_delay_s = 0.05 * seconds
        second.redeploy.finish_episodes_s = 0.05 * seconds
        with deploy(first) as self._server:
            settings = Settings(
                port=self._server.port,
                seconds=seconds,
                clients=config.clients,
                hz=config.hz,
                burst=(0.60 * seconds, 0.76 * seconds, config.burst_hz),
                observations=str(self._policies.observations),
            )
            with (
                self._watching_memory(),
                robots(settings, self._policies.observations.with_suffix(".json")) as output,
            ):
                self._disturb(second, seconds)
                written = output()
                lines = soak_report.parsed(written)
                if config.keep:
                    Path(config.keep).write_text("\n".join(written))
        soak_report.measure_gaps(lines, self._events)
        return Report(lines, self._events, self._memory, self._failed)

    def _serve_config(self, folder: str) -> ServeConfig:
        return ServeConfig(policy=folder, port=0, threads=1, replica_cpus=0.5)

    def _disturb(self, successor: ServeConfig, seconds: float) -> None:
        most = self._config.replicas
        schedule: list[tuple[float, str, float, Callable[[], object]]] = [
            (0.20, "the listener is killed", 3.0, kill_listener),
            (0.40, "another policy takes over", 1.0, lambda: self._server.redeploy(successor)),
            (0.60, f"a burst: 1 -> {most} replicas", 1.0, lambda: self._wait_for(most, 0.12 * seconds)),
            (0.78, f"calm: {most} -> 1 replicas", 1.0, lambda: self._wait_for(1, 0.16 * seconds)),
        ]
        for share in np.arange(self._config.kill_every_s / 2, seconds, self._config.kill_every_s) / seconds:
            if all(abs(share - each[0]) > 0.03 for each in schedule):  # a gap has one cause
                schedule.append((float(share), "a replica is killed", 3.0, self._kill_replica))
        begun = time.time()
        for share, what, goal_s, do in sorted(schedule, key=lambda each: each[0]):
            time.sleep(max(0.0, begun + share * seconds - time.time()))
            if "replica is killed" in what and len(self._replicas()) < 2:
                what, goal_s = f"{what}, the only one", 60.0
            event = Event(time.time(), what, time.time(), goal_s)
            self._events.append(event)
            do()
            event.done = time.time()
            print(f"{event.at - begun:.0f} s: {what}", flush=True)

    def _replicas(self) -> list[dict[str, Any]]:
        """Of the policy that new clients get; those that a replaced one still has are not counted."""
        ours = self._server.deployment.application
        every = [replica for state in self._server.states() for replica in state["replicas"]]
        return [replica for replica in every if replica["application"] == ours]

    def _kill_replica(self) -> None:
        alive = self._replicas()
        if alive:  # otherwise the one before has not been started again yet
            os.kill(alive[0]["pid"], signal.SIGKILL)

    def _wait_for(self, replicas: int, seconds: float) -> None:
        deadline = time.time() + seconds
        while len(self._replicas()) != replicas:
            if time.time() > deadline:
                self._failed.append(f"{replicas} replicas did not come about in {seconds:.0f} s")
                return
            time.sleep(0.5)

    @contextlib.contextmanager
    def _watching_memory(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch_memory, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch_memory(self) -> None:
        while not self._over.wait(5.0):
            states = self._server.states()
            processes = {f"listener {state['pid']}": state["pid"] for state in states}
            processes |= {f"replica {each['pid']}": each["pid"] for s in states for each in s["replicas"]}
            for name, pid in processes.items():
                with contextlib.suppress(OSError):  # it may just have been killed
                    megabytes = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20
                    self._memory.setdefault(name, []).append((time.time(), megabytes))


def kill_listener() -> None:
    """Kills the process of the listener; Ray starts another."""
    for listener in listeners():
        ray.kill(listener, no_restart=False)


@contextlib.contextmanager
def robots(settings: Settings, file: Path) -> Iterator[Callable[[], list[str]]]:
    """Starts the clients in a process of their own; the value waits for their end and gives what they wrote.

    Args:
        settings: of the clients.
        file: where the settings are left for them.
    """
    file.write_text(json.dumps(asdict(settings)))
    written = file.with_suffix(".lines")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]])}
    command = [sys.executable, str(HERE / "load" / "soak_clients.py"), str(file)]
    with written.open("w") as output:
        process = subprocess.Popen(command, stdout=output, env=environment)

    def finished() -> list[str]:
        process.wait(settings.seconds + 180)
        return written.read_text().splitlines()

    try:
        yield finished
    finally:
        process.kill()
        process.wait()


def main(argv: list[str] | None = None) -> int:
    """Runs the soak and prints its report; 1 where something was not as it must be."""
    config = load_config(SoakConfig, None, sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as scratch, ray_session(RayConfig()):
        report = Soak(config, make_policies(Path(scratch), config.clients)).run()
    print(report.text())
    return int(bool(report.faults()))


if __name__ == "__main__":
    sys.exit(main())
