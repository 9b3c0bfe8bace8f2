"""`train.deterministic`: what it sets and records, and that no operation of the models is without such a kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from in_process import train_here
from torch.utils._python_dispatch import TorchDispatchMode

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_platform.config import PretrainConfig
from defi_platform.train.engine.determinism import CUBLAS, arithmetic, set_determinism
from defi_platform.train.observability.run_card import _arithmetic

WITHOUT_KERNEL = (
    "avg_pool3d", "adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool", "upsample_linear",
    "upsample_bilinear", "upsample_bicubic", "upsample_trilinear", "reflection_pad", "nll_loss", "ctc_loss",
    "embedding_bag", "put_", "histc", "median", "grid_sampler", "cumsum", "scatter_reduce",
)  # fmt: skip
"""Begins of the names of operations that `torch.use_deterministic_algorithms` refuses on CUDA, by its documentation."""


@pytest.fixture
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what `set_determinism` sets."""
    monkeypatch.setenv(CUBLAS, "")
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def test_it_is_set_in_the_worker_and_recorded(
    as_before: None, process_group: None, run_config: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    config = run_config(tmp_path / "plain", steps=1)
    set_determinism(config.train)
    assert not torch.are_deterministic_algorithms_enabled() and not os.environ[CUBLAS]
    config = run_config(tmp_path / "run", steps=1, deterministic=True)
    train_here(tiny.TinyRecipe(config))
    assert torch.are_deterministic_algorithms_enabled() and os.environ[CUBLAS] == ":4096:8"
    (attempt,) = tiny.rows(tmp_path / "run", "attempt")
    assert (attempt["device"], attempt["deterministic"]) == ("CPU", True)
    assert "| arithmetic | deterministic on CPU |" in (tmp_path / "run" / "run_card.md").read_text()


def test_a_gpu_without_it_is_not_called_deterministic(
    as_before: None, run_config: Callable[..., PretrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    plain = arithmetic(run_config(Path("run"), use_gpu=True).train)
    assert plain == {"device": "H100", "deterministic": False}
    train = run_config(Path("run"), use_gpu=True, deterministic=True).train
    set_determinism(train)
    assert arithmetic(train) == {"device": "H100", "deterministic": True}
    words = _arithmetic([{}, plain, plain, arithmetic(train)])
    assert words == "not deterministic (train.deterministic) on H100, then deterministic on H100"


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operation._schema.name.removeprefix("aten::"))
        return operation(*args, **(kwargs or {}))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device="meta")


def test_every_operation_of_a_training_step_has_a_deterministic_kernel() -> None:
    with torch.device("meta"):
        gfdm, gidm = GFDM(presets.gfdm("nano")), GIDM(presets.gidm("nano")).eval()
    gfdm.to("meta")  # diffusers builds its mixing factors on the CPU
    config, operations = gfdm.config, Operations()
    latents = zeros(1, config.frames, config.codec.channels, *config.latent_size)
    with operations:
        text = zeros(1, 20, config.text.dim)
        gfdm.loss(latents, text, sigma_normal=zeros(1), noise=torch.zeros_like(latents))[0].backward()
        features = gidm.encode_frames(zeros(1, 2, 64, 64, 3, dtype=torch.uint8))
        mask = zeros(1, 20, dtype=torch.bool)
        gidm.loss(features, zeros(1, 20, gidm.config.text.dim), mask).loss.backward()
    assert {
        "convolution_backward",
        "upsample_nearest2d_backward",
        "embedding_dense_backward",
    } <= operations.names
    assert not [name for name in operations.names if name.startswith(WITHOUT_KERNEL)]
