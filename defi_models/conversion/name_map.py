"""Tensor names of the released checkpoints and ours: one table, read in both directions.

A rule maps a released name to one of our tensors, or to three where the released one is a fused query, key
and value projection. Rules are patterns with `*` for block numbers and `**` for any rest; both carry over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LATENT_ACTIONS = {
    "lang_proj": "text_projection",
    "encoder.ffn.*": "stem.*",
    "encoder.transformer_blocks.*.norm1": "blocks.*.spatial_norm",
    "encoder.transformer_blocks.*.spatial_attn.to_q": "blocks.*.spatial.query",
    "encoder.transformer_blocks.*.spatial_attn.to_k": "blocks.*.spatial.key",
    "encoder.transformer_blocks.*.spatial_attn.to_v": "blocks.*.spatial.value",
    "encoder.transformer_blocks.*.spatial_attn.to_out.0": "blocks.*.spatial.out",
    "encoder.transformer_blocks.*.norm2": "blocks.*.temporal_norm",
    "encoder.transformer_blocks.*.temporal_attn.to_q": "blocks.*.temporal.query",
    "encoder.transformer_blocks.*.temporal_attn.to_k": "blocks.*.temporal.key",
    "encoder.transformer_blocks.*.temporal_attn.to_v": "blocks.*.temporal.value",
    "encoder.transformer_blocks.*.temporal_attn.to_out.0": "blocks.*.temporal.out",
    "encoder.transformer_blocks.*.norm3": "blocks.*.ffn_norm",
    "encoder.transformer_blocks.*.ffn.*": "blocks.*.ffn.*",
    "to_codebook": "to_latent",
    "vq.codebook": "codebook",
    "action_up": "from_latent",
}

_DECODER = {
    "patch_up": "patch_projection",
    "decoder.ffn.*": "stem.*",
    "decoder.transformer_blocks.*.norm1": "blocks.*.spatial_norm",
    "decoder.transformer_blocks.*.spatial_attn.to_q": "blocks.*.spatial.query",
    "decoder.transformer_blocks.*.spatial_attn.to_k": "blocks.*.spatial.key",
    "decoder.transformer_blocks.*.spatial_attn.to_v": "blocks.*.spatial.value",
    "decoder.transformer_blocks.*.spatial_attn.to_out.0": "blocks.*.spatial.out",
    "decoder.transformer_blocks.*.norm2": "blocks.*.ffn_norm",
    "decoder.transformer_blocks.*.ffn.*": "blocks.*.ffn.*",
    "decoder.out": "out",
}

_VIDEO_FORMER = {
    "goal_emb.*": "projection.*",
    "layers.*.0.norm_media": "layers.*.feature_norm",
    "layers.*.0.norm_latents": "layers.*.query_norm",
    "layers.*.0.to_q": "layers.*.resample.query",
    "layers.*.0.to_k": "layers.*.resample.key",
    "layers.*.0.to_v": "layers.*.resample.value",
    "layers.*.0.to_out": "layers.*.resample.out",
    "layers.*.1.qkv": "layers.*.temporal.query|layers.*.temporal.key|layers.*.temporal.value",
    "layers.*.1.proj": "layers.*.temporal.out",
    "layers.*.2.*": "layers.*.ffn.*",
    "norm": "norm",
}

_HEAD = {
    "lang_emb.*": "goal_embedding.*",
    "tok_emb": "video_embedding",
    "tok_emb_token": "latent_action_embedding",
    "action_emb": "action_embedding",
    "action_pred": "action_out",
    "sigma_emb.1": "sigma_embedding.0",
    "sigma_emb.3": "sigma_embedding.2",
    "encoder.blocks.*.ln_1": "context_blocks.*.attention_norm",
    "encoder.blocks.*.ln_2": "context_blocks.*.mlp_norm",
    "encoder.blocks.*.attn.query": "context_blocks.*.attention.query",
    "encoder.blocks.*.attn.key": "context_blocks.*.attention.key",
    "encoder.blocks.*.attn.value": "context_blocks.*.attention.value",
    "encoder.blocks.*.attn.c_proj": "context_blocks.*.attention.out",
    "encoder.blocks.*.mlp.c_fc": "context_blocks.*.mlp.0",
    "encoder.blocks.*.mlp.c_proj": "context_blocks.*.mlp.2",
    "encoder.ln": "context_norm",
    "decoder.blocks.*.ln_1": "action_blocks.*.attention_norm",
    "decoder.blocks.*.ln_2": "action_blocks.*.mlp_norm",
    "decoder.blocks.*.ln3": "action_blocks.*.cross_norm",
    "decoder.blocks.*.attn.query": "action_blocks.*.attention.query",
    "decoder.blocks.*.attn.key": "action_blocks.*.attention.key",
    "decoder.blocks.*.attn.value": "action_blocks.*.attention.value",
    "decoder.blocks.*.attn.c_proj": "action_blocks.*.attention.out",
    "decoder.blocks.*.cross_att.query": "action_blocks.*.cross_attention.query",
    "decoder.blocks.*.cross_att.key": "action_blocks.*.cross_attention.key",
    "decoder.blocks.*.cross_att.value": "action_blocks.*.cross_attention.value",
    "decoder.blocks.*.cross_att.c_proj": "action_blocks.*.cross_attention.out",
    "decoder.blocks.*.mlp.c_fc": "action_blocks.*.mlp.0",
    "decoder.blocks.*.mlp.c_proj": "action_blocks.*.mlp.2",
    "decoder.blocks.*.adaLN_zero.modulation.1": "action_blocks.*.modulation",
    "decoder.ln": "action_norm",
}

# DINOv2 as its authors publish it (the release froze it into the checkpoint), and as transformers names it.
_DINO = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.*.norm1": "encoder.layer.*.norm1",
    "blocks.*.attn.qkv": "|".join(f"encoder.layer.*.attention.{part}_proj" for part in "qkv"),
    "blocks.*.attn.proj": "encoder.layer.*.attention.o_proj",
    "blocks.*.norm2": "encoder.layer.*.norm2",
    "blocks.*.mlp.fc1": "encoder.layer.*.mlp.fc1",
    "blocks.*.mlp.fc2": "encoder.layer.*.mlp.fc2",
    "norm": "layernorm",
}

_DINO_TENSORS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.*.ls1.gamma": "encoder.layer.*.layer_scale1.lambda1",
    "blocks.*.ls2.gamma": "encoder.layer.*.layer_scale2.lambda1",
}

_PROPRIO = {"proprio_emb.*": "proprio_embedding.*"}


@dataclass(frozen=True)
class Rule:
    """One released tensor and ours."""

    released: str
    """Pattern of the released name."""
    ours: tuple[str, ...]
    """Patterns of our names, more than one where the released tensor is a fused projection."""
    squeeze: int = 0
    """Leading dimensions of size one that the released tensor has and ours has not."""


def _module_rules(table: Mapping[str, str], released: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{released}{theirs}.{part}", tuple(f"{ours}{own}.{part}" for own in owns.split("|")))
        for theirs, owns in table.items()
        for part in ("weight", "bias")
    ]


def gidm_rules() -> list[Rule]:
    """Rules of the latent action model; our names are those of `GIDM`."""
    return [
        Rule("action_latent", ("encoder.queries",), squeeze=2),
        *_module_rules(_LATENT_ACTIONS, "", "encoder."),
        *_module_rules(_DECODER, "", "decoder."),
        *_module_rules(_DINO, "dino_encoder.", "patch_encoder.model."),
        *(
            Rule(f"dino_encoder.{theirs}", (f"patch_encoder.model.{own}",))
            for theirs, own in _DINO_TENSORS.items()
        ),
        Rule("text_encoder.**", ("text_encoder.model.**",)),
    ]


def policy_rules(*, reads_proprio: bool) -> list[Rule]:
    """Rules of the fused policy; our names are those of `PolicyAdapter`, and `gidm_text` of the policy.

    `proprio_emb.*` is present in released checkpoints but unused, so it maps only where our policy has a
    proprioception input.
    """
    head = _HEAD | (_PROPRIO if reads_proprio else {})
    return [
        Rule("time_pos_emb", ("projector.time_embedding",)),
        Rule("Video_Former.latents", ("video_former.queries",)),
        Rule("Video_Former.time_pos_emb", ("video_former.time_embedding",)),
        Rule("lam.action_latent", ("latent_actions.queries",), squeeze=2),
        *_module_rules({"goal_emb.*": "projector.projection.*"}, "", ""),
        *_module_rules(_LATENT_ACTIONS, "lam.", "latent_actions."),
        *_module_rules(_VIDEO_FORMER, "Video_Former.", "video_former."),
        *_module_rules(head, "model.inner_model.", "head."),
        Rule("lam.text_encoder.**", ("gidm_text.model.**",)),
    ]


@dataclass
class Translation:
    """The tensors of a state dict under other names."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Under their new names."""
    used: list[tuple[str, str]] = field(default_factory=list)
    """(source name, target name)"""
    unexpected_keys: list[str] = field(default_factory=list)
    """Source names that no rule takes."""


