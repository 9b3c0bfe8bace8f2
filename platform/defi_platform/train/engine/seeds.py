"""Seeds of every random draw of a run, as pure functions of their purpose.

A sample's own noise depends on (seed, sample number) alone; dropout depends on (seed, first sample number of
the micro-batch). Neither knows the rank, the world size or how often the run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

# Spread far apart, so that the streams of noise, dropout and validation never meet.
_PURPOSES = {"noise": 1, "dropout": 2, "validation": 3, "weights": 4, "restart": 5, "media": 6, "probe": 7}


def seed_of(seed: int, purpose: str, number: int = 0) -> int:
    """A 63-bit seed for one purpose of a run.

    Args:
        seed: of the run.
        purpose: one of "noise", "dropout", "validation", "weights", "restart", "media" and "probe".
        number: of the sample or step that the seed is for.
    """
    text = f"{seed}/{_PURPOSES[purpose]}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def sample_generators(
    seed: int, purpose: str, samples: Sequence[int], device: torch.device | str = "cpu"
) -> list[torch.Generator]:
    """One generator per sample number.

    Args:
        seed: of the run.
        purpose: see `seed_of`.
        samples: sample numbers.
        device: that draws; a CPU's numbers are the same on every machine, a GPU's are others.
    """
    return [torch.Generator(device).manual_seed(seed_of(seed, purpose, k)) for k in samples]
