"""A finished evaluation, as its folder holds it: `write_results` makes it, `read_evaluation` reads it back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from defi_platform import storage
from defi_platform.errors import ConfigError, one_line
from defi_platform.evaluate.benchmarks.interface import Benchmark
from defi_platform.evaluate.results.episodes import digest_of_episodes, read_episodes, write_episodes
from defi_platform.evaluate.results.steps import digest_of_steps, write_steps
from defi_platform.evaluate.results.summary import summarise

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation."""

    output: str
    summary: dict[str, Any]
    """See `summary.summarise`; also protocol, settings, asked, policy, skipped, wall_s."""
    rows: list[dict[str, Any]]
    """Of its episodes, see `episodes.SCHEMA`."""

    @property
    def protocol(self) -> dict[str, Any]:
        """See `protocol.protocol_of`."""
        return dict(self.summary["protocol"])

    @property
    def name(self) -> str:
        """The policy's name where it has one, else that of the folder."""
        named: str | None = self.protocol["policy"].get("name")
        return named or self.output.rstrip("/").rpartition("/")[2]


def write_results(
    output: str,
    rows: Sequence[Mapping[str, Any]],
    steps: Iterable[tuple[Mapping[str, Any], pa.Table | None]],
    *,
    arms: Sequence[str],
    protocol: Mapping[str, Any],
    benchmark: type[Benchmark],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes episodes.parquet, steps.parquet and, last, summary.json, which says that the evaluation is whole.

    Args:
        output: folder, local or remote.
        rows: of the episodes, in the order of the tables; see `episodes.SCHEMA`.
        steps: see `steps.write_steps`.
        arms: policies under test.
        protocol: see `protocol.protocol_of`.
        benchmark: class of the benchmark.
        more: further entries of the summary: settings, asked, policy, skipped, wall_s.

    Returns:
        The summary.
    """
    summary = {
        **summarise(rows, arms=arms, protocol=protocol, benchmark=benchmark),
        "protocol": dict(protocol),
        **more,
    }
    summary["episodes_sha256"] = write_episodes(output, rows, protocol)
    summary["steps"], summary["steps_sha256"] = write_steps(output, steps)
    storage.write_text(storage.join(output, SUMMARY), json.dumps(summary, indent=1))
    return summary


def is_whole(output: str, summary: Mapping[str, Any]) -> bool:
    """Whether both tables are those of the summary, and not of a driver that wrote, or is writing, others.

    Args:
        output: folder of the evaluation.
        summary: of it.
    """
    try:
        # Summaries of before have no digest of the steps.
        steps = summary.get("steps_sha256")
        same_steps = steps is None or digest_of_steps(output) == steps
        return same_steps and digest_of_episodes(output) == summary.get("episodes_sha256")
    except FileNotFoundError:
        return False


def read_evaluation(output: str) -> Evaluation:
    """Reads a finished evaluation.

    Args:
        output: its folder, local or remote.

    Raises:
        ConfigError: there is none, it is not finished, its files are of two runs, or an earlier version wrote it.
    """
    folder = storage.absolute(output)
    damaged = (
        f"{output} holds no evaluation that can be read: {{0}} is damaged, or another program's ({{1}}). "
        + ("Give the output of jobs/evaluate_policy.py, or run that again: finished episodes are kept.")
    )
    try:
        summary = json.loads(storage.read_text(storage.join(folder, SUMMARY)))
        if "protocol" in summary:
            rows = read_episodes(folder)
            if not rows:
                raise ConfigError(
                    f"{output} has no episodes: its table is empty. Evaluate into another folder."
                )
            if is_whole(folder, summary):
                return Evaluation(folder, summary, rows)
            if "episodes_sha256" not in summary:
                raise ConfigError(
                    f"{output}: an earlier version wrote {SUMMARY}, which does not say of which episodes it is. Run the same "
                    "command of jobs/evaluate_policy.py again: finished episodes are kept."
                )
            raise ConfigError(
                f"{output}: episodes.parquet, steps.parquet and {SUMMARY} are of two runs of jobs/evaluate_policy.py, of which "
                "one is at work or was killed. Wait for it, or run the command whose table you want again: finished episodes are kept."
            )
        if "arms" not in summary:
            raise ConfigError(
                f"{output} holds no evaluation but other results; give the output of jobs/evaluate_policy.py."
            )
    except pa.ArrowInvalid as error:
        raise ConfigError(damaged.format("episodes.parquet", one_line(error))) from error
    except ValueError as error:
        raise ConfigError(damaged.format(SUMMARY, one_line(error))) from error
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{output} holds no finished evaluation ({SUMMARY}, episodes.parquet); give the output of "
            "jobs/evaluate_policy.py, or run that to its end."
        ) from None
    raise ConfigError(
        f"{output} was evaluated by an earlier version, which stored no protocol; evaluate again into another folder."
    )
