"""Scripted experts through the served path: a server that wraps a benchmark's script, evaluated as any policy.

    python benchmarks/experts_served.py metaworld --tasks MT50 --episodes 2

The server has a simulator of its own, which it keeps in step with that of the evaluation: the seed of a request names the
episode and the step. What is lost between a script and its score is lost on the way: pictures and states, the wire, chunks,
the preparation of actions. The served script must score what the script scores by itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "platform"), str(REPOSITORY)]

from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.sync.server import ServerConnection, serve  # noqa: E402

from defi_platform.config import EvaluateConfig, ServeConfig, SimulatorConfig  # noqa: E402
from defi_platform.evaluate.asked import checked  # noqa: E402
from defi_platform.evaluate.benchmarks.registry import (  # noqa: E402
    benchmark_class,
    selected_options,
    selected_view,
)
from defi_platform.evaluate.episode import Rollout, request_seed  # noqa: E402
from defi_platform.evaluate.simulation.interpreter import interpreter  # noqa: E402
from defi_platform.evaluate.simulation.process import SimulatorProcess  # noqa: E402
from defi_platform.evaluate.simulator import Simulator  # noqa: E402
from defi_platform.evaluate.statistics.intervals import wilson  # noqa: E402
from defi_platform.serve.protocols import openpi  # noqa: E402

CHUNK = 10


class ServedScript:
    """A server of openpi's protocol whose policy is a benchmark's script."""

    def __init__(self, config: EvaluateConfig, seeds: Sequence[int], horizon: int):
        benchmark = benchmark_class(config.benchmark)
        self._mirror = SimulatorProcess(
            config.benchmark,
            selected_view(benchmark, config.cameras, (config.height, config.width), videos=False),
            selected_options(benchmark, config.options),
            interpreter(config.benchmark, config.simulator, config.output),
            config.simulator,
        )
        self._meant = {
            request_seed(seed, task, step): (task, seed, step)
            for task in config.tasks
            for seed in seeds
            for step in range(0, horizon, CHUNK)
        }
        self._listener = serve(self._talk, "127.0.0.1", 0, compression=None)
        self.url = f"ws://127.0.0.1:{self._listener.socket.getsockname()[1]}"
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown()
        self._mirror.close()

    def _talk(self, socket: ServerConnection) -> None:
        socket.send(openpi.pack({"policy": "script"}))
        try:
            for message in socket:
                assert isinstance(message, bytes)
                task, seed, step = self._meant[openpi.unpack(message)["seed"]]
                if step == 0:
                    self._mirror.reset(task, seed)
                    self._mirror.begin(0)
                socket.send(openpi.pack({"actions": self._mirror.expert(CHUNK).proposed}))
        except ConnectionClosed:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", nargs="?", default="fetch")
    parser.add_argument("--tasks", default="all", help="tasks and splits, with commas between")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=20_000)
    parser.add_argument("--environments", help="folder of virtual environments")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = checked(
            EvaluateConfig(
                serve=ServeConfig(policy=""),
                benchmark=given.benchmark,
                tasks=given.tasks.split(","),
                arms=["policy", "expert"],
                episodes_per_task=given.episodes,
                seed=given.seed,
                video_every=0,
                execute_steps=CHUNK,
                simulator=SimulatorConfig(environments=given.environments),
                output=f"{folder}/run",
            )
        )
        seeds = range(given.seed, given.seed + given.episodes)
        benchmark = benchmark_class(config.benchmark)
        horizon = max(task.horizon for task in benchmark.tasks(dict(config.options)))
        server = ServedScript(config, seeds, horizon)
        worker = Simulator(config, server.url)
        total = dict.fromkeys(config.arms, 0)
        print(f"{given.benchmark}, {given.episodes} episodes a task, chunks of {CHUNK}")
        print(f"{'task':42}{'served':>8}{'script':>8}")
        for task in config.tasks:
            solved = dict.fromkeys(config.arms, 0)
            for seed in seeds:
                for arm in config.arms:
                    solved[arm] += worker.work(Rollout(arm, task, seed)).row["success"]
            print(f"{task:42}{solved['policy']:>8}{solved['expert']:>8}", flush=True)
            for arm in config.arms:
                total[arm] += solved[arm]
        server.close()
    count = len(config.tasks) * given.episodes
    rates = [wilson(total[arm], count) for arm in ("policy", "expert")]
    shown = [f"{100 * rate.rate:.1f} % ({100 * rate.low:.0f}-{100 * rate.high:.0f})" for rate in rates]
    print(f"all: served {shown[0]}, script {shown[1]} of {count}")


if __name__ == "__main__":
    main()
