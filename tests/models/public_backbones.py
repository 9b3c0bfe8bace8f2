"""Small random backbones in the public layouts, saved by the libraries themselves."""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ["open", "close", "press", "the", "drawer", "button", "red", "window"]


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def save_clip(folder: Path, width: int = 32) -> Path:
    """A whole CLIP, vision tower included, as it is published."""
    text = {"vocab_size": 11, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {
        "num_attention_heads": 4,
        "projection_dim": 24,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """A whole T5, decoder included, as it is published."""
    config = transformers.T5Config(
        vocab_size=11, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_dino(folder: Path) -> Path:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=70
    )
    model = transformers.Dinov2WithRegistersModel(config)
    torch.nn.init.normal_(model.embeddings.register_tokens)
    model.save_pretrained(folder)
    return folder


def save_svd(folder: Path) -> Path:
    """UNet, VAE and scheduler of a Stable Video Diffusion pipeline."""
    diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32, 64, 64),
        num_attention_heads=(2, 2, 4, 4),
        layers_per_block=1,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        cross_attention_dim=64,
        num_frames=4,
    ).save_pretrained(folder / "unet")
    diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder / "vae")
    diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    return folder
