"""Tensors that an action chunk depends on: all that comes from the host, before anything is computed on the device."""

# B batch, V views, T frames, S text tokens, H actions of a chunk, A action dims

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from defi_models.inputs.checks import check_finite
from defi_models.rng import Generators, check_generators, normal

if TYPE_CHECKING:
    from defi_models.policy import DeFIPolicy


class ActInputs(NamedTuple):
    """Inputs of `DeFIPolicy.act_on`, on the policy's device.

    From here on nothing waits for the host or comes from it, and shapes depend on the batch size (and, where texts are
    not padded, on the longest text) alone.
    """

    images: Tensor
    """uint8 (B, V, height, width, 3)."""
    words: Tensor
    """(B, S, dim) token states of GFDM's text encoder."""
    gidm_words: Tensor
    """(B, S', dim) token states of GIDM's text encoder."""
    gidm_mask: Tensor | None
    """bool (B, S'), True = a token of the text; None where all are."""
    goal: Tensor
    """(B, goal_dim) text vectors."""
    noise: Tensor
    """float32 (B * V, T, C, h, w), standard normal, of GFDM's denoising step."""
    start: Tensor
    """float32 (B, H, A), standard normal, of the action head."""
    proprio: Tensor | None
    """float (B, P), raw units; None where the policy reads none."""

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are there, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


@torch.no_grad()
def gather(policy: DeFIPolicy, observation: Mapping[str, Any], generator: Generators = None) -> ActInputs:
    """Inputs of a chunk on the policy's device: checked, texts encoded, noise drawn.

    Args:
        policy: whose inputs they are.
        observation: as `DeFIPolicy.act` takes it.
        generator: see `Generators`; each sample draws GFDM's noise of all views, then the action head's.

    Raises:
        InputError: For what does not fit the policy, or proprioception on the CPU that is not finite.
    """
    images, text, proprio = policy.observed.checked(observation)
    check_generators(generator, len(images))
    if proprio is not None:
        check_finite("proprio", proprio)
        proprio = proprio.to(policy.device)
    head, words = policy.adapter.head.config, policy.gidm_text.states(text)
    return ActInputs(
        images=images.to(policy.device),
        words=policy.gfdm.text_encoder.states(text).states,
        gidm_words=words.states,
        gidm_mask=words.key_mask,
        goal=policy.gfdm.text_encoder.goal(text),
        noise=policy.feature_noise(len(images), generator),
        start=normal((len(images), head.chunk, head.action_dim), generator, policy.device),
        proprio=proprio,
    )
