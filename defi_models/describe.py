"""Cost of a preset before anything is allocated: parts, parameters, memory, floating-point operations.

    python -m defi_models.describe PRESET [--world-sizes 1 8 64] [--recompute] [--device h100]

Models are built on PyTorch's meta device and run there: operations are counted by PyTorch's own counter and
activations are those that autograd would keep for the backward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from defi_models import presets
from defi_models.cost import roofline
from defi_models.cost.operations import Operations
from defi_models.encoders.dino import DinoPatches
from defi_models.errors import ConfigurationError
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.memory import training_memory
from defi_models.policy import DeFIPolicy
from defi_models.rng import normal

META = torch.device("meta")
ModelConfig = GFDM.Config | GIDM.Config | DeFIPolicy.Config
_TEXT_TOKENS = 20
_BACKWARD_OVER_FORWARD = 2
"""Every matrix product of the forward pass has two in the backward pass."""
_GIB = 2**30


@dataclass(frozen=True)
class Part:
    """One child module."""

    name: str
    """Attribute of the model."""
    parameters: int
    """Number of parameters, frozen ones included."""
    trained: int
    """Number of parameters that train."""


@dataclass(frozen=True)
class Cost:
    """One model of a preset."""

    kind: str
    """gfdm, gidm or policy."""
    parts: list[Part]
    """The model's children; the policy's adapter by its parts."""
    activation_bytes: int
    """Kept for the backward pass of one sample, in bf16."""
    forward_flops: dict[str, int]
    """Per sample, by part of the training step."""
    trained_flops: int
    """Share of `forward_flops` that a backward pass follows."""
    chunk: dict[str, Operations]
    """Operations of an action chunk in bf16, by part; empty for models that do not act."""

    @property
    def chunk_flops(self) -> dict[str, int]:
        """Per action chunk, by part."""
        return {name: seen.flops for name, seen in self.chunk.items()}

    @property
    def parameters(self) -> int:
        """Number of parameters, frozen ones included."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained(self) -> int:
        """Number of parameters that train."""
        return sum(part.trained for part in self.parts)

    @property
    def training_flops(self) -> int:
        """Forward and backward of one sample."""
        return sum(self.forward_flops.values()) + _BACKWARD_OVER_FORWARD * self.trained_flops

    def state_bytes(self, zero_stage: int, world_size: int) -> int:
        """Weights, gradients and optimiser state on each worker, bf16 with a float32 AdamW."""
        return training_memory(
            self.parameters, self.trained, zero_stage=zero_stage, world_size=world_size
        ).device


def describe(preset: str, *, recompute: bool = False) -> list[Cost]:
    """The costs of GFDM, GIDM and the policy of a preset.

    Args:
        preset: nano, small or paper.
        recompute: count activations with gradient checkpointing on.

    Returns:
        Three costs, in that order.

    Raises:
        ConfigurationError: For an unknown preset, naming the nearest.
    """
    gfdm = presets.gfdm(preset)
    configs: tuple[ModelConfig, ...] = (gfdm, presets.gidm(preset), presets.policy(preset))
    return [cost_of(config, recompute=recompute, height=gfdm.height) for config in configs]


def cost_of(
    config: ModelConfig, *, recompute: bool = False, height: int = 256, trainable: str | None = None
) -> Cost:
    """The cost of one model.

    Args:
        config: of a GFDM, a GIDM or a policy.
        recompute: count activations with gradient checkpointing on.
        height: of the square frames that GIDM's weight-free patches see; others have a size of their own.
        trainable: parts of the policy that train, as `DeFIPolicy.set_trainable` names them.
    """
    classes: dict[type, Any] = {kind.Config: kind for kind in (GFDM, GIDM, DeFIPolicy)}
    with META:
        model: Any = classes[type(config)](config).to(torch.bfloat16)
    model.to(META)  # diffusers builds its mixing factors on the CPU whatever the default device
    model.eval()  # dropout and usage counts change neither size nor operations
    model.set_recompute(recompute)
    if isinstance(model, GFDM):
        return _gfdm_cost(model)
    if isinstance(model, GIDM):
        return _gidm_cost(model, height)
    if trainable:
        model.set_trainable(trainable)
    return _policy_cost(model)


