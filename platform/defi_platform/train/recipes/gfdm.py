"""GFDM: clips of video, denoised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defi_platform import storage
from defi_platform.data.sampling.samplers import ClipRule, Rule
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.recipe import EvalReport
from defi_platform.train.recipes.video_base import VideoRecipe, load_folder, model_errors, starting_config
from defi_platform.train.validation.clip_grid import encode_video, image_grid
from defi_platform.train.validation.image_metrics import gmsd, psnr, ssim

if TYPE_CHECKING:
    from defi_models.describe import Cost

SHOWN_CLIPS = 4
SAMPLING_STEPS = 10
QUARTERS = (-0.6745, 0.0, 0.6745)
"""Quartiles of the standard normal draw behind a sample's noise level."""


class GFDMRecipe(VideoRecipe):
    """Forward dynamics pretraining."""

    kind = "gfdm"

    def rule(self) -> Rule:
        data = self.config.data
        return ClipRule(data.clip_frames, data.clip_span_s)

    def cost(self) -> Cost:
        from defi_models import presets
        from defi_models.describe import cost_of
        from defi_models.gfdm import GFDM

        config = starting_config(GFDM, presets.gfdm, self.config.model)
        return cost_of(config, recompute=self.config.train.recompute)

    def build_without_cache(self) -> nn.Module:
        from defi_models import presets
        from defi_models.gfdm import GFDM

        model = self.config.model
        with model_errors():
            built = (
                load_folder(GFDM.from_pretrained, model.init_from)
                if model.init_from
                else GFDM(presets.gfdm(model.preset, **model.overrides))
            )
        data = self.config.data
        for name, given in (("frames", data.clip_frames), ("height", data.height), ("width", data.width)):
            field = "clip_frames" if name == "frames" else name
            self.check_size(name, getattr(built.config, name), given, field)
        return built

    def validation_counts(self, outputs: dict[str, Tensor]) -> Tensor | None:
        """(2, quarters): sums of the samples' losses and their numbers, by noise level."""
        level = torch.bucketize(outputs["sigma_normal"].float().cpu(), torch.tensor(QUARTERS))
        sums = torch.zeros(2, len(QUARTERS) + 1, dtype=torch.float64)
        sums[0].index_add_(0, level, outputs["sample_loss"].double().cpu())
        sums[1].index_add_(0, level, torch.ones(len(level), dtype=torch.float64))
        return sums

    def validation_metrics(self, counts: Tensor) -> dict[str, Any]:
        """Mean loss of the quarters of the training noise, from the least to the most; a quarter that no sample
        drew is left out."""
        return {
            f"loss_noise_quarter_{number}": float(total / samples)
            for number, (total, samples) in enumerate(counts.T, start=1)
            if samples
        }

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        """Three rows per clip: what happened, and what the model makes of the first frame and the text in one
        denoising step (which is what the policy reads) and in SAMPLING_STEPS, as a picture and as a film; PSNR,
        SSIM and GMSD of both, and of predicting that nothing moves."""
        truth = batch["frames"][:SHOWN_CLIPS]
        still = truth[:, :1].expand_as(truth)
        rows, figures = [truth.numpy()], _quality("still", still, truth)
        for steps in (1, SAMPLING_STEPS):
            predicted = model.sample(  # type: ignore[operator]
                truth[:, 0],
                batch["text"][:SHOWN_CLIPS],
                steps=steps,
                generator=sample_generators(
                    self.config.train.seed, "media", batch["sample"][:SHOWN_CLIPS].tolist()
                ),
            ).cpu()
            rows.append(predicted.numpy())
            figures |= _quality(f"{steps}_steps" if steps > 1 else "1_step", predicted, truth)
        media = {
            f"media/clips_{step:06d}.png": image_grid(rows),
            f"media/clips_{step:06d}.mp4": encode_video(rows),
        }
        for name, content in media.items():
            storage.write_bytes(storage.join(folder, name), content)
        return EvalReport(list(media), {"sampled_clips": figures})


def _quality(name: str, predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over the frames that were predicted: all but the first."""
    later, right = predicted[:, 1:], truth[:, 1:]
    return {
        f"psnr_{name}": float(psnr(later, right).mean()),
        f"ssim_{name}": float(ssim(later, right).mean()),
        f"gmsd_{name}": float(gmsd(later, right).mean()),
    }
