"""Stage I: GFDM and GIDM, one of them or both side by side."""

from __future__ import annotations

from defi_platform.config import PretrainBothConfig, PretrainConfig
from defi_platform.errors import ConfigError
from defi_platform.train.recipe import Recipe
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.run import RunSummary, train

RECIPES: dict[str, type[GFDMRecipe] | type[GIDMRecipe]] = {"gfdm": GFDMRecipe, "gidm": GIDMRecipe}


def pretrain(kind: str, config: PretrainConfig) -> RunSummary:
    """Pretrains GFDM or GIDM on action-free video; goes on where an earlier attempt was.

    Args:
        kind: gfdm | gidm.
    Raises: UserError.
    """
    if kind not in RECIPES:
        raise ConfigError(f"there is no pretraining '{kind}'; choose {' or '.join(RECIPES)}.")
    return train(config.ray, [RECIPES[kind](config)])[0]


def pretrain_both(config: PretrainBothConfig) -> dict[str, RunSummary]:
    """Pretrains both at the same time on one cluster, each with its own resources.

    One that fails leaves the other alone. Raises: TrainingFailed at the end, naming it.
    """
    recipes: list[Recipe] = [GFDMRecipe(config.gfdm), GIDMRecipe(config.gidm)]
    return dict(zip(("gfdm", "gidm"), train(config.ray, recipes), strict=True))
