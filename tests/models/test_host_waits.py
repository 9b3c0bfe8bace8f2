"""Training passes in which the host waits for no result of the device.

On the meta device there are no results: whoever asks for one (`item`, a condition on a tensor, a shape that depends on
values) gets an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.policy import DeFIPolicy

BATCH = 2


def model_and_batch(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if kind == "gfdm":
        gfdm = GFDM(presets.gfdm("nano"))
        size = gfdm.config
        return gfdm, {
            "frames": torch.zeros(BATCH, size.frames, size.height, size.width, 3, dtype=torch.uint8)
        }
    if kind == "gidm":
        return GIDM(presets.gidm("nano")), {"frames": torch.zeros(BATCH, 2, 64, 64, 3, dtype=torch.uint8)}
    policy = DeFIPolicy(presets.policy("nano", cameras=["front"]))
    size, head = policy.config.gfdm, policy.adapter.head.config
    return policy, {
        "images": torch.zeros(BATCH, 1, size.height, size.width, 3, dtype=torch.uint8),
        "proprio": torch.zeros(BATCH, 4),
        "actions": torch.zeros(BATCH, head.chunk, head.action_dim),
        "action_mask": torch.ones(BATCH, head.chunk, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", ["gfdm", "gidm", "policy"])
def test_a_forward_and_a_backward_pass_never_wait_for_the_device(kind: str) -> None:
    model, tensors = model_and_batch(kind)
    model.to("meta").train()
    batch: dict[str, Any] = {name: value.to("meta") for name, value in tensors.items()}
    batch["text"] = ["open the drawer", "push"]
    loss = model(batch, [torch.Generator().manual_seed(k) for k in range(BATCH)])["loss"]
    loss.backward()
    assert loss.is_meta
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters() if p.requires_grad)
    with pytest.raises(RuntimeError):
        loss.item()
