"""The report's charts, each a self-contained SVG element."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from defi_platform.train.observability.loss_curves import plot_losses

_LONG = 20
"""Letters of a name that still fit below a bar."""
INK, GRID = "#222222", "#e3e6ea"
ARM_COLOURS = {"policy": "#2563a8", "random": "#9aa3ad", "expert": "#3f8f5b"}


def loss_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Markup:
    """One panel per run: training loss, and validation loss where it was measured.

    Args:
        runs: title -> rows of metrics.jsonl, each with `step`, `split` and `loss`.
    """
    figure, axes = panels(len(runs), width=4.4, height=2.9)
    for axis, (title, rows) in zip(axes, runs.items(), strict=True):
        plot_losses(axis, rows)
        axis.set_title(title, fontsize=10)
    return svg(figure, "Loss over steps: " + ", ".join(runs))


def success_bars(success: Mapping[str, Mapping[str, Mapping[str, float] | None]]) -> Markup:
    """Success rate per task and policy with its 95 % interval.

    Args:
        success: policy under test -> task -> {"rate", "low", "high"}, all in [0, 1]; None without an outcome: no bar, and
            an interval from 0 to 1.
    """
    tasks = list(next(iter(success.values())))
    if max(map(len, tasks)) > _LONG:
        return _lying_bars(success, tasks)
    figure, (axis,) = panels(1, width=max(5.0, 1.5 * len(tasks) + 1), height=3.0)
    width = 0.8 / len(success)
    for index, (arm, by_task) in enumerate(success.items()):
        centres = [position + (index - (len(success) - 1) / 2) * width for position in range(len(tasks))]
        rates, below, above = _lengths(by_task, tasks)
        axis.bar(centres, rates, width * 0.92, color=ARM_COLOURS.get(arm, "#7a5ea8"), label=arm)
        axis.errorbar(
            centres, rates, yerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.5
        )
    axis.set_xticks(range(len(tasks)), tasks, fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("success", fontsize=8)
    axis.legend(frameon=False, fontsize=8, ncols=len(success), loc="upper center", bbox_to_anchor=(0.5, 1.14))
    return svg(figure, "Success rate per task and arm")


def _lying_bars(
    success: Mapping[str, Mapping[str, Mapping[str, float] | None]], tasks: Sequence[str]
) -> Markup:
    """The same where names are too long to stand side by side: one task below the other."""
    width = 0.8 / len(success)
    figure, (axis,) = panels(1, width=9.0, height=0.6 + 0.5 * len(tasks))
    for index, (arm, by_task) in enumerate(success.items()):
        centres = [position + (index - (len(success) - 1) / 2) * width for position in range(len(tasks))]
        rates, below, above = _lengths(by_task, tasks)
        axis.barh(centres, rates, width * 0.92, color=ARM_COLOURS.get(arm, "#7a5ea8"), label=arm)
        axis.errorbar(
            rates, centres, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2.5
        )
    axis.set_yticks(range(len(tasks)), [broken(task, 48) for task in tasks], fontsize=7)
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    axis.grid(True, axis="x", color=GRID)
    axis.set_xlim(0, 1.05)
    axis.set_xlabel("success", fontsize=8)
    axis.legend(frameon=False, fontsize=8, ncols=len(success), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(figure, "Success rate per task and arm")


def _lengths(
    by_task: Mapping[str, Mapping[str, float] | None], tasks: Sequence[str]
) -> tuple[list[float], list[float], list[float]]:
    """Rates, and how far their intervals reach below and above them."""
    found = [by_task[task] or {"rate": 0.0, "low": 0.0, "high": 1.0} for task in tasks]
    return (
        [one["rate"] for one in found],
        [max(0.0, one["rate"] - one["low"]) for one in found],
        [max(0.0, one["high"] - one["rate"]) for one in found],
    )


def broken(name: str, width: int) -> str:
    """A task's name in lines of up to `width` characters, broken after "/" and "_" as far as possible."""
    lines = [""]
    for part in re.findall(r"[^/_]*[/_]|[^/_]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def code_usage(counts: Sequence[int]) -> Markup:
    """Bars of the number of times each code of the codebook was chosen on held-out video."""
    figure, (axis,) = panels(1, width=5.0, height=2.1)
    axis.bar(range(len(counts)), counts, color=ARM_COLOURS["policy"])
    axis.set_xlabel("code", fontsize=8)
    axis.set_ylabel("times chosen", fontsize=8)
    return svg(figure, "How often each code was chosen")


def panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side.

    Args:
        count: number of panels.
        width: of one panel, in inches.
        height: of one panel, in inches.
    """
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.tick_params(labelsize=8, colors=INK)
        axis.grid(True, axis="y", color=GRID)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def svg(figure: Figure, label: str) -> Markup:
    """The figure as an SVG element; screen readers read out `label`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    element = re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
    return Markup(element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1))
