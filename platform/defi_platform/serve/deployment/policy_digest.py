"""The digest of a policy folder and of settings over it: fixes a policy at deployment, in greetings and answers."""

from __future__ import annotations

import hashlib
from pathlib import Path

from defi_models.errors import ModelFolderError
from defi_models.pretrained.digest import folder_digest
from defi_platform import storage
from defi_platform.config import ServedActingConfig
from defi_platform.errors import CheckpointError
from defi_platform.serve.acting import acting_of, differences, with_config


def policy_digest(folder: str, acting: ServedActingConfig | None = None) -> str:
    """`folder_digest` of a policy folder, together with settings over it.

    Args:
        folder: local or remote; a remote one is downloaded for it.
        acting: settings in place of the folder's; those that differ from them are part of the digest.

    Raises:
        CheckpointError: a file cannot be read.
        ConfigError: a setting cannot be.
    """
    with storage.local_copy(folder) as local:
        try:
            found = folder_digest(Path(local))
        except ModelFolderError as error:
            raise CheckpointError(str(error)) from error
        if acting is None or acting == ServedActingConfig():
            return found
        own = acting_of(Path(local))
        other = differences(own, with_config(own, acting))
        return hashlib.sha256(f"{found}:{other}".encode()).hexdigest() if other else found
