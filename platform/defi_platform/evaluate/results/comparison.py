"""Comparison of evaluations on the initial states that all policies met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from defi_models.errors import did_you_mean
from defi_platform.config import CompareConfig
from defi_platform.errors import ConfigError
from defi_platform.evaluate.results.episodes import left_out
from defi_platform.evaluate.results.evaluation import Evaluation, read_evaluation
from defi_platform.evaluate.results.protocol import OUTCOME, differences
from defi_platform.evaluate.results.summary import grouping_of
from defi_platform.evaluate.statistics.intervals import Rate, wilson
from defi_platform.evaluate.statistics.paired import (
    PairedCounts,
    count_pairs,
    difference_interval,
    holm,
    mcnemar,
    mcnemar_of_tasks,
    mean_difference,
)
from defi_platform.evaluate.statistics.pooling import Grouping, joined, pooled
from defi_platform.evaluate.statistics.power import smallest_visible
from defi_platform.evaluate.success_table import aligned

_SHOWN = 5
"""Differences of protocols that a message spells out."""
_SAME_START = 1e-3
"""Difference of a number of the initial state up to which two starts are alike: rounding of other processors."""

Unit = tuple[str, int]
"""Task and seed: the initial state of an episode."""


@dataclass(frozen=True)
class Compared:
    """Two policies over the same initial states, of a task or of a group of tasks."""

    name: str
    """Of the task or group."""
    pairs: int
    first: dict[str, Any]
    """Rate fields."""
    second: dict[str, Any]
    difference: float
    """Rate of the second minus that of the first."""
    low: float
    high: float
    """Of its interval."""
    only_first: int
    only_second: int
    """Initial states that one policy alone solved."""
    p: float
    """Of McNemar's exact test; for a mean over tasks, with pairs weighed as that mean does."""
    p_corrected: float
    """Holm's, over the comparisons of its kind: of groups, or of tasks."""
    smallest_visible: float | None
    """True difference that so many pairs show with the power asked for; None: none at all."""


@dataclass(frozen=True)
class Comparison:
    """The result of comparing a policy with the first one."""

    first: str
    second: str
    """Names of the policies."""
    groups: list[Compared]
    tasks: list[Compared]
    lengths: dict[str, dict[str, Any]]
    """Mean differences over pairs with bootstrap intervals, p and p_corrected (over the comparisons): of steps where both
    solved the task, and of subtasks in a row."""
    without_pair: dict[str, list[str]]
    """Name of a policy -> its episodes ("task seed") that have no partner, left-out ones included."""


