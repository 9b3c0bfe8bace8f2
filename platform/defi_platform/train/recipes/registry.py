"""The registry of model kinds: a further model is a recipe class and its entry here."""

from __future__ import annotations

from typing import Final

from defi_platform.config import PretrainConfig
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.recipes.video_base import VideoRecipe

RECIPES: Final[dict[str, type[VideoRecipe]]] = {
    recipe.kind: recipe for recipe in (GFDMRecipe, GIDMRecipe, PolicyRecipe)
}
"""Recipe class by kind, which is the name in status lines, checkpoints and model folders."""

PRETRAININGS: Final = {
    kind: recipe for kind, recipe in RECIPES.items() if recipe.config_type is PretrainConfig
}
"""The kinds among them that learn from video alone."""
