"""Time of a training step by phase."""

from __future__ import annotations

import time

import torch

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "validation", "other")
"""data: waiting for the batch and its copy to the device. checkpoint: only the part that training waits for. other:
metrics, tracking and the recipe's work after an update."""


class PhaseTimer:
    """Splits the time between `start` and the last `end` into phases.

    On a GPU the phases are measured with events on its stream, without waiting for it: work is counted when it runs,
    not when it was launched.
    """

    def __init__(self, use_gpu: bool):
        self._use_gpu = use_gpu
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.start()

    def start(self) -> None:
        """Begins a phase; the time before it is not counted."""
        self._last = self._now()

    def end(self, phase: str) -> None:
        """Counts the time since the last phase as `phase`."""
        now = self._now()
        if self._use_gpu:
            self._spans.append((phase, self._last, now))
        else:
            self._seconds[phase] += now - self._last  # type: ignore[operator]
        self._last = now

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call (waits for the GPU)."""
        if self._use_gpu:
            torch.cuda.synchronize()
            for phase, began, ended in self._spans:
                self._seconds[phase] += began.elapsed_time(ended) / 1000  # type: ignore[union-attr,arg-type]
            self._spans = []
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _now(self) -> float | torch.cuda.Event:
        if not self._use_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
