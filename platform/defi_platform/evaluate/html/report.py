"""The report of a whole run, from recording to rollouts: one self-contained HTML page and a terminal table.

It is made from what the stages left behind (summary.json, metrics.jsonl, media, episode videos) and computes
nothing that they did not measure. What a stage did not leave is named as missing.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defi_platform import storage
from defi_platform.evaluate.html import report_figures as figures
from defi_platform.evaluate.html.page import data_url, document, section, table
from defi_platform.train.observability.metrics_log import read_metrics

LOSS_GOAL = 0.70
"""Held-out loss at the end, as a share of the one at step 0, that counts as learned."""
CODES_GOAL = 0.25
FILE = "report.html"


@dataclass(frozen=True)
class ReportInputs:
    """The folders of the stages, local or remote."""

    corpus: str
    gfdm: str
    gidm: str
    policy: str
    evaluation: str
    stage_seconds: Mapping[str, float]


@dataclass(frozen=True)
class Check:
    """One line of the verdict: what was measured against what was hoped for."""

    what: str
    measured: str
    goal: str
    met: bool


def write_report(inputs: ReportInputs, output: str) -> str:
    """Prints the table and writes `<output>/report.html`.

    Returns: the page's path. Raises: FileNotFoundError when a stage has left no summary.
    """
    summaries = {
        name: json.loads(storage.read_text(storage.join(getattr(inputs, name), "summary.json")))
        for name in ("gfdm", "gidm", "policy", "evaluation")
    }
    verdict = checks(summaries)
    print(terminal_table(summaries, verdict, inputs.stage_seconds), flush=True)
    path = storage.join(output, FILE)
    storage.write_text(path, _page(inputs, summaries, verdict))
    return path


def checks(summaries: Mapping[str, Mapping[str, Any]]) -> list[Check]:
    """The four questions of the demo, answered from the stages' summaries."""
    found = []
    for name in ("gfdm", "gidm"):
        validation = summaries[name]["validation"]
        first, last = validation["first"]["loss"], validation["last"]["loss"]
        found.append(
            Check(
                f"{name.upper()} loss on held-out video",
                f"{first:.4g} -> {last:.4g} ({100 * (last / first - 1):+.0f} %)",
                f"{100 * (LOSS_GOAL - 1):.0f} % or lower",
                last <= LOSS_GOAL * first,
            )
        )
    used = summaries["gidm"]["codebook_fraction_used"]
    found.append(
        Check("codes in use", f"{100 * used:.0f} %", f"more than {100 * CODES_GOAL:.0f} %", used > CODES_GOAL)
    )
    pooled = {arm: result["pooled"] for arm, result in summaries["evaluation"]["arms"].items()}
    if "policy" in pooled and "random" in pooled:
        policy, random = pooled["policy"], pooled["random"]
        found.append(
            Check(
                "policy's success, all tasks",
                _rate(policy),
                f"interval above random's {_rate(random)}",
                policy["low"] > random["high"],
            )
        )
    return found


def terminal_table(
    summaries: Mapping[str, Mapping[str, Any]], verdict: Sequence[Check], stage_seconds: Mapping[str, float]
) -> str:
    """What a person sees at the end of `make demo`."""
    arms = summaries["evaluation"]["arms"]
    tasks = list(next(iter(arms.values()))["tasks"])
    rows = [["success (95 % interval)", *arms]]
    rows += [[task, *(_rate(arms[arm]["tasks"][task]) for arm in arms)] for task in tasks]
    rows += [["all tasks", *(_rate(arms[arm]["pooled"]) for arm in arms)]]
    latency = summaries["evaluation"]["latency_ms"]
    lines = ["", *_aligned(rows), ""]
    lines += _aligned(
        [["", "measured", "goal"]] + [[c.what, c.measured, f"{c.goal}: {_verdict(c)}"] for c in verdict]
    )
    lines += [
        "",
        f"served policy: {latency['p50']:.0f} ms per chunk (p50), {latency['p95']:.0f} ms (p95), as clients saw it",
        "time: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in stage_seconds.items())
        + f", together {sum(stage_seconds.values()) / 60:.1f} min",
    ]
    skipped = list(_skipped(summaries))
    lines += [
        f"skipped: {', '.join(f'{n} {reason} ({stage})' for stage, reason, n in skipped) or 'nothing'}",
        "",
    ]
    return "\n".join(lines)


