"""Loading of a policy folder for serving, and the description of the policy for its clients."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.inputs.action_contract import UNKNOWN
from defi_models.policy import DeFIPolicy
from defi_models.pretrained.configuration import to_mapping
from defi_platform import storage
from defi_platform.config import ServedActingConfig
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.serve.acting import acting_of, with_config
from defi_platform.serve.observation import PolicySpec, camera_names

log = logging.getLogger("ray.serve")


def load_policy(folder: str, acting: ServedActingConfig | None = None) -> DeFIPolicy:
    """The policy, ready for batches of observations of independent clients.

    Args:
        folder: local or remote.
        acting: settings of acting in place of the folder's.

    Raises:
        CheckpointError: the folder is absent, partial, truncated or of another model.
        ConfigError: settings of acting do not fit it.
    """
    try:
        with storage.local_copy(folder) as local:
            policy = DeFIPolicy.from_pretrained(Path(local))
            served = acting_of(Path(local))
    except ModelFolderError as error:
        raise CheckpointError(str(error)) from error
    if not served.said:
        log.warning("policy folder %s does not say how it acts; it acts as before: %s", folder, served.text())
    served = with_config(served, acting or ServedActingConfig())
    chunk = policy.config.adapter.head.chunk
    if served.execute_steps > chunk:
        raise ConfigError(f"acting.execute_steps is {served.execute_steps}; a chunk has {chunk} actions.")
    try:
        policy.set_acting(served.acting)
    except ConfigurationError as error:
        raise ConfigError(str(error)) from error
    policy.contract = replace(policy.contract, execute_steps=served.execute_steps)
    # The reference masks a sample's text tokens with the mask of another sample of its batch. Alone, as the
    # reference acts, a sample meets its own mask; in a batch of independent clients it must as well.
    policy.adapter.latent_actions.mask_each_text()
    return policy


def policy_spec(policy: DeFIPolicy, folder: str) -> PolicySpec:
    """Inputs and outputs of a policy; `folder` is its name among clients."""
    config = policy.config
    head = config.adapter.head
    layout = policy.contract.state if head.proprio_dim else None
    return PolicySpec(
        policy=folder,
        preset=config.preset,
        cameras=camera_names(config.cameras, config.views),
        image_size=(config.gfdm.height, config.gfdm.width),
        state_dim=head.proprio_dim if layout is None else layout.raw_dim,
        state=layout,
        action_dim=head.action_dim,
        chunk=head.chunk,
        action=action_terms(policy),
        acting=to_mapping(policy.acting),
        action_scale=tuple(policy.action_normalizer.scale.tolist()),
    )


def action_terms(policy: DeFIPolicy) -> dict[str, Any]:
    """The meaning of the policy's actions as plain values; what nobody has said is "unknown"."""
    said = policy.contract.as_mapping()
    terms = {key: value or UNKNOWN for key, value in said.items() if key != "state"}
    terms["execute_steps"] = policy.contract.execute_steps or policy.config.adapter.head.chunk
    ranges = policy.statistics.action if policy.statistics else None
    return terms | {
        "min": UNKNOWN if ranges is None else list(ranges.min),
        "max": UNKNOWN if ranges is None else list(ranges.max),
    }