@dataclass(frozen=True)
class ComparisonResult:
    """All comparisons with the first policy."""

    comparisons: list[Comparison]
    confidence: float
    power: float
    ignored: list[str]
    """Differences of the protocols that were to be ignored."""
    notes: list[str]
    """What else limits the comparison."""

    def as_mapping(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def significantly_worse(self) -> list[str]:
        """Policies that are below the first one in a group, corrected p under 1 - confidence."""
        level = 1 - self.confidence
        return [
            one.second
            for one in self.comparisons
            if any(group.difference < 0 and group.p_corrected < level for group in one.groups)
        ]

    def summary(self) -> str:
        """Tables for the terminal."""
        level = f"{100 * self.confidence:g} %"
        lines = [f"differs, ignored as asked: {text}" for text in self.ignored] + self.notes
        for one in self.comparisons:
            head = [
                f"success ({level})", one.first, one.second, "difference", "pairs", "only one solved",
                "p", "p (Holm)", f"visible at power {self.power:g}",
            ]  # fmt: skip
            lines += ["", *aligned([head, *map(_cells, [*one.tasks, *one.groups])])]
            for what, found in one.lengths.items():
                interval = "no interval: all alike"
                if found["low"] is not None:
                    interval = f"{found['low']:+.2f} to {found['high']:+.2f}"
                lines.append(
                    f"{what}: {found['mean']:+.2f} ({interval}) over {found['pairs']} pairs, "
                    f"p {found['p']:.3g}, p (Holm) {found['p_corrected']:.3g}"
                )
            for name, units in one.without_pair.items():
                shown = ", ".join(units[:5]) + (", ..." if len(units) > 5 else "")
                lines.append(f"without a pair, not compared: {len(units)} of {name} ({shown})")
        return "\n".join(lines).lstrip("\n")


def compare(config: CompareConfig) -> ComparisonResult:
    """Compares every evaluation with the first, pairing episodes by task and seed.

    Raises:
        ConfigError: fewer than two outputs, one that is not finished, an arm that it does not have, protocols that
            differ in what decides outcomes, no initial state that both met, or pairs that did not start alike.
    """
    _check(config)
    evaluations = [read_evaluation(output) for output in config.outputs]
    arms = list(config.arms or ["policy"] * len(evaluations))
    found = [_outcomes(evaluation, arm) for evaluation, arm in zip(evaluations, arms, strict=True)]
    names = _names(evaluations, arms)
    ignored = [
        text
        for other, name in zip(evaluations[1:], names[1:], strict=True)
        for text in _check_protocols(evaluations[0], other, (names[0], name), config.ignore)
    ]
    grouping = grouping_of(evaluations[0].protocol)
    tasks = list(evaluations[0].protocol["horizons"])
    chained = "chains" in evaluations[0].summary
    made = [
        _compare(names[0], name, found[0], other, tasks, grouping, config, len(evaluations) - 1, chained)
        for name, other in zip(names[1:], found[1:], strict=True)
    ]
    notes = [
        f"{name} was ended early by its stop rule: intervals and p values hold for numbers of episodes fixed before"
        for name, evaluation in zip(names, evaluations, strict=True)
        if evaluation.summary.get("stopped")
    ]
    for name, other in zip(names[1:], found[1:], strict=True):
        if text := _different_starts(names[0], name, found[0], other):
            if not ignored:
                raise ConfigError(f"{text}; evaluate both again with one installation, into other folders.")
            notes.append(text)
    return ComparisonResult(_corrected(made), config.confidence, config.power, ignored, notes)


def _check(config: CompareConfig) -> None:
    if len(config.outputs) < 2:
        raise ConfigError(
            f"{len(config.outputs)} evaluation is given; name two or more outputs of jobs/evaluate_policy.py."
        )
    if config.arms and len(config.arms) != len(config.outputs):
        raise ConfigError(
            f"arms names {len(config.arms)} for {len(config.outputs)} outputs; name one for each."
        )
    for part in config.ignore:
        if part.partition(".")[0] not in OUTCOME:
            raise ConfigError(
                f"ignore names {part}, which is no part of the protocol that decides outcomes; those are "
                f"{', '.join(OUTCOME)}.{did_you_mean(part, OUTCOME)}"
            )
    for name in ("confidence", "power"):
        if not 0 < getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be between 0 and 1.")


def _names(evaluations: Sequence[Evaluation], arms: Sequence[str]) -> list[str]:
    plain = [
        evaluation.name if arm == "policy" else f"{evaluation.name}:{arm}"
        for evaluation, arm in zip(evaluations, arms, strict=True)
    ]
    if len(set(plain)) == len(plain):
        return plain
    return [
        f"{index + 1}:{evaluation.output}" if plain.count(name) > 1 else name
        for index, (evaluation, name) in enumerate(zip(evaluations, plain, strict=True))
    ]


def _outcomes(evaluation: Evaluation, arm: str) -> dict[Unit, Mapping[str, Any]]:
    rows: dict[Unit, Mapping[str, Any]]
    rows = {(row["task"], row["seed"]): row for row in evaluation.rows if row["arm"] == arm}
    if not rows:
        there = list(evaluation.summary["arms"])
        raise ConfigError(
            f"{evaluation.output} has no episode of the arm '{arm}'; it has {', '.join(there)}."
            f"{did_you_mean(arm, there)} Set arms to one name per output."
        )
    return rows


def _check_protocols(
    first: Evaluation, other: Evaluation, names: tuple[str, str], ignore: Sequence[str]
) -> list[str]:
    """Differences that are to be ignored, in words."""
    unequal = differences(first.protocol, other.protocol)
    text = {part: f"{part}: {a} in {names[0]}, {b} in {names[1]}" for part, (a, b) in unequal.items()}
    ignored = [part for part in text if any(part == name or part.startswith(f"{name}.") for name in ignore)]
    refused = [part for part in text if part not in ignored]
    if refused:
        shown = [text[part] for part in refused[:_SHOWN]]
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        # Beyond a few, whole parts are named: names of tasks, which are many, may hold anything.
        named = refused if len(refused) <= _SHOWN else dict.fromkeys(p.partition(".")[0] for p in refused)
        raise ConfigError(
            f"the evaluations {names[0]} and {names[1]} have different protocols ({'; '.join(shown)}{more}). "
            "Evaluate under the same one; or, if that difference is what you compare, "
            f"ignore='[{', '.join(named)}]'."
        )
    return [text[part] for part in ignored]


def _different_starts(
    first_name: str,
    second_name: str,
    first: Mapping[Unit, Mapping[str, Any]],
    second: Mapping[Unit, Mapping[str, Any]],
) -> str | None:
    """Says which pairs of one task and seed began in different states, as far as both sides recorded them."""
    unlike = [unit for unit in sorted(first.keys() & second.keys()) if _unlike(first[unit], second[unit])]
    if not unlike:
        return None
    task, seed = unlike[0]
    return (
        f"{len(unlike)} pairs of {first_name} and {second_name} (the first is {task} {seed}) did not start from the same "
        "state, though task and seed are the same"
    )


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    states = [row["initial_state"] or [] for row in (first, second)]
    positions = [
        {one["name"]: one["value"] for one in row["initial_positions"] or ()} for row in (first, second)
    ]
    pairs = list(zip(*states, strict=False))
    pairs += [(positions[0][name], positions[1][name]) for name in positions[0].keys() & positions[1].keys()]
    return any(abs(a - b) > _SAME_START * max(1.0, abs(a)) for a, b in pairs)


def _compare(
    first_name: str,
    second_name: str,
    first: Mapping[Unit, Mapping[str, Any]],
    second: Mapping[Unit, Mapping[str, Any]],
    tasks: Sequence[str],
    grouping: Grouping,
    config: CompareConfig,
    comparisons: int,
    chained: bool,
) -> Comparison:
    usable = [{unit for unit, row in rows.items() if not left_out(row)} for rows in (first, second)]
    shared = sorted(usable[0] & usable[1], key=lambda unit: (unit[0], unit[1]))
    if not shared:
        raise ConfigError(
            f"{first_name} and {second_name} have no initial state (task and seed) in common; evaluate both on the same."
        )
    counts = {
        task: count_pairs(
            [first[unit]["success"] for unit in shared if unit[0] == task],
            [second[unit]["success"] for unit in shared if unit[0] == task],
        )
        for task in tasks
    }
    paired = [task for task in tasks if counts[task].pairs]
    groups = grouping.of(paired)
    level = 1 - config.confidence

    def row(name: str, members: Sequence[str], alternatives: int) -> Compared:
        return _compared(
            name, [counts[task] for task in members], grouping.rule, config, level / alternatives
        )

    lengths = _lengths(shared, first, second, config.confidence, chained)
    return Comparison(
        first_name,
        second_name,
        groups=[row(name, members, comparisons * len(groups)) for name, members in groups.items()],
        tasks=[row(task, [task], comparisons * len(paired)) for task in paired],
        lengths=lengths,
        without_pair={
            name: units
            for name, rows in ((first_name, first), (second_name, second))
            if (units := [f"{task} {seed}" for task, seed in sorted(set(rows) - set(shared))])
        },
    )


def _compared(
    name: str, tasks: Sequence[PairedCounts], rule: str, config: CompareConfig, level: float
) -> Compared:
    total = PairedCounts(
        both=sum(one.both for one in tasks),
        only_first=sum(one.only_first for one in tasks),
        only_second=sum(one.only_second for one in tasks),
        neither=sum(one.neither for one in tasks),
    )
    if rule == "tasks":
        difference, low, high = joined(
            [(one.difference, *difference_interval(one, config.confidence)) for one in tasks]
        )
    else:
        difference, (low, high) = total.difference, difference_interval(total, config.confidence)
    first, second = (
        pooled([_rate(one, which, config.confidence) for one in tasks], rule, config.confidence)
        for which in ("first", "second")
    )
    p = mcnemar_of_tasks(tasks) if rule == "tasks" else mcnemar(total)
    return Compared(
        name, total.pairs, first.as_mapping(), second.as_mapping(), difference, low, high,
        total.only_first, total.only_second, p, p,
        smallest_visible(total.pairs, total.discordant / total.pairs, level, config.power),
    )  # fmt: skip


def _rate(counts: PairedCounts, which: str, confidence: float) -> Rate:
    alone = counts.only_first if which == "first" else counts.only_second
    return wilson(counts.both + alone, counts.pairs, confidence)


def _lengths(
    shared: Sequence[Unit],
    first: Mapping[Unit, Mapping[str, Any]],
    second: Mapping[Unit, Mapping[str, Any]],
    confidence: float,
    chained: bool,
) -> dict[str, dict[str, Any]]:
    found = {}
    solved = [unit for unit in shared if first[unit]["success"] and second[unit]["success"]]
    if solved:
        found["steps where both solved it"] = mean_difference(
            [first[unit]["steps"] for unit in solved], [second[unit]["steps"] for unit in solved], confidence
        )
    if chained:
        found["subtasks solved in a row"] = mean_difference(
            [first[unit]["solved"] for unit in shared],
            [second[unit]["solved"] for unit in shared],
            confidence,
        )
    return {name: asdict(one) for name, one in found.items()}


def _corrected(made: Sequence[Comparison]) -> list[Comparison]:
    """Holm's correction over the groups of all comparisons, over their tasks, and over the lengths of a kind."""

    def corrected(kind: str) -> list[list[Compared]]:
        lists: list[list[Compared]] = [getattr(one, kind) for one in made]
        values = iter(holm([row.p for rows in lists for row in rows]))
        return [[Compared(**{**vars(row), "p_corrected": next(values)}) for row in rows] for rows in lists]

    for what in {what for one in made for what in one.lengths}:
        found = [one.lengths[what] for one in made if what in one.lengths]
        for length, p in zip(found, holm([length["p"] for length in found]), strict=True):
            length["p_corrected"] = p
    return [
        Comparison(**{**vars(one), "groups": groups, "tasks": tasks})
        for one, groups, tasks in zip(made, corrected("groups"), corrected("tasks"), strict=True)
    ]


def _cells(row: Compared) -> list[str]:
    visible = "none" if row.smallest_visible is None else f"{100 * row.smallest_visible:.0f} points"
    return [
        row.name, str(Rate(**row.first)), str(Rate(**row.second)),
        f"{100 * row.difference:+.0f} ({100 * row.low:+.0f} to {100 * row.high:+.0f})", str(row.pairs),
        f"{row.only_first} / {row.only_second}", f"{row.p:.3g}", f"{row.p_corrected:.3g}", visible,
    ]  # fmt: skip
