"""Identity of an evaluation: the settings and the policy that decide its episodes, and the names that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from defi_platform import storage
from defi_platform.errors import ConfigError
from defi_platform.evaluate.store.whole_json import read_json
from defi_platform.storage.exclusive import create_bytes

FOLDER = "identity"
"""Below the output: settings.json, policy.json and protocol.json, each written with the first episode that has it."""

SETTINGS, POLICY, PROTOCOL = "settings", "policy", "protocol"
_HEX = 32
_MEANS = {
    SETTINGS: "an evaluation with other settings",
    POLICY: "an evaluation of another policy",
    PROTOCOL: "episodes of another installation of the benchmark",
}


def policy_identity(greeting: Mapping[str, Any], policy_name: str | None, source: str) -> dict[str, Any]:
    """Identity of a policy: its digest, and how it is computed; for servers that send no digest its name.

    An identical copy in another folder or behind another url has the same identity.

    Args:
        greeting: of the server, or of the folder's policy as a server would greet.
        policy_name: as the config has it; decides only where there is no digest.
        source: url or folder, for the message.

    Raises:
        ConfigError: there is neither digest nor name.
    """
    if digest := greeting.get("policy_digest"):
        inference = greeting.get("inference")
        return {"digest": str(digest), **({"inference": inference} if inference else {})}
    if not policy_name:
        raise ConfigError(
            f"the policy server at {source} names no policy_digest, so one policy's episodes would mix with "
            "another's. Name the policy yourself, weights and settings included: policy_name=NAME."
        )
    return {"name": policy_name}


def unit_digest(
    settings: Mapping[str, Any], policy: Mapping[str, Any] | None, arm: str, task: str, seed: int
) -> str:
    """The name of an episode in the store: 32 hex digits.

    Args:
        settings: that decide outcomes.
        policy: its identity, for the arm "policy" alone; None for the others, which do not depend on it.
        arm: policy under test.
        task: of the benchmark; any characters.
        seed: of the initial state.
    """
    content = json.dumps([settings, policy, arm, task, seed], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:_HEX]


def check_bound(output: str, part: str, wanted: Mapping[str, Any]) -> bool:
    """Compares one part of the identity with what an output holds.

    Args:
        output: of the evaluation.
        part: SETTINGS, POLICY or PROTOCOL.
        wanted: JSON values of this run.

    Returns: whether the output holds that part already.

    Raises:
        ConfigError: it holds another one; names every difference.
    """
    path = _path(output, part)
    if not storage.exists(path):
        return False
    found = read_json(path)
    # Through JSON, as the stored ones went: tuples are lists there.
    changed = list(differences(json.loads(json.dumps(wanted)), found))
    if changed:
        raise ConfigError(
            f"{output} holds {_MEANS[part]} ({'; '.join(changed)}). "
            "Choose another output, or delete that folder."
        )
    return True


def bind(output: str, part: str, wanted: Mapping[str, Any]) -> None:
    """Writes one part of the identity into an output, or compares it with what is there; see `check_bound`.

    Args:
        output: of the evaluation.
        part: SETTINGS, POLICY or PROTOCOL.
        wanted: JSON values of this run.

    Raises:
        ConfigError: it holds another one, perhaps since a moment ago.
    """
    if not check_bound(output, part, wanted):
        create_bytes(_path(output, part), json.dumps(wanted, indent=1, sort_keys=True).encode())
        check_bound(output, part, wanted)  # another driver may have been faster


def stored(output: str, part: str) -> dict[str, Any]:
    """One part of the identity that an output holds; {} where it holds none.

    Args:
        output: of the evaluation.
        part: SETTINGS, POLICY or PROTOCOL.
    """
    path = _path(output, part)
    return read_json(path) if storage.exists(path) else {}


def differences(wanted: Mapping[str, Any], found: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Yields what differs between two mappings of JSON values, in words.

    Args:
        wanted: of this run.
        found: as stored.
        at: name of the mapping they stand in.
    """
    for key in sorted(wanted.keys() | found.keys()):
        here, there = wanted.get(key), found.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from differences(here, there, f"{at}{key}.")
        elif here != there:
            yield f"{at}{key}: {there} there, {here} here"


def _path(output: str, part: str) -> str:
    return storage.join(output, FOLDER, f"{part}.json")
