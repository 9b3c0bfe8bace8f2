from __future__ import annotations

import torch
import torch.nn.functional as F

from defi_models.cost.operations import Operations

META = torch.device("meta")


def test_a_product_counts_its_operations_and_the_bytes_that_it_moves() -> None:
    a, b = torch.zeros(4, 8, device=META), torch.zeros(8, 16, device=META)
    with Operations() as seen:
        (a @ b).view(2, 2, 16).transpose(0, 1)  # views launch nothing
    assert (seen.kernels, seen.flops) == (1, 2 * 4 * 8 * 16)
    assert seen.product_bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) and seen.other_bytes == 0


def test_what_is_broadcast_is_read_once() -> None:
    with Operations() as seen:
        torch.zeros(1, 8, device=META).expand(100, 8) + torch.zeros(100, 8, device=META)
    assert seen.by_name["add"] == 1
    zeros = 4 * 8 + 4 * 800
    assert seen.other_bytes == zeros + 4 * (8 + 800 + 800)


def test_attention_is_one_kernel_on_meta_as_on_the_cpu() -> None:
    found = {}
    for device in ("cpu", "meta"):
        q, k = torch.zeros(2, 3, 5, 8, device=device), torch.zeros(2, 3, 7, 8, device=device)
        with Operations() as seen:
            F.scaled_dot_product_attention(q, k, k)
        found[device] = seen.kernels, seen.flops
    assert found["meta"] == found["cpu"] == (1, 2 * 2 * 3 * 5 * 7 * (8 + 8))
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


def test_waits_and_uploads_are_seen() -> None:
    x = torch.zeros(3)
    with Operations() as seen:
        float(x.sum())
        bool((x > 0).any())
        x.nonzero()
        torch.tensor([1.0, 2.0])
    assert (seen.waits, seen.uploads) == (3, 1)
    with Operations() as seen:
        torch.zeros(3, device="cpu").to(META)
        torch.as_tensor([1.0], device=META)
        torch.full((2,), 3.0, device=META)
    assert (seen.waits, seen.uploads) == (0, 2)
