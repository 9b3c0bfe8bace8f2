"""The finished episodes of an evaluation: append-only files named by what decides their content.

    <output>/identity/   settings, policy and protocol, from the first finished episode on
    <output>/episodes/   <unit>.json, the row of an episode; it comes last, so that its steps and video are there
    <output>/steps/      <unit>-<digest of the content>.parquet
    <output>/videos/     <arm>/<task>/<seed>-<start of the unit's name>.mp4
    <output>/faults/     <unit>-<number>.json, a try that the simulator did not survive

Nothing is written over: of two drivers that finish one episode the first one's stays.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from defi_platform import storage
from defi_platform.errors import ConfigError
from defi_platform.evaluate.store.identity import (
    POLICY,
    PROTOCOL,
    SETTINGS,
    bind,
    check_bound,
    unit_digest,
)
from defi_platform.evaluate.store.steps import unpack_steps
from defi_platform.evaluate.store.whole_json import read_json
from defi_platform.storage.exclusive import create_bytes
from defi_platform.storage.parallel_read import side_by_side

EPISODES, STEPS, VIDEOS, FAULTS = "episodes", "steps", "videos", "faults"
_ROW = re.compile(r"([0-9a-f]{32})\.json")
_FAULT = re.compile(r"([0-9a-f]{32})-(\d+)\.json")
_OLD = re.compile(r".+_.+_\d+\.json|settings\.json")
_ARM_OF_THE_POLICY = "policy"


@dataclass(frozen=True)
class Finished:
    """An episode as a simulator worker hands it over."""

    row: Mapping[str, Any]
    """JSON values; arm, task and seed among them."""
    steps: bytes = b""
    """Parquet, see `store.steps`; empty: none are kept."""
    video: bytes = b""
    """MP4; empty: none is kept."""
    protocol: Mapping[str, Any] | None = None
    """Of the benchmark where it ran."""


class EpisodeStore:
    """Reads and adds the episodes of one policy under one set of settings; any number of drivers may do so at once."""

    def __init__(self, output: str, settings: Mapping[str, Any], policy: Mapping[str, Any] | None = None):
        """Opens an output, or looks at one that is not there yet; nothing is written.

        Args:
            output: local or remote folder.
            settings: JSON values that decide outcomes besides arm, task, seed and policy.
            policy: identity of the policy under test; None while no episode of it is to be added.

        Raises:
            ConfigError: it holds another evaluation, or one of an earlier version.
        """
        self.rows: dict[str, dict[str, Any]] = {}
        """Unit -> row, as of the last `refresh`."""
        self.faults: dict[str, list[dict[str, Any]]] = {}
        """Unit -> what went wrong with its simulators, in order."""
        self._output, self._settings, self._policy = output, dict(settings), policy
        old = next((n for n in storage.names(self._path(EPISODES)) if _OLD.fullmatch(n)), None)
        if old:
            raise ConfigError(
                f"{output} holds episodes of an earlier version ({EPISODES}/{old}), which name neither their policy nor "
                "their settings. Choose another output, or delete that folder."
            )
        check_bound(output, SETTINGS, self._settings)
        if policy is not None:
            self.set_policy(policy)

    def set_policy(self, policy: Mapping[str, Any]) -> None:
        """Says whose episodes are to be added, where that was not known yet.

        Raises:
            ConfigError: the output holds those of another policy.
        """
        check_bound(self._output, POLICY, policy)
        self._policy = policy

    def unit(self, arm: str, task: str, seed: int) -> str:
        """The name of an episode.

        Args:
            arm: policy under test.
            task: of the benchmark.
            seed: of the initial state.
        """
        policy = self._policy if arm == _ARM_OF_THE_POLICY else None
        return unit_digest(self._settings, policy, arm, task, seed)

    def refresh(self) -> None:
        """Reads what has been added since the last time, by whomever."""
        known = {f"{unit}-{number}" for unit, found in self.faults.items() for number in range(len(found))}
        for match, content in self._new(FAULTS, _FAULT, lambda m: f"{m[1]}-{m[2]}" not in known):
            self.faults.setdefault(match[1], []).append(content)
        for match, content in self._new(EPISODES, _ROW, lambda m: m[1] not in self.rows):
            self.rows[match[1]] = content

    def look_up(self, unit: str) -> dict[str, Any] | None:
        """The row of an episode, by whomever it was finished and however recently; None where there is none."""
        if unit not in self.rows and not storage.exists(self._path(EPISODES, f"{unit}.json")):
            return None
        return self._stored(unit)

    def add(self, finished: Finished) -> dict[str, Any]:
        """Stores an episode, unless it is there.

        Returns: its row as stored, with `unit`, and `video` and `steps_file` relative to the output or None.

        Raises:
            ConfigError: the output has become that of another evaluation, or the benchmark is another installation.
            StorageError: it cannot be written.
        """
        row = dict(finished.row)
        arm, task, seed = row["arm"], row["task"], row["seed"]
        unit = row["unit"] = self.unit(arm, task, seed)
        if (there := self.look_up(unit)) is not None:
            return there
        bind(self._output, SETTINGS, self._settings)
        if arm == _ARM_OF_THE_POLICY:
            assert self._policy is not None, "episodes of a policy need its identity"
            bind(self._output, POLICY, self._policy)
        if finished.protocol is not None:
            bind(self._output, PROTOCOL, finished.protocol)
        row["video"] = row["steps_file"] = None
        if finished.video:
            folder = re.sub(r"[^\w.-]+", "-", task, flags=re.ASCII).strip(".")[:80] or "task"
            row["video"] = f"{VIDEOS}/{arm}/{folder}/{seed}-{unit[:8]}.mp4"
            storage.write_bytes(self._path(row["video"]), finished.video)
        if finished.steps:
            content = hashlib.sha256(finished.steps).hexdigest()[:16]
            row["steps_file"] = f"{STEPS}/{unit}-{content}.parquet"
            create_bytes(self._path(row["steps_file"]), finished.steps)
        create_bytes(self._path(EPISODES, f"{unit}.json"), json.dumps(row).encode())
        return self._stored(unit)

    def add_fault(self, arm: str, task: str, seed: int, fault: Mapping[str, Any]) -> int:
        """Stores that a simulator did not survive a try of an episode.

        Args:
            arm: policy under test.
            task: of the benchmark.
            seed: of the initial state.
            fault: kind, message, place; JSON values.

        Returns: the tries of that episode that have failed, this one included.
        """
        unit = self.unit(arm, task, seed)
        found = self.faults.setdefault(unit, [])
        content = json.dumps({**fault, "arm": arm, "task": task, "seed": seed})
        while not create_bytes(self._path(FAULTS, f"{unit}-{len(found)}.json"), content.encode()):
            # Another driver's, from the time when it had the unit.
            found.append(read_json(self._path(FAULTS, f"{unit}-{len(found)}.json")))
        found.append(json.loads(content))
        return len(found)

    def steps(self, row: Mapping[str, Any]) -> pa.Table | None:
        """The steps of an episode, see `store.steps.SCHEMA`; None where none were kept."""
        return unpack_steps(storage.read_bytes(self._path(row["steps_file"]))) if row["steps_file"] else None

    def _stored(self, unit: str) -> dict[str, Any]:
        if unit not in self.rows:
            self.rows[unit] = read_json(self._path(EPISODES, f"{unit}.json"))
        return self.rows[unit]

    def _new(
        self, folder: str, pattern: re.Pattern[str], is_new: Callable[[re.Match[str]], bool]
    ) -> list[tuple[re.Match[str], dict[str, Any]]]:
        """(match of the name, content) of new files, in order of their names."""
        matches = filter(None, map(pattern.fullmatch, storage.names(self._path(folder))))
        new = sorted(filter(is_new, matches), key=lambda m: (m[1], int(m[2]) if m.re.groups > 1 else 0))
        read = side_by_side(
            lambda match: read_json(self._path(folder, match[0])),
            new,
            remote=storage.is_remote(self._output),
        )
        return list(read)

    def _path(self, *parts: str) -> str:
        return storage.join(self._output, *parts)
