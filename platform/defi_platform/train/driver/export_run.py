"""Export of a run as a job of its own."""

from __future__ import annotations

from omegaconf import OmegaConf

from defi_platform import storage
from defi_platform.config import ExportConfig, FinetuneConfig, PretrainConfig
from defi_platform.config.loader import from_mapping
from defi_platform.errors import CheckpointError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.checkpoint.export import export_model
from defi_platform.train.driver.run import CONFIG, MODEL
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe

KINDS = ("gfdm", "gidm", "policy")


def export_run(config: ExportConfig) -> str:
    """Exports the newest checkpoint of a run that may still be going on, from the run folder alone.

    Returns: the model folder. Raises: CheckpointError when the folder is no run folder or has no checkpoint.
    """
    run = storage.absolute(config.run)
    settings = storage.join(run, CONFIG)
    found = checkpoints.committed(run)
    if not found or not storage.exists(settings):
        raise CheckpointError(
            f"{run} has no {'checkpoint' if not found else 'config.yaml'}. Is it a run folder (train.output)?"
        )
    kind = found[0].position.model["kind"]
    if kind not in KINDS:
        raise CheckpointError(f"{run} holds a run of kind '{kind}'; there is: {', '.join(KINDS)}.")
    values = OmegaConf.to_container(OmegaConf.create(storage.read_text(settings)))
    target = storage.absolute(config.output) if config.output else storage.join(run, MODEL)
    recipe: Recipe
    if kind == "policy":
        recipe = PolicyRecipe(from_mapping(FinetuneConfig, values, settings))
    else:
        pretraining = GFDMRecipe if kind == "gfdm" else GIDMRecipe
        recipe = pretraining(from_mapping(PretrainConfig, values, settings))
    # The folder may have been moved since.
    recipe.config.train.output = run
    export_model(recipe, target)
    return target
