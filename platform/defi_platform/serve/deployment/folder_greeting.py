"""The greeting of a policy folder's server as far as its small files say it: nothing is loaded or started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.pretrained.folder import read_header
from defi_models.pretrained.side_files import read_contract
from defi_platform import storage
from defi_platform.config import ServeConfig
from defi_platform.errors import CheckpointError
from defi_platform.serve.acting import inference_of
from defi_platform.serve.deployment.policy_digest import policy_digest
from defi_platform.serve.observation import camera_names


def folder_greeting(config: ServeConfig) -> dict[str, Any]:
    """The entries preset, cameras, state_dim, action_dim, chunk, policy_digest and inference of the greeting.

    Raises:
        CheckpointError: the folder is absent, damaged or of another version.
        ConfigError: settings of acting do not fit it.
    """
    with storage.local_copy(config.policy) as local:
        digest = policy_digest(str(local), config.acting)
        try:
            header, contract = read_header(Path(local))["config"], read_contract(Path(local))
            head = header["adapter"]["head"]
            said = contract.state if contract and head["proprio_dim"] else None
            terms = {
                "preset": header["preset"],
                "cameras": list(camera_names(header["cameras"], header["views"])),
                "state_dim": said.raw_dim if said else head["proprio_dim"],
                "action_dim": head["action_dim"],
                "chunk": head["chunk"],
            }
        except (ModelFolderError, ConfigurationError) as error:
            raise CheckpointError(str(error)) from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"policy folder {config.policy} was written by another version: its config.json has no {error}."
            ) from error
    return {**terms, "policy_digest": digest, "inference": inference_of(config.model)}
