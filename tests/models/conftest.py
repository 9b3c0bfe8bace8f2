"""Models at test size: the nano classes, narrower still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.policy import DeFIPolicy


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def gfdm() -> GFDM:
    return GFDM(presets.gfdm("nano", frames=4)).eval()


@pytest.fixture
def gidm() -> GIDM:
    encoder = {"dim": 32, "latent_dim": 8, "blocks": 2}
    return GIDM(presets.gidm("nano", encoder=encoder, decoder={"blocks": 1})).eval()


@pytest.fixture
def policy(gfdm: GFDM, gidm: GIDM) -> DeFIPolicy:
    adapter = {"frame_pair": [0, 2], "video_former": {"dim": 32, "depth": 1}, "head": {"dim": 32}}
    return DeFIPolicy.fuse(presets.policy("nano", views=2, adapter=adapter), gfdm, gidm).eval()
