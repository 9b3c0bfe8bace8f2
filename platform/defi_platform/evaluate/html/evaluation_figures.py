"""The charts of an evaluation's page: success by initial state, latencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from defi_platform.evaluate.html.report_figures import ARM_COLOURS, broken, panels, svg

SOLVED, FAILED, LEFT_OUT = "#3f8f5b", "#c0392b", "#9aa3ad"
_PANELS = 4
"""Side by side in a row."""
_SAME = 1e-3
"""Standard deviation up to which a coordinate counts as the same in all episodes: a millimetre where it is in metres."""


def state_maps(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Markup]:
    """Success over the initial states, one map per task; rows of panels.

    The axes are two coordinates of the object or goal that is spread widest over the task's episodes, else of a part of
    the state. Where nothing known differs at the start, the axis is the seed.

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
            axis.set_title(broken(task, 34), fontsize=7 if len(task) > 34 else 8)
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
    # Results of earlier versions have no positions; the state alone is then all that is known.
    positions = [
        {one["name"]: one["value"] for one in row.get("initial_positions") or ()} for row in episodes
    ]
    states = [
        {
            names[i] if i < len(names) else f"state {i}": value
            for i, value in enumerate(row["initial_state"] or ())
        }
        for row in episodes
    ]
    for known in (positions, states):
        if (found := _widest(known)) is not None:
            return found
    seeds = np.array([row["seed"] for row in episodes], float)
    return seeds, np.zeros(len(seeds)), ("seed (nothing known differs at the start)", "")


def _widest(
    known: Sequence[Mapping[str, float]],
) -> tuple[np.ndarray, np.ndarray, tuple[str, str]] | None:
    """Two coordinates of the thing ("cube" of "cube_x") that is spread widest over the plane; None where nothing is.

    A left-out episode knows none and has no place; one that lacks a coordinate of the others has none either.
    """
    things: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for one in known for name in one):
        things.setdefault(name.rpartition("_")[0], []).append(name)
    best, area = None, 0.0
    for names in things.values():
        values = np.array([[one.get(name, np.nan) for name in names] for one in known])
        spread = np.nanstd(values, axis=0)
        if len(names) < 2:
            continue
        first, second = np.sort(np.argsort(-spread, kind="stable")[:2])
        if min(spread[first], spread[second]) > _SAME and spread[first] * spread[second] > area:
            area = float(spread[first] * spread[second])
            best = values[:, first], values[:, second], (names[first], names[second])
    return best


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
