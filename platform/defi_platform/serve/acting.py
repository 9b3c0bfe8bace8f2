"""Settings with which a served policy acts: those of its folder, and those that the configuration puts in their place."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.inputs.acting import Acting
from defi_models.pretrained.configuration import to_mapping
from defi_models.pretrained.folder import read_header
from defi_models.pretrained.side_files import acting_with, read_acting, read_contract
from defi_platform.config import InferenceConfig, ServedActingConfig
from defi_platform.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ServedActing:
    """Settings with which a policy acts."""

    acting: Acting
    execute_steps: int
    """Actions of a chunk that a client is asked to carry out."""
    said: bool = True
    """The folder says how its policy acts; False for one that was written before folders did."""

    def text(self) -> str:
        """One line about them."""
        return f"{self.acting.text()}; carry out {self.execute_steps} of a chunk"


def acting_of(folder: Path) -> ServedActing:
    """The settings of a policy folder; where it says nothing, those that older versions acted with.

    Args:
        folder: local.

    Raises:
        CheckpointError: the folder is damaged or of another version.
    """
    try:
        head = read_header(folder)["config"]["adapter"]["head"]
        acting, contract = read_acting(folder), read_contract(folder)
        before = Acting(steps=head.get("sampling_steps", 10), sigma_min=head.get("sigma_min", 0.001))
        said = contract.execute_steps if contract else None
        return ServedActing(
            acting=acting or before, execute_steps=said or head["chunk"], said=acting is not None
        )
    except (ModelFolderError, ConfigurationError) as error:
        raise CheckpointError(str(error)) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"policy folder {folder} was written by another version: its action head has no {error}."
        ) from error


def with_config(own: ServedActing, config: ServedActingConfig) -> ServedActing:
    """The settings of a folder with those of the configuration over them.

    Args:
        own: of the folder.
        config: `acting` of ServeConfig; what is null there stays.

    Raises:
        ConfigError: a value cannot be, naming its key.
    """
    changes: dict[str, Any] = {key: value for key, value in asdict(config).items() if value is not None}
    execute_steps = changes.pop("execute_steps", own.execute_steps)
    if execute_steps < 1:
        raise ConfigError(f"acting.execute_steps is {execute_steps}; write 1 or more actions, or null.")
    try:
        acting = acting_with(own.acting, changes)
    except ConfigurationError as error:
        raise ConfigError(str(error)) from error
    return ServedActing(acting=acting, execute_steps=execute_steps, said=own.said)


def inference_of(model: InferenceConfig) -> dict[str, Any]:
    """The settings that change the last bits of actions, or more, where weights and observations are the same."""
    compiled = "package" if model.package else model.compile
    return {"dtype": model.dtype, "compile": compiled, "deterministic": model.deterministic}


def differences(own: ServedActing, served: ServedActing) -> str:
    """Settings that a folder is served with and does not say itself, as JSON; "" for none."""
    plain = [{**to_mapping(each.acting), "execute_steps": each.execute_steps} for each in (own, served)]
    found = {key: value for key, value in plain[1].items() if plain[0][key] != value}
    return json.dumps(found, sort_keys=True) if found else ""
