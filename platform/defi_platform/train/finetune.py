"""Stage II: the fused policy on labelled episodes."""

from __future__ import annotations

from defi_platform.config import FinetuneConfig
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.run import RunSummary, train


def finetune(config: FinetuneConfig) -> RunSummary:
    """Fine-tunes the policy made of two pretrained model folders; goes on where an earlier attempt was.

    Raises: UserError.
    """
    return train(config.ray, [PolicyRecipe(config)])[0]