def _gfdm_cost(model: GFDM) -> Cost:
    config = model.config
    frames = _zeros(1, config.frames, config.height, config.width, 3, dtype=torch.uint8)
    latents = _zeros(1, config.frames, config.codec.channels, *config.latent_size)
    text = _zeros(1, _TEXT_TOKENS, config.text.dim)

    def train() -> Tensor:
        return model.loss(latents, text, sigma_normal=_zeros(1), noise=torch.zeros_like(latents))[0]

    forward = {"codec": _flops(lambda: model.encode_frames(frames)), "unet": _flops(train)}
    return Cost("gfdm", _parts(model), _activations(model, train), forward, forward["unet"], {})


def _gidm_cost(model: GIDM, height: int) -> Cost:
    patches = model.config.patches
    # weight-free patches have no size of their own: they see what GFDM sees
    size = patches.image_size if isinstance(patches, DinoPatches.Config) else height
    frames = _zeros(1, 2, size, size, 3, dtype=torch.uint8)
    features = model.encode_frames(frames)
    text, mask = _zeros(1, _TEXT_TOKENS, model.config.text.dim), _zeros(1, _TEXT_TOKENS, dtype=torch.bool)

    def train() -> Tensor:
        return model.loss(features, text, mask).loss

    forward = {"patches": _flops(lambda: model.encode_frames(frames)), "encoder + decoder": _flops(train)}
    return Cost("gidm", _parts(model), _activations(model, train), forward, forward["encoder + decoder"], {})


def _policy_cost(model: DeFIPolicy) -> Cost:
    gfdm, adapter, views = model.gfdm, model.adapter, model.config.views
    config, head = gfdm.config, adapter.head.config
    images = _zeros(views, 3, config.height, config.width)
    condition = gfdm.codec.encode(images)
    words = _zeros(views, _TEXT_TOKENS, config.text.dim)
    noise = _zeros(views, config.frames, *condition.shape[1:])
    text = _zeros(1, _TEXT_TOKENS, model.config.gidm_text.dim, dtype=model.dtype)
    mask = _zeros(1, _TEXT_TOKENS, dtype=torch.bool)
    goal = _zeros(1, config.text.goal_dim, dtype=model.dtype)
    proprio = _zeros(1, head.proprio_dim, dtype=model.dtype) if head.proprio_dim else None
    grid = config.feature_size
    features = _zeros(1, views, config.frames, grid[0] * grid[1], config.feature_dim, dtype=model.dtype)
    sigma, start = _zeros(1), normal((1, head.chunk, head.action_dim), None, META)

    def context() -> Tensor:
        return adapter.context(adapter.perceive(features, text, mask), goal, proprio)

    def train() -> Tensor:
        return adapter.head.loss(context(), start, sigma=sigma, noise=start)[0]

    seen = adapter.perceive(features, text, mask)
    shared = {
        "codec": _flops(lambda: gfdm.codec.encode(images)),
        "gfdm, one step": _flops(lambda: gfdm.features_from_latents(condition, words, noise)),
    }
    trained = _flops(train)
    acting = {
        "codec": _operations(lambda: gfdm.codec.encode(images)),
        "gfdm, one step": _operations(lambda: gfdm.features_from_latents(condition, words[:1], noise)),
        "gidm + video-former": _operations(lambda: adapter.perceive(features, text, mask)),
        "action head": _operations(
            lambda: adapter.head.sample(adapter.context(seen, goal, proprio), start),
        ),
    }
    return Cost(
        "policy", _parts(model), _activations(model, train), shared | {"adapter": trained}, trained, acting
    )


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=META)


