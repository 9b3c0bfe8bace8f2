"""The policy folder that is served: checked cheaply before Serve starts, loaded in the replica."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from defi_models.configuration import from_mapping
from defi_models.errors import ConfigurationError, ModelFolderError
from defi_models.folder import CONFIG_FILE, WEIGHTS_FILE, read_header
from defi_models.policy import DeFIPolicy
from defi_platform import storage
from defi_platform.errors import CheckpointError
from defi_platform.serve.observation import ANY_CAMERA, PolicySpec

_FIX = "A policy folder is what jobs/finetune_policy.py leaves in <output>/model."


def check_policy_folder(folder: str) -> None:
    """Reads the config and the weight file's table of contents, not the weights.

    Raises: CheckpointError when the folder is absent, partial, truncated or of another model.
    """
    if storage.is_remote(folder):
        if not storage.exists(storage.join(folder, CONFIG_FILE)):
            raise CheckpointError(f"policy folder {folder} has no {CONFIG_FILE}. {_FIX}")
        return
    place = storage.local_path(folder)
    weights = place / WEIGHTS_FILE
    try:
        header = read_header(place)
        if header["model"] != DeFIPolicy.kind:
            raise CheckpointError(
                f"{place} holds a '{header['model']}' model; only a '{DeFIPolicy.kind}' can be served. {_FIX}"
            )
        from_mapping(DeFIPolicy.Config, header["config"], f"{place / CONFIG_FILE}: config")
        if not weights.is_file():
            raise CheckpointError(f"{place} has no {WEIGHTS_FILE}, so it is not complete. {_FIX}")
        with safe_open(weights, "pt"):
            pass  # opening compares the table of contents with the file's length
    except (ModelFolderError, ConfigurationError) as error:
        raise CheckpointError(f"{error} {_FIX}") from error
    except (SafetensorError, OSError) as error:
        size = weights.stat().st_size
        raise CheckpointError(
            f"{weights} ({size:,} bytes) is damaged or cut short: {error}. Copy the folder again."
        ) from error


def load_policy(folder: str) -> DeFIPolicy:
    """The policy, ready to answer batches of observations that have nothing to do with each other.

    Raises: CheckpointError when the folder is absent, partial, truncated or of another model.
    """
    try:
        with storage.local_copy(folder) as place:
            policy = DeFIPolicy.from_pretrained(Path(place))
    except ModelFolderError as error:
        raise CheckpointError(f"{error} {_FIX}") from error
    # The reference masks a sample's text tokens with the mask of another sample of its batch. Alone, as the
    # reference acts, a sample meets its own mask; in a batch of strangers it must as well.
    encoder = policy.adapter.latent_actions
    encoder.config = replace(encoder.config, tiled_text_mask=False)
    return policy


def spec_of(config: DeFIPolicy.Config, folder: str) -> PolicySpec:
    """What the policy takes and gives; `folder` is the name it goes by."""
    head = config.adapter.head
    named = tuple(getattr(config, "cameras", ()))
    unnamed = (ANY_CAMERA,) if config.views == 1 else tuple(str(view) for view in range(config.views))
    return PolicySpec(
        policy=folder,
        preset=config.preset,
        cameras=named or unnamed,
        image_size=(config.gfdm.height, config.gfdm.width),
        state_dim=head.proprio_dim,
        action_dim=head.action_dim,
        chunk=head.chunk,
    )
