"""The loop's check that a stream gives the samples of its shard."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from defi_platform.config import PretrainConfig
from defi_platform.data.sampling.sharding import Shard
from defi_platform.train.worker.loop import Training


class ShiftedRecipe(tiny.TinyRecipe):
    """Trains on the samples one after those that it should."""

    def stream(self, plan: Any, shard: Shard) -> Iterator[dict[str, Any]]:
        shift = 1 if plan == "train" else 0
        moved = dataclasses.replace(shard, start=shard.start + shift, stop=shard.stop + shift)
        return super().stream(plan, moved)  # type: ignore[no-any-return]


def test_a_stream_of_other_samples_stops_the_run(
    process_group: None, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    training = Training(ShiftedRecipe(run_config(tmp_path)), time.time())
    with pytest.raises(RuntimeError, match=r"gave samples \[1, 2\], not \[0, 1\]"):
        training.run()
