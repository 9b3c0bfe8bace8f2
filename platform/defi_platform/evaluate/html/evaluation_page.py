"""The page of one evaluation: failures first, then rates, maps of initial states, latencies, errors and the protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from defi_platform import storage
from defi_platform.evaluate.fleet.stop_rule import stopped_line
from defi_platform.evaluate.html import evaluation_figures as figures
from defi_platform.evaluate.html.page import Picture, Table, file_url, render
from defi_platform.evaluate.html.report_figures import success_bars
from defi_platform.evaluate.policy.recorded_seeds import seen_line
from defi_platform.evaluate.results.evaluation import Evaluation
from defi_platform.evaluate.statistics.intervals import Rate
from defi_platform.evaluate.success_table import success_rows

FILE = "evaluation.html"
_VIDEOS = 12
"""Videos of failures on the page, and of successes."""
_BARS = 12
"""Tasks of a chart of bars."""


def write_page(evaluation: Evaluation, state_names: Sequence[str]) -> str:
    """Writes `<output>/evaluation.html`.

    Args:
        evaluation: the results.
        state_names: of the benchmark's state, for the axes of the maps.

    Returns:
        The page's path.
    """
    path = storage.join(evaluation.output, FILE)
    storage.write_text(path, evaluation_page(evaluation, state_names))
    return path


def evaluation_page(evaluation: Evaluation, state_names: Sequence[str]) -> str:
    """The page as HTML.

    Args:
        evaluation: the results.
        state_names: of the benchmark's state, for the axes of the maps.
    """
    summary, rows = evaluation.summary, evaluation.rows
    arms = summary["arms"]
    tested = "policy" if "policy" in arms else next(iter(arms))
    own = [row for row in rows if row["arm"] == tested]
    latencies = [ms for row in rows for ms in row["latency_ms"] or ()]
    failures = [row for row in own if row["success"] is False]
    return render(
        "evaluation.html.j2",
        benchmark=evaluation.protocol["benchmark"],
        name=evaluation.name,
        tested=tested,
        failures=_videos(evaluation, failures),
        failed=len(failures),
        successes=_videos(evaluation, [row for row in own if row["success"]]),
        seen=seen_line(summary["seeds_of_training"]) if summary.get("seeds_of_training") else None,
        distances=_distances(summary),
        stopped=stopped_line(summary["stopped"]) if summary.get("stopped") else None,
        success=Table(["task", *arms], success_rows(arms)),
        bars=list(_bars(arms)),
        maps=figures.state_maps(own, state_names),
        chains=_chains(summary),
        instructions=_instructions(summary),
        published=_published(summary),
        latency=figures.latency_histogram(latencies) if latencies else None,
        errors=Table(["simulator error", "times"], list(summary["simulator_errors"].items())),
        left_out=Table(
            ["arm", "task", "seed", "tries", "last error"],
            [
                [one["arm"], one["task"], str(one["seed"]), one["tries"], f"{one['kind']}: {one['message']}"]
                for one in summary["left_out"]
            ],
        ),
        protocol=Table(["", ""], list(_flat(evaluation.protocol))),
    )


def _videos(evaluation: Evaluation, rows: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Videos of episodes, those of different tasks first."""
    filmed = [row for row in rows if row["video"]]
    turn: dict[str, int] = {}
    order: list[tuple[int, int, Mapping[str, Any]]] = []
    for row in filmed:
        turn[row["task"]] = turn.get(row["task"], 0) + 1
        order.append((turn[row["task"]], len(order), row))
    chosen = [row for _, _, row in sorted(order, key=lambda one: one[:2])[:_VIDEOS]]
    found = []
    for row in chosen:
        caption = f"{row['task']}, seed {row['seed']}: {row['steps']} steps"
        if len(row["subtasks"]) > 1 or row["solved"] not in (0, 1):
            caption += f", {row['solved']} in a row, ended at {row['subtasks'][-1]['name']}"
        found.append(Picture(caption, caption, file_url(storage.join(evaluation.output, row["video"]))))
    return found


def _bars(arms: Mapping[str, Mapping[str, Any]]) -> Iterator[Any]:
    """Bars of a dozen tasks each, then of the groups that are pooled."""
    for kind in ("tasks", "groups"):
        names = list(next(iter(arms.values()))[kind])
        for start in range(0, len(names), _BARS):
            chosen = names[start : start + _BARS]
            yield success_bars({a: {n: one[kind][n] for n in chosen} for a, one in arms.items()})


def _chains(summary: Mapping[str, Any]) -> Table | None:
    if not summary.get("chains"):
        return None
    longest = next(iter(summary["chains"].values()))["length"]
    rows = [
        [
            arm,
            *(str(Rate(**table["in_a_row"][str(k)])) for k in range(1, longest + 1)),
            "{mean:.2f} ({low:.2f}-{high:.2f})".format(**table["average_length"]),
        ]
        for arm, table in summary["chains"].items()
    ]
    return Table(["in a row", *map(str, range(1, longest + 1)), "average length"], rows)


def _instructions(summary: Mapping[str, Any]) -> Table | None:
    chains = summary.get("chains") or {}
    if not chains:
        return None
    names = sorted({name for table in chains.values() for name in table["subtasks"]})
    rows = [[name, *(_tries(table["subtasks"].get(name)) for table in chains.values())] for name in names]
    return Table(["instruction", *chains], rows)


def _tries(rate: Mapping[str, Any] | None) -> str:
    return f"{Rate(**rate)} of {rate['episodes']}" if rate else "never begun"


def _published(summary: Mapping[str, Any]) -> Table | None:
    rows = summary.get("published")
    if not rows:
        return None
    same = {True: "yes", False: "no", None: "not known"}
    return Table(
        ["policy", "1 to n in a row", "average length", "horizon", "comparable", "source"],
        [
            [
                row["name"],
                " / ".join(f"{100 * rate:.1f}" for rate in row["in_a_row"] or ()) or "not given",
                f"{row['average_length']:.2f}",
                str(row["horizon"] or "not known"),
                same[row["comparable"]],
                row["source"],
            ]
            for row in rows
        ],
    )


def _distances(summary: Mapping[str, Any]) -> Table | None:
    distances = summary.get("distances_to_training")
    if not distances:
        return None
    head = [
        "task",
        "tested",
        "recorded",
        "to the nearest recorded: median",
        "largest",
        "recorded among themselves: median",
    ]
    rows = [
        [
            task,
            str(one["tested"]),
            str(one["recorded"]),
            f"{one['median']:.3g}",
            f"{one['largest']:.3g}",
            "-" if one["recorded_median"] is None else f"{one['recorded_median']:.3g}",
            str(one["same"]),
        ]
        for task, one in distances.items()
    ]
    return Table([*head, "the same"], rows)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, one in value.items():
        if isinstance(one, Mapping) and one:
            yield from _flat(one, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, one)) if isinstance(one, list) else str(one)
            yield f"{prefix}{key}", text or "-"
