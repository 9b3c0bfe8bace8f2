"""A latent cache in use by a training: its check, and the share of the samples read from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
from torch import nn

from defi_platform.config import DataConfig
from defi_platform.data.latents.cache import CacheLocation, LatentCache, stored_dtype
from defi_platform.data.sampling.plan import Plan


class CacheUse:
    """The cache `data.cache`, checked against the model's encoder and the plan's videos.

    Raises: CacheError when it is of another encoder or of other versions of the videos.
    """

    def __init__(self, model: nn.Module, data: DataConfig, plan: Plan) -> None:
        from defi_platform.data.latents.frame_encoder import FrameEncoder

        assert data.cache is not None
        encoder = FrameEncoder(cast(Any, model))
        info = encoder.info(data.height, data.width, stored_dtype(data.cache))
        self.location = CacheLocation(data.cache, info)
        rows = np.unique(plan.first_rows())
        self._videos, self._of = int(LatentCache(self.location, plan.manifest).holds(rows).sum()), len(rows)
        self._read = self._decoded = 0

    def count(self, batches: Iterable[dict[str, Any]], announce: bool) -> Iterator[dict[str, Any]]:
        """Passes batches through and counts their samples; with `announce`, prints one line first."""
        if announce:
            print(self._announcement(), flush=True)
        for batch in batches:
            cached = self.location.info.column in batch
            self._read += len(batch["sample"]) if cached else 0
            self._decoded += 0 if cached else len(batch["sample"])
            yield batch

    def summary(self) -> dict[str, Any]:
        """Values for the run's summary; samples are those of this rank and attempt."""
        return {
            "folder": self.location.folder,
            "encoder": self.location.info.fingerprint,
            "videos": self._videos,
            "of": self._of,
            "samples_read": self._read,
            "samples_decoded": self._decoded,
        }

    def _announcement(self) -> str:
        info = self.location.info
        rest = (
            ""
            if self._videos == self._of
            else f"; micro-batches with any of the other {self._of - self._videos} are decoded: run "
            "jobs/encode_latents.py to complete it"
        )
        return f"{info.kind}: {info.column} of {self._videos} of {self._of} videos come from {self.location.folder}{rest}"