def to_ours(released: Mapping[str, Tensor], rules: Iterable[Rule]) -> Translation:
    """Released tensors under our names.

    Args:
        released: the released state dict.
        rules: the rules of its kind.

    Returns:
        Our tensors, and the names that no rule takes.
    """
    patterns = [(_pattern(rule.released), rule) for rule in rules]
    result = Translation()
    for name, tensor in released.items():
        found = _match(name, patterns)
        if found is None:
            result.unexpected_keys.append(name)
            continue
        rule, numbers = found
        targets = [_fill(own, numbers) for own in rule.ours]
        value = tensor.reshape(tensor.shape[rule.squeeze :]) if rule.squeeze else tensor
        for target, part in zip(targets, value.chunk(len(targets)), strict=True):
            result.tensors[target] = part.contiguous()
            result.used.append((name, target))
    return result


def to_released(ours: Mapping[str, Tensor], rules: Iterable[Rule]) -> Translation:
    """Our tensors under the released names.

    Args:
        ours: our state dict.
        rules: the rules of its kind.

    Returns:
        The released tensors, and the names that no rule takes.
    """
    patterns = [(_pattern(rule.ours[0]), rule) for rule in rules]
    result = Translation()
    taken = set()
    for name in ours:
        found = _match(name, patterns)
        if found is None:
            continue
        rule, numbers = found
        sources = [_fill(own, numbers) for own in rule.ours]
        if any(source not in ours for source in sources):
            continue
        value = torch.cat([ours[source] for source in sources]) if len(sources) > 1 else ours[name]
        target = _fill(rule.released, numbers)
        result.tensors[target] = value.reshape((1,) * rule.squeeze + tuple(value.shape))
        result.used.extend((source, target) for source in sources)
        taken.update(sources)
    result.unexpected_keys = [name for name in ours if name not in taken]
    return result


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)"))


def _match(name: str, patterns: list[tuple[re.Pattern[str], Rule]]) -> tuple[Rule, tuple[str, ...]] | None:
    for pattern, rule in patterns:
        if found := pattern.fullmatch(name):
            return rule, found.groups()
    return None


def _fill(template: str, numbers: tuple[str, ...]) -> str:
    for number in numbers:
        template = template.replace("**" if "**" in template else "*", number, 1)
    return template
