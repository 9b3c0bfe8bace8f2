"""Export of a run's newest checkpoint."""

from __future__ import annotations

from omegaconf import OmegaConf

from defi_platform import storage
from defi_platform.config import ExportConfig
from defi_platform.config.loader import from_mapping
from defi_platform.config.paths import absolute_paths
from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.export import export_model
from defi_platform.train.driver.run import CONFIG
from defi_platform.train.recipes.registry import RECIPES
from defi_platform.train.worker.run_results import MODEL


def export_run(config: ExportConfig) -> str:
    """Exports the newest checkpoint of a run, complete or not, from the run folder alone.

    Returns: the model folder.
    Raises: CheckpointError when the folder is no run folder or has no checkpoint.
    """
    config = absolute_paths(config)
    settings = storage.join(config.run, CONFIG)
    found = checkpoints.committed(config.run)
    if not found or not storage.exists(settings):
        raise CheckpointError(
            f"{config.run} has no {'checkpoint' if not found else 'config.yaml'}. Is it a run folder (train.output)?"
        )
    kind = found[0].position.model["kind"]
    if kind not in RECIPES:
        raise CheckpointError(f"{config.run} holds a run of kind '{kind}'; there is: {', '.join(RECIPES)}.")
    values = OmegaConf.to_container(OmegaConf.create(storage.read_text(settings)))
    recipe = RECIPES[kind](from_mapping(RECIPES[kind].config_type, values, settings))
    # The run folder may have been moved since.
    recipe.config.train.output = config.run
    target = config.output or storage.join(config.run, MODEL)
    export_model(recipe, target)
    return target
