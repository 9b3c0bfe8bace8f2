"""The diffusion transformer that turns video and latent action tokens into a chunk of actions."""

# B batch, A action dims, H actions of a chunk, M context tokens, D width

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from defi_models.edm import ddim, karras_preconditioning, log_logistic, log_spaced_sigmas
from defi_models.errors import InputError
from defi_models.layers.attention import Attention
from defi_models.layers.unet_features import COMPILED_SHAPES
from defi_models.rng import Generators, normal


def _mlp(dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, 4 * dim, bias=False),
        nn.GELU(),
        nn.Linear(4 * dim, dim, bias=False),
        nn.Dropout(dropout),
    )


def _embedding(in_dim: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class ContextBlock(nn.Module):
    """Pre-norm self-attention and MLP over the context tokens; not causal."""

    def __init__(self, config: ActionHead.Config) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = _head_attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, bias=False)
        self.mlp = _mlp(config.dim, config.mlp_dropout)

    def forward(self, x: Tensor, wanted: int | None = None) -> Tensor:
        """Context tokens (B, M, D) -> the first `wanted` of them (all where None), (B, wanted, D)."""
        normed = self.attention_norm(x)
        x = x[:, :wanted] + self.attention(normed[:, :wanted], normed)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class ActionBlock(nn.Module):
    """AdaLN-modulated causal self-attention and MLP around plain cross-attention to the context."""

    def __init__(self, config: ActionHead.Config) -> None:
        super().__init__()
        self.causal_cross_attention = config.causal_cross_attention
        self.modulation = nn.Linear(config.dim, 6 * config.dim)
        self.attention_norm = nn.LayerNorm(config.dim, bias=False)
        self.attention = _head_attention(config)
        self.cross_norm = nn.LayerNorm(config.dim)
        self.cross_attention = _head_attention(config)
        self.mlp_norm = nn.LayerNorm(config.dim, bias=False)
        self.mlp = _mlp(config.dim, config.mlp_dropout)

    def forward(self, y: Tensor, memory: tuple[Tensor, Tensor], modulation: Tensor) -> Tensor:
        """Action tokens after the block.

        Args:
            y: (B, H, D) action tokens.
            memory: keys and values of the context for `cross_attention`; the same in every denoising step.
            modulation: (B, 1, 6 D) or (1, 1, 6 D), of the noise level.

        Returns:
            (B, H, D).
        """
        # shift + x * scale without the usual + 1, as released
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        modulated = torch.addcmul(shift_a, self.attention_norm(y), scale_a)
        y = torch.addcmul(y, gate_a, self.attention(modulated, causal=True))
        y = y + self.cross_attention.attend(self.cross_norm(y), *memory, causal=self.causal_cross_attention)
        modulated = torch.addcmul(shift_m, self.mlp_norm(y), scale_m)
        return torch.addcmul(y, gate_m, self.mlp(modulated))


