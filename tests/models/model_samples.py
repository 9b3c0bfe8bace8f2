"""Batches at test size, the same on every machine."""

from __future__ import annotations

import torch

TEXTS = ["open the drawer", "press the red button on the wall", "close it"]


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    """Smooth random uint8 pictures (..., 64, 64, 3)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(*shape, 3, 5, 5, generator=generator)
    flat = torch.nn.functional.interpolate(coarse.flatten(0, -4), size=(64, 64), mode="bilinear")
    return (flat * 255).to(torch.uint8).movedim(1, -1).unflatten(0, shape)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


def observation(batch: int, views: int = 2) -> dict:
    return {
        "images": pixels(batch, views),
        "text": [TEXTS[index % len(TEXTS)] for index in range(batch)],
        "proprio": torch.rand(batch, 4, generator=torch.Generator().manual_seed(1)),
    }


def labelled(batch: int, views: int = 2) -> dict:
    actions = torch.rand(batch, 10, 4, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return observation(batch, views) | {"actions": actions}


def select(batch: dict, indices: list[int]) -> dict:
    """The samples `indices` of a batch."""
    return {
        key: [value[index] for index in indices] if isinstance(value, list) else value[indices]
        for key, value in batch.items()
    }
