"""Classes of diffusers, loaded when a model needs one."""

from __future__ import annotations

from typing import Any

import torch


def diffusers_class(name: str) -> Any:
    """A class of diffusers by its name.

    Loading one takes seconds, and GFDM alone needs any: who imports the models for GIDM, or for a config, does not
    wait for it.
    """
    # Models are also built on the meta device; what modules make while they load must not end up there.
    with torch.device("cpu"):
        import diffusers

        return getattr(diffusers, name)