class ActionHead(nn.Module):
    """EDM diffusion over normalised action chunks, conditioned on goal, video and latent action tokens.

    Source: arXiv 2604.16391, section 3.3 and the released CALVIN configuration.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config:
        """Sizes, dropout and noise schedule; the defaults are the paper's."""

        action_dim: int = 7
        """Numbers of an action."""
        chunk: int = 10
        """Actions predicted at once."""
        proprio_dim: int = 0
        """Width of proprioception, one more context token; 0, as released: not read."""
        dim: int = 384
        """Width of the tokens."""
        heads: int = 8
        """Attention heads."""
        context_blocks: int = 4
        """Blocks over the context tokens."""
        action_blocks: int = 4
        """Blocks over the action tokens."""
        attention_dropout: float = 0.3
        """On attention weights."""
        residual_dropout: float = 0.1
        """On the output of attention."""
        mlp_dropout: float = 0.05
        """On the output of the MLP."""
        weight_std: float | None = 0.02
        """Standard deviation of fresh weights of linear layers, their biases start at 0; None: PyTorch's own."""
        causal_cross_attention: bool = False
        """Reproduce the released decoder, whose cross-attention is causal too (top-left aligned): action i
        sees only the first i + 1 context tokens. The released weights need it; new ones do better without."""
        action_positions: bool = False
        """A learnable embedding per action of the chunk; released weights have none."""
        sigma_data: float = 0.5
        """Standard deviation of normalised actions."""
        sigma_min: float = 0.001
        """Smallest noise level of training; acting has its own, where nothing is said the same."""
        sigma_max: float = 80.0
        """Largest noise level, in training and sampling."""
        train_sigma_location: float = math.log(0.5)
        """Median of ln(sigma) in training, before the truncation."""
        train_sigma_scale: float = 0.5
        """Scale of the log-logistic ln(sigma) in training."""
        sampling_steps: int = 10
        """Denoising steps of acting."""

    def __init__(self, config: Config, video_dim: int, latent_action_dim: int, goal_dim: int) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.goal_embedding = _embedding(goal_dim, dim)
        self.video_embedding = nn.Linear(video_dim, dim)
        self.latent_action_embedding = nn.Linear(latent_action_dim, dim)
        self.proprio_embedding = _embedding(config.proprio_dim, dim) if config.proprio_dim else None
        self.action_embedding = nn.Linear(config.action_dim, dim)
        self.action_position = (
            nn.Parameter(torch.randn(config.chunk, dim) * 0.02) if config.action_positions else None
        )
        self.sigma_embedding = nn.Sequential(nn.Linear(dim, 2 * dim), nn.Mish(), nn.Linear(2 * dim, dim))
        self.context_blocks = nn.ModuleList(ContextBlock(config) for _ in range(config.context_blocks))
        self.context_norm = nn.LayerNorm(dim, bias=False)
        self.action_blocks = nn.ModuleList(ActionBlock(config) for _ in range(config.action_blocks))
        self.action_norm = nn.LayerNorm(dim, bias=False)
        self.action_out = nn.Linear(dim, config.action_dim)
        if config.weight_std is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=config.weight_std)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def context(self, goal: Tensor, video: Tensor, latent_actions: Tensor, proprio: Tensor | None) -> Tensor:
        """Encodes what the actions depend on, once for all denoising steps.

        Args:
            goal: (B, goal_dim) text vector.
            video: (B, N, video_dim) Video-Former tokens.
            latent_actions: (B, K, latent_action_dim).
            proprio: (B, proprio_dim), normalised, where the config has one.

        Returns:
            (B, M, D), M = 1 + N + K (+ 1), or the first H of them where a causal cross-attention sees no others.

        Raises:
            InputError: When proprioception is read and not given.
        """
        tokens = [self.goal_embedding(goal)[:, None], self.video_embedding(video)]
        tokens.append(self.latent_action_embedding(latent_actions))
        if self.proprio_embedding is not None:
            if proprio is None:
                raise InputError(
                    f"proprio: got None; expected float (B, {self.config.proprio_dim}); this policy reads proprioception."
                )
            tokens.append(self.proprio_embedding(proprio)[:, None])
        x = torch.cat(tokens, dim=1)
        seen = self.config.chunk if self.config.causal_cross_attention else None
        for number, block in enumerate(self.context_blocks, start=1):
            x = block(x, seen if number == len(self.context_blocks) else None)
        context: Tensor = self.context_norm(x)
        return context

    def forward(self, actions: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
        """Output of the raw network.

        Args:
            actions: (B, H, A) noisy actions, already times c_in.
            sigma: float32 (B,) noise levels.
            context: (B, M, D), as `context` encodes it.

        Returns:
            (B, H, A) in the network's dtype.
        """
        return self._output(actions, self._memory(context), self._modulations(sigma, actions.dtype))

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` of each block, in place: training and every denoising step of acting run them."""
        options = {"recompile_limit": COMPILED_SHAPES} | options
        for block in [*self.context_blocks, *self.action_blocks]:
            block.compile(**options)

    def _memory(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the context, by block."""
        return [block.cross_attention.keys_and_values(context) for block in self._blocks()]

    def _modulations(self, sigma: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """(n, 1, 6 D) of each block, for float32 (n,) noise levels."""
        level = nn.functional.silu(self.sigma_embedding(self._sigma_features(sigma).to(dtype)))[:, None]
        return [block.modulation(level) for block in self._blocks()]

    def _blocks(self) -> list[ActionBlock]:
        return cast(list[ActionBlock], list(self.action_blocks))

    def _output(
        self, actions: Tensor, memory: Sequence[tuple[Tensor, Tensor]], modulations: Sequence[Tensor]
    ) -> Tensor:
        y = self.action_embedding(actions)
        if self.action_position is not None:
            y = y + self.action_position
        for block, read, modulation in zip(self.action_blocks, memory, modulations, strict=True):
            y = block(y, read, modulation)
        output: Tensor = self.action_out(self.action_norm(y))
        return output

    def loss(
        self,
        context: Tensor,
        actions: Tensor,
        mask: Tensor | None = None,
        *,
        sigma: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """EDM loss of normalised action chunks.

        Args:
            context: (B, M, D), as `context` encodes it.
            actions: float32 (B, H, A), normalised.
            mask: bool (B, H), False = padding that does not count.
            sigma: float32 (B,) noise levels.
            noise: float32 (B, H, A), standard normal.

        Returns:
            The loss, a float32 scalar, and the network's output (B, H, A).
        """
        level = sigma[:, None, None]
        c_skip, c_out, c_in = karras_preconditioning(level, self.config.sigma_data)
        noisy = actions + level * noise
        output = self((c_in * noisy).to(context.dtype), sigma, context).float()
        error = (output - (actions - c_skip * noisy) / c_out).square().mean(-1)  # (B, H)
        if mask is None:
            return error.mean(), output
        # per sample first, so that the mean over workers does not depend on where the padding falls
        counted = mask.to(error.dtype)
        per_sample = (error * counted).sum(1) / counted.sum(1).clamp_min(1)
        return per_sample.mean(), output

    def draw(self, batch: int, generator: Generators, device: torch.device) -> tuple[Tensor, Tensor]:
        """Random training noise.

        Args:
            batch: number of samples.
            generator: see `Generators`; each sample draws its level, then its noise.
            device: where the result lies.

        Returns:
            Levels float32 (batch,) and standard normal noise float32 (batch, H, A).
        """
        config = self.config
        sigma = log_logistic(
            batch,
            generator,
            device,
            location=config.train_sigma_location,
            scale=config.train_sigma_scale,
            low=config.sigma_min,
            high=config.sigma_max,
        )
        return sigma, normal((batch, config.chunk, config.action_dim), generator, device)

    def sigmas(
        self, device: torch.device, steps: int | None = None, sigma_min: float | None = None
    ) -> Tensor:
        """Noise levels of sampling.

        Args:
            device: where the result lies.
            steps: denoising steps; None: the config's.
            sigma_min: level of the last step; None: the config's.

        Returns:
            float32 (steps + 1,), falling, the last one 0.
        """
        config = self.config
        low = config.sigma_min if sigma_min is None else sigma_min
        return log_spaced_sigmas(steps or config.sampling_steps, low, config.sigma_max, device)

    def sample(self, context: Tensor, start: Tensor, sigmas: Tensor | None = None) -> Tensor:
        """Normalised actions, by DDIM.

        Args:
            context: (B, M, D), as `context` encodes it.
            start: float32 (B, H, A), noise already times sigma_max.
            sigmas: float32 (steps + 1,), noise levels; None: the config's.

        Returns:
            float32 (B, H, A).
        """
        levels = self.sigmas(start.device) if sigmas is None else sigmas
        # neither the context nor the noise levels depend on the actions: both are read once for all steps
        memory, modulations = self._memory(context), self._modulations(levels[:-1], context.dtype)

        def network(step: int, scaled: Tensor) -> Tensor:
            own = [each[step : step + 1] for each in modulations]
            return self._output(scaled.to(context.dtype), memory, own).float()

        return ddim(network, start, levels, karras_preconditioning(levels[:-1], self.config.sigma_data))

    def _sigma_features(self, sigma: Tensor) -> Tensor:
        half = self.config.dim // 2
        index = torch.arange(half, device=sigma.device, dtype=torch.float32)
        frequency = torch.exp(index * (-math.log(10000.0) / (half - 1)))
        angles = (sigma.float().log() / 4)[:, None] * frequency
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _head_attention(config: ActionHead.Config) -> Attention:
    return Attention(
        config.dim,
        config.heads,
        qkv_bias=True,
        out_bias=False,
        dropout=config.attention_dropout,
        out_dropout=config.residual_dropout,
    )
