"""Cost of a simulator in a process of its own, against the same simulator in this process. Prints one table.

python benchmarks/simulator_process.py [steps]

CPU time of both processes together, in turns, so it holds on a busy machine too. Pictures are made once per chunk.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import psutil

from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.metaworld.benchmark import MetaWorld
from defi_platform.evaluate.simulation.process import SimulatorProcess

TASK, SEED = "reach-v3", 1
TURNS = 4
SETTINGS = {
    "1 action per call, no pictures": (1, None),
    "chunks of 8, no pictures": (8, None),
    "chunks of 8, 64 x 64": (8, View(("workspace",), 64, 64)),
    "chunks of 8, two cameras of 224 x 224": (8, View(("workspace", "gripperPOV"), 224, 224)),
}


def here(benchmark: MetaWorld, chunk: int, pictures: bool, steps: int) -> None:
    """Runs steps in this process, as its process's own loop would."""
    benchmark.reset(TASK, SEED)
    actions = np.zeros((chunk, 4), np.float32)
    for _ in range(steps // chunk):
        if pictures:
            benchmark.render()
        for action in MetaWorld.action.prepared(actions):
            benchmark.step(action)


def elsewhere(simulator: SimulatorProcess, chunk: int, pictures: bool, steps: int) -> None:
    """Runs the same steps in a simulator's process."""
    _, state = simulator.reset(TASK, SEED)
    actions = np.zeros((chunk, 4), np.float32)
    for _ in range(steps // chunk):
        if pictures:
            simulator.observe(state)
        simulator.advance(actions, through=True)


def cpu_seconds(work: Callable[[], None], child: int | None) -> float:
    """CPU time of `work`, that of a child process included."""

    def now() -> float:
        times = psutil.Process(child).cpu_times() if child else None
        return time.process_time() + (times.user + times.system if times else 0.0)

    before = now()
    work()
    return now() - before


def measure(chunk: int, view: View | None, steps: int) -> tuple[float, float]:
    """CPU seconds per step, here and in a process: the best of the turns."""
    shown, pictures = view or View(("workspace",), 16, 16), view is not None
    benchmark = MetaWorld(shown, {})
    best = [float("inf")] * 2
    with SimulatorProcess("metaworld", shown, {}) as simulator:
        here(benchmark, chunk, True, chunk)
        elsewhere(simulator, chunk, True, chunk)
        for _ in range(TURNS):
            spent = (
                cpu_seconds(lambda: here(benchmark, chunk, pictures, steps), None),
                cpu_seconds(lambda: elsewhere(simulator, chunk, pictures, steps), simulator.pid),
            )
            best = [min(pair) for pair in zip(best, spent, strict=True)]
    benchmark.close()
    return best[0] / steps, best[1] / steps


def main() -> int:
    """Prints microseconds of CPU time per step."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    print(f"{'':40s} {'here':>8s} {'process':>8s} {'more':>8s}   us of CPU per step")
    for name, (chunk, view) in SETTINGS.items():
        one, two = (1e6 * s for s in measure(chunk, view, steps if view is None else steps // 4))
        print(f"{name:40s} {one:8.0f} {two:8.0f} {two - one:8.0f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
