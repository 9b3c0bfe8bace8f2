"""From a policy folder to a policy that answers, and to what clients must know of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from defi_models.errors import ModelFolderError
from defi_models.policy import DeFIPolicy
from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.serve.observation import ANY_CAMERA, PolicySpec


def load_policy(folder: str) -> DeFIPolicy:
    """The policy, ready to answer batches of observations that have nothing to do with each other.

    Raises: CheckpointError when the folder is absent, partial, truncated or of another model.
    """
    try:
        with storage.local_copy(folder) as place:
            policy = DeFIPolicy.from_pretrained(Path(place))
    except ModelFolderError as error:
        raise CheckpointError(str(error)) from error
    # The reference masks a sample's text tokens with the mask of another sample of its batch. Alone, as the
    # reference acts, a sample meets its own mask; in a batch of strangers it must as well.
    encoder = policy.adapter.latent_actions
    encoder.config = replace(encoder.config, tiled_text_mask=False)
    return policy


def policy_spec(config: DeFIPolicy.Config, folder: str) -> PolicySpec:
    """What the policy takes and gives; `folder` is the name it goes by."""
    head = config.adapter.head
    unnamed = (ANY_CAMERA,) if config.views == 1 else tuple(str(view) for view in range(config.views))
    return PolicySpec(
        policy=folder,
        preset=config.preset,
        cameras=config.cameras or unnamed,
        image_size=(config.gfdm.height, config.gfdm.width),
        state_dim=head.proprio_dim,
        action_dim=head.action_dim,
        chunk=head.chunk,
    )