def _page(inputs: ReportInputs, summaries: Mapping[str, Any], verdict: Sequence[Check]) -> str:
    arms = summaries["evaluation"]["arms"]
    tasks = list(next(iter(arms.values()))["tasks"])
    runs = {
        title: read_metrics(storage.join(getattr(inputs, name), "metrics.jsonl"))
        for title, name in (("GFDM", "gfdm"), ("GIDM", "gidm"), ("fused policy", "policy"))
    }
    success = {arm: {**result["tasks"], "all tasks": result["pooled"]} for arm, result in arms.items()}
    success_table = table(
        ["task", *arms],
        [[task, *(_rate(by_arm[task]) for by_arm in success.values())] for task in [*tasks, "all tasks"]],
    )
    latency = summaries["evaluation"]["latency_ms"]
    parts = [
        section(
            "Verdict",
            table(["", "measured", "goal", ""], [[c.what, c.measured, c.goal, _verdict(c)] for c in verdict]),
        ),
        section(
            "Success in closed loop",
            figures.success_bars(success) + success_table,
            "Every arm met the same seeded initial states. Bars are 95 % Wilson intervals. The policy was called "
            "over a websocket at the Ray Serve deployment, as a robot would call it.",
        ),
        section("Episodes", _videos(inputs.evaluation, summaries["evaluation"])),
        section("Loss", figures.loss_curves(runs), "Validation is on video that training never saw."),
        section(
            "What GFDM predicts",
            _media(inputs.gfdm, summaries["gfdm"]),
            "Held-out clips, three rows each: what happened; what GFDM predicts from the first frame and the text "
            "in one denoising step, which is what the policy reads; the same sampled in several steps.",
        ),
        section(
            "Latent actions",
            figures.code_usage(summaries["gidm"]["code_counts"]),
            f"{100 * summaries['gidm']['codebook_fraction_used']:.0f} % of the codes are in use on held-out pairs.",
        ),
        section(
            "Latency of the served policy",
            table(
                ["requests", "p50", "p95"],
                [[latency["count"], f"{latency['p50']:.1f} ms", f"{latency['p95']:.1f} ms"]],
            ),
            "From sending an observation to holding its action chunk, measured by the simulator workers.",
        ),
        section(
            "Time", table(["stage", "seconds"], [[k, f"{v:.0f}"] for k, v in inputs.stage_seconds.items()])
        ),
        section("Skipped", _skipped_table(summaries)),
    ]
    return document("DeFI demo report", "DeFI: from plain video to a served, scored policy", parts)


# --------------------------------------------------------------------------- pieces


def _rate(result: Mapping[str, Any]) -> str:
    return f"{100 * result['rate']:.0f} % ({100 * result['low']:.0f}-{100 * result['high']:.0f})"


def _verdict(check: Check) -> str:
    return "met" if check.met else "NOT MET"


def _skipped(summaries: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, int]]:
    for stage, summary in summaries.items():
        for reason, count in summary.get("skipped", {}).items():
            yield stage, reason, count


def _skipped_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    rows = list(_skipped(summaries))
    return table(["stage", "reason", "count"], rows) if rows else "<p>Nothing was skipped.</p>"


def _media(run: str, summary: Mapping[str, Any]) -> str:
    names = summary.get("media", [])
    if not names:
        return "<p>The run left no pictures.</p>"
    return "".join(_medium(name, data_url(storage.join(run, name))) for name in names)


def _medium(name: str, url: str) -> str:
    if name.endswith(".mp4"):
        return f'<video class="clips" controls loop muted src="{url}"></video>'
    return f'<img alt="{html.escape(name)}" src="{url}">'


def _videos(folder: str, summary: Mapping[str, Any]) -> str:
    """One episode per task and arm: the first seed, whatever came of it."""
    cells = []
    for episode in summary.get("example_episodes", []):
        path = storage.join(folder, episode["video"])
        outcome = "solved" if episode["success"] else "not solved"
        caption = f"{episode['task']}, {episode['arm']}: {outcome} in {episode['steps']} steps"
        cells.append(
            f'<figure><video controls autoplay loop muted src="{data_url(path)}"></video>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    if not cells:
        return "<p>No episode videos were written.</p>"
    columns = f"grid-template-columns: repeat({len(summary['arms'])}, minmax(0, 220px))"
    return f'<div class="grid" style="{columns}">{"".join(cells)}</div>'


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
