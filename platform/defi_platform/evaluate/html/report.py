"""The report of a whole run, from recording to rollouts: one self-contained HTML page and a terminal table.

It is made from the files of the stages (summary.json, metrics.jsonl, media, episode videos) and computes
nothing that they did not measure. The page names what a stage did not write as missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defi_platform import storage
from defi_platform.evaluate.html import report_figures as figures
from defi_platform.evaluate.html.page import Picture, Table, file_url, render
from defi_platform.evaluate.statistics.intervals import Rate
from defi_platform.evaluate.success_table import aligned, success_lines, success_rows
from defi_platform.train.observability.metrics_log import read_metrics

LOSS_GOAL = 0.70
"""Held-out loss at the end, as a share of the one at step 0, that counts as learned."""
CODES_GOAL = 0.25
"""Share of the codebook in use on held-out pairs that counts as learned."""
FILE = "report.html"

Summaries = Mapping[str, Mapping[str, Any]]
"""Stage (gfdm, gidm, policy, evaluation) -> its summary.json."""


@dataclass(frozen=True)
class ReportInputs:
    """The folders of the stages, local or remote, and their wall-clock times in seconds."""

    gfdm: str
    gidm: str
    policy: str
    evaluation: str
    stage_seconds: Mapping[str, float]


@dataclass(frozen=True)
class GoalCheck:
    """One measured quantity against its goal."""

    quantity: str
    measured: str
    goal: str
    met: bool

    @property
    def outcome(self) -> str:
        """The result in words."""
        return "met" if self.met else "NOT MET"


def write_report(inputs: ReportInputs, output: str) -> str:
    """Prints the table and writes `<output>/report.html`.

    Args:
        inputs: the stages' folders.
        output: folder, local or remote.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: a stage has no summary.
    """
    summaries = {
        name: json.loads(storage.read_text(storage.join(getattr(inputs, name), "summary.json")))
        for name in ("gfdm", "gidm", "policy", "evaluation")
    }
    goals = check_goals(summaries)
    print(terminal_table(summaries, goals, inputs.stage_seconds), flush=True)
    path = storage.join(output, FILE)
    storage.write_text(path, _page(inputs, summaries, goals))
    return path


def check_goals(summaries: Summaries) -> list[GoalCheck]:
    """Compares what the demo's stages measured with its goals.

    Args:
        summaries: of all stages; success is compared where both "policy" and "random" have an outcome.
    """
    found = []
    for name in ("gfdm", "gidm"):
        validation = summaries[name]["validation"]
        first, last = validation["first"]["loss"], validation["last"]["loss"]
        found.append(
            GoalCheck(
                f"{name.upper()} loss on held-out video",
                f"{first:.4g} -> {last:.4g} ({100 * (last / first - 1):+.0f} %)",
                f"{100 * (LOSS_GOAL - 1):.0f} % or lower",
                last <= LOSS_GOAL * first,
            )
        )
    used = summaries["gidm"]["codebook_fraction_used"]
    found.append(
        GoalCheck(
            "codes in use", f"{100 * used:.0f} %", f"more than {100 * CODES_GOAL:.0f} %", used > CODES_GOAL
        )
    )
    pooled = {arm: result["pooled"] for arm, result in summaries["evaluation"]["arms"].items()}
    policy, random = pooled.get("policy"), pooled.get("random")
    if policy and random:
        found.append(
            GoalCheck(
                "policy's success, all tasks",
                str(Rate(**policy)),
                f"interval above random's {Rate(**random)}",
                policy["low"] > random["high"],
            )
        )
    return found


def terminal_table(
    summaries: Summaries, goals: Sequence[GoalCheck], stage_seconds: Mapping[str, float]
) -> str:
    """The text printed at the end of `make demo`.

    Args:
        summaries: of all stages.
        goals: made by `check_goals`.
        stage_seconds: stage -> wall-clock seconds.
    """
    lines = ["", *success_lines(summaries["evaluation"]["arms"]), ""]
    lines += aligned(
        [["", "measured", "goal"]] + [[g.quantity, g.measured, f"{g.goal}: {g.outcome}"] for g in goals]
    )
    latency = summaries["evaluation"]["latency_ms"]
    lines += [
        "",
        f"served policy: {latency['p50']:.0f} ms per chunk (p50), {latency['p95']:.0f} ms (p95), as clients saw it"
        if latency["count"]
        else "served policy: no request",
        "time: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stage_seconds.items())
        + f", together {sum(stage_seconds.values()) / 60:.1f} min",
    ]
    skipped = [f"{count} {reason} ({stage})" for stage, reason, count in _skipped(summaries)]
    lines += [f"skipped: {', '.join(skipped) or 'nothing'}", ""]
    return "\n".join(lines)


def _page(inputs: ReportInputs, summaries: Summaries, goals: Sequence[GoalCheck]) -> str:
    evaluation = summaries["evaluation"]
    arms, latency = evaluation["arms"], evaluation["latency_ms"]
    runs = {
        title: read_metrics(storage.join(getattr(inputs, name), "metrics.jsonl"))
        for title, name in (("GFDM", "gfdm"), ("GIDM", "gidm"), ("fused policy", "policy"))
    }
    rates = {arm: {**result["tasks"], "all tasks": result["pooled"]} for arm, result in arms.items()}
    return render(
        "report.html.j2",
        goals=Table(
            ["", "measured", "goal", ""], [[g.quantity, g.measured, g.goal, g.outcome] for g in goals]
        ),
        success=Table(["task", *arms], success_rows(arms)),
        success_bars=figures.success_bars(rates),
        episodes=_episode_videos(inputs.evaluation, evaluation),
        loss_curves=figures.loss_curves(runs),
        predictions=[
            Picture(caption="", alt=name, url=file_url(storage.join(inputs.gfdm, name)))
            for name in summaries["gfdm"].get("media", [])
        ],
        code_usage=figures.code_usage(summaries["gidm"]["code_counts"]),
        codebook_fraction_used=summaries["gidm"]["codebook_fraction_used"],
        latency=Table(
            ["requests", "p50", "p95"],
            [[latency["count"], f"{latency['p50']:.1f} ms", f"{latency['p95']:.1f} ms"]]
            if latency["count"]
            else [],
        ),
        stage_seconds=Table(
            ["stage", "seconds"],
            [[stage, f"{seconds:.0f}"] for stage, seconds in inputs.stage_seconds.items()],
        ),
        skipped=Table(["stage", "reason", "count"], list(_skipped(summaries))),
    )


def _skipped(summaries: Summaries) -> Iterable[tuple[str, str, int]]:
    for stage, summary in summaries.items():
        for reason, count in summary.get("skipped", {}).items():
            yield stage, reason, count


def _episode_videos(folder: str, summary: Mapping[str, Any]) -> list[Picture]:
    """One episode per task and policy under test: the first seed, whatever came of it."""
    videos = []
    for episode in summary.get("example_episodes", []):
        outcome = "solved" if episode["success"] else "not solved"
        caption = f"{episode['task']}, {episode['arm']}: {outcome} in {episode['steps']} steps"
        videos.append(Picture(caption, caption, file_url(storage.join(folder, episode["video"]))))
    return videos
