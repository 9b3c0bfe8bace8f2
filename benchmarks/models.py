"""Milliseconds per training step and per action chunk, ours beside the reference's way of computing the same.

    python benchmarks/models.py [--presets nano small] [--repeats 5] [--threads 2] [--batch 2]
    python benchmarks/models.py --presets paper --device cuda --dtype bfloat16 --compile

"the reference's way" is the same weights and the same maths with attention written out (logits, additive mask,
softmax, weighted sum), one camera view after the other, the whole UNet run where only some up-blocks are read,
and the text encoded anew for every call. Each pair is measured alternately in the same process.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from defi_models import presets
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.policy import DeFIPolicy
from defi_models.precision import to_signed_unit

TEXT = "open the drawer and press the button"


def hand_made_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> torch.Tensor:
    """Attention with every intermediate in memory."""
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
        logits = logits.masked_fill(~seen, float("-inf"))
    if attn_mask is not None:
        additive = torch.zeros_like(attn_mask, dtype=logits.dtype)
        logits = logits + (
            additive.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else attn_mask
        )
    return F.dropout(logits.softmax(-1), dropout_p) @ value


@contextlib.contextmanager
def reference_attention() -> Iterator[None]:
    """Every attention of the process written out."""
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = hand_made_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


@torch.no_grad()
def reference_features(policy: DeFIPolicy, images: torch.Tensor, text: list[str]) -> torch.Tensor:
    """GFDM's features view by view, from a UNet that runs to its end."""
    gfdm, views = policy.gfdm, []
    blocks = gfdm.config.feature_blocks
    for view in range(images.shape[1]):
        gfdm.text_encoder.cache.clear()
        read: list[torch.Tensor] = []
        hooks = [
            gfdm.unet.up_blocks[index].register_forward_hook(lambda _m, _a, out, kept=read: kept.append(out))
            for index in blocks
        ]
        condition = gfdm.codec.encode(to_signed_unit(images[:, view].to(gfdm.device)))
        shape = (len(images), gfdm.config.frames, *condition.shape[1:])
        step = gfdm.first_step
        noise = torch.randn(shape, device=gfdm.device) * step.noise_scale * step.input_scale
        x = torch.cat([noise, condition[:, None].expand(shape)], dim=2)
        words = gfdm.encode_text(text).to(gfdm.dtype).repeat(1, 1, gfdm.config.text_copies)
        gfdm.unet_output(x, torch.full((len(x),), step.timestep, device=gfdm.device), words)
        for hook in hooks:
            hook.remove()
        grid = read[-1].shape[-2:]
        joined = torch.cat([F.interpolate(each, size=grid, mode="nearest") for each in read], dim=1)
        views.append(joined.unflatten(0, shape[:2]).flatten(3).transpose(2, 3))
    return torch.stack(views, dim=1)


