"""The charts of an evaluation's page: success by initial state, latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from defi_platform.evaluate.html.report_figures import ARM_COLOURS, panels, svg

SOLVED, FAILED, LEFT_OUT = "#3f8f5b", "#c0392b", "#9aa3ad"
_PANELS = 4
"""Side by side in a row."""


def state_maps(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Markup]:
    """Success over the initial states, one map per task; rows of panels.

    The axes are the two entries of the state that vary most over the task's episodes. Where the state at the start
    is always the same, the axis is the seed.

    Args:
        rows: episodes of one arm.
        names: of the entries of `initial_state`.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    made = []
    for start in range(0, len(tasks), _PANELS):
        chosen = tasks[start : start + _PANELS]
        figure, axes = panels(len(chosen), width=2.7, height=2.6)
        for axis, task in zip(axes, chosen, strict=True):
            episodes = [row for row in rows if row["task"] == task]
            x, y, labels = _coordinates(episodes, names)
            for outcome, colour, marker in ((True, SOLVED, "o"), (False, FAILED, "x"), (None, LEFT_OUT, "s")):
                those = [index for index, row in enumerate(episodes) if row["success"] is outcome]
                axis.scatter(x[those], y[those], s=22, c=colour, marker=marker, linewidths=1.3, alpha=0.8)
            axis.set_title(task, fontsize=8)
            axis.set_xlabel(labels[0], fontsize=7)
            axis.set_ylabel(labels[1], fontsize=7)
            axis.margins(0.12)
            if not labels[1]:
                axis.set_yticks([])
        made.append(svg(figure, f"Success by initial state: {', '.join(chosen)}"))
    return made


def _coordinates(
    episodes: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[str, str]]:
    seeds = np.array([row["seed"] for row in episodes], float)
    known = [row["initial_state"] for row in episodes if row["initial_state"]]
    if len({len(state) for state in known}) == 1:
        states = np.full(
            (len(episodes), len(known[0])), np.nan
        )  # a left-out episode has no state and no place
        for index, row in enumerate(episodes):
            if row["initial_state"]:
                states[index] = row["initial_state"]
        spread = np.nanstd(states, axis=0)
        first, second = (*np.argsort(-spread, kind="stable"), -1)[:2]
        if second >= 0 and spread[second] > 1e-6:
            labels = [names[i] if i < len(names) else f"state {i}" for i in (first, second)]
            return states[:, first], states[:, second], (labels[0], labels[1])
    return seeds, np.zeros(len(seeds)), ("seed (the state is alike at the start)", "")


def latency_histogram(milliseconds: Sequence[float]) -> Markup:
    """Histogram of the requests' latencies, up to the 99.5th percentile, with p50 and p95."""
    figure, (axis,) = panels(1, width=5.6, height=2.3)
    values = np.asarray(milliseconds)
    axis.hist(np.minimum(values, np.quantile(values, 0.995)), bins=40, color=ARM_COLOURS["policy"])
    for share, style in ((0.5, "-"), (0.95, "--")):
        at = float(np.quantile(values, share))
        axis.axvline(
            at, color="#222222", linestyle=style, linewidth=1, label=f"p{100 * share:.0f} {at:.0f} ms"
        )
    axis.set_xlabel("ms per request (the last bin holds the slowest 0.5 %)", fontsize=8)
    axis.set_ylabel("requests", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    return svg(figure, "Latency of the requests")