def _flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _operations(run: Callable[[], Any]) -> Operations:
    with torch.no_grad(), Operations() as seen:
        run()
    return seen


def _activations(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps, each storage once, without the weights themselves."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        identity = tensor.untyped_storage()._cdata
        if identity not in weights:
            kept[identity] = tensor  # held, so that its storage's address is not given out again
        return tensor

    with _fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FusedAttention(torch.autograd.Function):
    """Stand-in for a fused kernel, which keeps its inputs and its output.

    The meta device has none: it would take attention apart and keep every matrix of logits.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    original = F.scaled_dot_product_attention
    apply: Callable[..., Tensor] = _FusedAttention.apply
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _parts(model: nn.Module) -> list[Part]:
    children = dict(model.named_children())
    if "adapter" in children:
        inner = children.pop("adapter")
        children |= {f"adapter.{name}": child for name, child in inner.named_children()}
    parts = []
    for name, child in children.items():
        own = list(child.parameters())
        trained = sum(p.numel() for p in own if p.requires_grad)
        parts.append(Part(name, sum(p.numel() for p in own), trained))
    direct = [p for _, p in model.named_parameters(recurse=False)]
    assert not direct, "every parameter belongs to a part"
    return parts


def render(
    preset: str, costs: Sequence[Cost], world_sizes: Sequence[int], device: roofline.Device | None = None
) -> str:
    """The costs as text.

    Args:
        preset: name of the preset.
        costs: as `describe` returns them.
        world_sizes: numbers of workers, a column each in the table of memory.
        device: whose least times are added; None: none.

    Returns:
        The page that the command prints.
    """
    lines = [f"preset {preset}"]
    for cost in costs:
        lines += ["", f"{cost.kind}: {cost.parameters:,} parameters, {cost.trained:,} trained"]
        lines += [f"  {'part':28}{'parameters':>16}{'trained':>16}"]
        lines += [f"  {part.name:28}{part.parameters:>16,}{part.trained:>16,}" for part in cost.parts]
        lines.append(f"  activations per sample, bf16: {cost.activation_bytes / _GIB:.3f} GiB")
        header = "".join(f"{f'{size} worker(s)':>14}" for size in world_sizes)
        lines.append(f"  {'states per worker, GiB':24}{header}")
        for stage in range(4):
            row = "".join(f"{cost.state_bytes(stage, size) / _GIB:>14.3f}" for size in world_sizes)
            lines.append(f"  {f'ZeRO {stage}':24}{row}")
        lines.append(f"  GFLOP per training sample: {cost.training_flops / 1e9:,.2f}")
        lines += [f"    forward, {name}: {flops / 1e9:,.2f}" for name, flops in cost.forward_flops.items()]
        if cost.chunk_flops:
            lines.append(f"  GFLOP per action chunk: {sum(cost.chunk_flops.values()) / 1e9:,.2f}")
            lines += [f"    {name}: {flops / 1e9:,.2f}" for name, flops in cost.chunk_flops.items()]
        if device:
            step = cost.training_flops / device.flops * 1e3
            lines.append(
                f"  least time of a training sample on one {device.name}, products alone: {step:.2f} ms"
            )
        if device and cost.chunk:
            lines += roofline.table(cost.chunk, device)
    lines += ["", "Text encoders do not count to the operations: each instruction is encoded once and held."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m defi_models.describe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", help="nano | small | paper")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--recompute", action="store_true", help="with gradient checkpointing")
    parser.add_argument("--device", help=f"least times on one: {' | '.join(roofline.DEVICES)}")
    given = parser.parse_args(argv)
    if min(given.world_sizes) < 1:
        parser.error("--world-sizes are at least 1")
    try:
        device = roofline.device(given.device) if given.device else None
        costs = describe(given.preset, recompute=given.recompute)
    except ConfigurationError as error:
        print(f"describe: {error}", file=sys.stderr)
        return 2
    print(render(given.preset, costs, given.world_sizes, device))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