def measure(runs: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def pair(ours: Callable[[], Any], reference: Callable[[], Any] | None = None) -> dict[str, Callable[[], Any]]:
    """The two sides of a row; without a second one, the reference is ours with attention written out."""

    def written_out() -> Any:
        with reference_attention():
            return (reference or ours)()

    return {"ours": ours, "reference": written_out}


def rows(given: argparse.Namespace, preset: str) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """(what, its two sides) of one preset."""
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    # where the weights are random, a text encoder with a tokenizer is needed that no download provides
    words = {} if preset != "paper" else {"text": {"kind": "hashed", "dim": 512, "goal_dim": 512}}
    t5 = {} if preset != "paper" else {"text": {"kind": "hashed", "dim": 768}}
    gfdm = GFDM(presets.gfdm(preset, **words))
    gidm = GIDM(presets.gidm(preset, **t5))
    policy = DeFIPolicy.fuse(presets.policy(preset), gfdm, gidm)
    config, head = gfdm.config, policy.adapter.head.config
    batch, size = given.batch, (config.height, config.width, 3)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, *size), dtype=torch.uint8, device=device)

    clip = {"frames": pixels(batch, config.frames), "text": [TEXT] * batch}
    frames = {"frames": pixels(batch, 2), "text": [TEXT] * batch}
    images = pixels(batch, policy.config.views)
    labelled = {"images": images, "text": [TEXT] * batch}
    labelled["actions"] = torch.rand(batch, head.chunk, head.action_dim, device=device)
    if head.proprio_dim:
        labelled["proprio"] = torch.rand(batch, head.proprio_dim, device=device)
    one = {name: value[:1] for name, value in labelled.items()}

    def step(model: Any, samples: dict[str, Any]) -> Callable[[], None]:
        def run() -> None:
            model.train()
            model.zero_grad()
            model(samples)["loss"].backward()

        return run

    if not given.acting_only:
        for model in (gfdm, gidm):
            model.to(device=device, dtype=dtype)
        yield f"GFDM training step, batch {batch}", pair(step(gfdm, clip))
        yield f"GIDM training step, batch {batch}", pair(step(gidm, frames))
    del gfdm, gidm
    policy.to(device=device, dtype=dtype)
    ours = policy._view_features

    def as_reference(run: Callable[[], Any]) -> Callable[[], Any]:
        def reference() -> Any:
            policy._view_features = lambda seen, words, noise: reference_features(  # type: ignore[method-assign]
                policy, seen, [TEXT] * len(seen)
            )
            try:
                return run()
            finally:
                policy._view_features = ours  # type: ignore[method-assign]

        return reference

    if not given.acting_only:
        train = step(policy, labelled)
        yield f"policy training step, batch {batch}", pair(train, as_reference(train))
    policy.eval()
    if given.compile:
        policy.compile_parts()
    text = policy.gidm_text.states([TEXT])
    with torch.no_grad():
        features = policy.gfdm_features(images[:1], [TEXT]).to(policy.dtype)
        seen = policy.adapter.perceive(features, text.states.to(policy.dtype), text.mask)
        goal = policy.gfdm.text_encoder.goal([TEXT]).to(policy.dtype)
        proprio = one["proprio"].to(policy.dtype) if head.proprio_dim else None
        context = policy.adapter.context(seen, goal, proprio)
    start = torch.randn(1, head.chunk, head.action_dim, device=device) * head.sigma_max
    yield (
        "chunk: GFDM features",
        pair(
            lambda: policy.gfdm_features(images[:1], [TEXT]),
            lambda: reference_features(policy, images[:1], [TEXT]),
        ),
    )
    perceive = torch.no_grad()(
        lambda: policy.adapter.perceive(features, text.states.to(policy.dtype), text.mask)
    )
    yield "chunk: GIDM + Video-Former", pair(perceive)
    yield "chunk: action head", pair(torch.no_grad()(lambda: policy.adapter.head.sample(context, start)))
    yield "chunk: whole act()", pair(lambda: policy.act(one), as_reference(lambda: policy.act(one)))


def guarded(
    found: Iterator[tuple[str, dict[str, Callable[[], Any]]]],
) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """The rows, then, where what they need cannot be made, one without sides that says why."""
    try:
        yield from found
    except (RuntimeError, ValueError) as error:
        yield f"the rest failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}", {}


def main() -> int:
    """The command line: prints one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["nano", "small"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--minutes", type=float, default=20, help="no row begins after them")
    parser.add_argument("--acting-only", action="store_true", help="leave training steps out")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{name}, {given.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{given.dtype}{', compiled' if given.compile else ''}; median of {given.repeats}"
    )
    print(f"{'preset':8}{'what':34}{'ours ms':>10}{'reference ms':>14}{'ratio':>8}")
    began, failed = time.monotonic(), 0
    for preset in given.presets:
        for what, runs in guarded(rows(given, preset)):
            if not runs:
                failed += 1
                print(f"{preset:8}{what}", flush=True)
                continue
            if time.monotonic() - began > 60 * given.minutes:
                print(f"{preset:8}{what:34}left out: {given.minutes:g} minutes are over", flush=True)
                continue
            # for an unattended run: one row that cannot be, such as for lack of memory, costs no other
            try:
                found = measure(runs, given.repeats, device)
            except (RuntimeError, ValueError) as error:
                failed += 1
                reason = str(error).partition("\n")[0][:80]
                print(f"{preset:8}{what:34}failed: {type(error).__name__}: {reason}", flush=True)
                continue
            ratio = found["reference"] / found["ours"]
            print(
                f"{preset:8}{what:34}{found['ours']:>10.1f}{found['reference']:>14.1f}{ratio:>8.2f}",
                flush=True,
            )
    if device.type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
