"""Recipe of GFDM: denoising of video clips."""

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
    from defi_models.gfdm import GFDM

SHOWN_CLIPS = 4
SAMPLING_STEPS = 10
QUARTERS = (-0.6745, 0.0, 0.6745)
"""Quartiles of the standard normal draw behind a sample's noise level."""


class GFDMRecipe(VideoRecipe):
    """Pretraining of the forward dynamics model."""

    kind = "gfdm"
    job = "pretrain_gfdm.py"

    def rule(self) -> Rule:
        """Clips of `data.clip_frames` frames."""
        return ClipRule.of(self.config.data)

    def cost(self) -> Cost:
        """Cost of the configured GFDM."""
        from defi_models import presets
        from defi_models.describe import cost_of
        from defi_models.gfdm import GFDM

        config = starting_config(GFDM, presets.gfdm, self.config.model)
        return cost_of(config, recompute=self.config.train.recompute)

    def build_without_cache(self) -> nn.Module:
        """Builds GFDM from its folder or preset."""
        from defi_models import presets
        from defi_models.gfdm import GFDM

        model = self.config.model
        with model_errors():
            built = (
                load_folder(GFDM.from_pretrained, model.init_from)
                if model.init_from
                else GFDM(presets.gfdm(model.preset, **model.overrides))
            )
        self._check_clips(built.config)
        return built

    def check(self) -> None:
        """Checks that clips are cut as the model needs them."""
        from defi_models import presets
        from defi_models.gfdm import GFDM

        self._check_clips(starting_config(GFDM, presets.gfdm, self.config.model))

    def _check_clips(self, model: GFDM.Config) -> None:
        data = self.config.data
        for name, given in (("frames", data.clip_frames), ("height", data.height), ("width", data.width)):
            field = "clip_frames" if name == "frames" else name
            self.check_size(name, getattr(model, name), given, field)

    def validation_counts(self, outputs: dict[str, Tensor]) -> Tensor | None:
        """(2, quarters): sums of the samples' losses and their numbers, by noise level."""
        level = torch.bucketize(outputs["sigma_normal"].float().cpu(), torch.tensor(QUARTERS))
        sums = torch.zeros(2, len(QUARTERS) + 1, dtype=torch.float64)
        sums[0].index_add_(0, level, outputs["sample_loss"].double().cpu())
        sums[1].index_add_(0, level, torch.ones(len(level), dtype=torch.float64))
        return sums

    def validation_metrics(self, counts: Tensor) -> dict[str, Any]:
        """Mean loss per quarter of the training noise, from the lowest to the highest.

        A quarter without samples has no entry.
        """
        return {
            f"loss_noise_quarter_{number}": float(total / samples)
            for number, (total, samples) in enumerate(counts.T, start=1)
            if samples
        }

    def evaluate(self, model: nn.Module, batch: dict[str, Any], folder: str, step: int) -> EvalReport:
        """Samples clips from their first frames and texts, and compares them with the true ones.

        Writes an image and a video with three rows per clip: the truth, the prediction in one denoising step (as the
        policy reads it), and the one in SAMPLING_STEPS. Reports PSNR, SSIM and GMSD of both, and of predicting that
        nothing moves.

        Args:
            model: GFDM, in evaluation mode.
            batch: of the validation split; the first SHOWN_CLIPS are used.
            folder: run folder.
            step: of the checkpoint, part of the files' names.
        """
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
    """Means over the predicted frames, which are all but the first."""
    predicted, truth = predicted[:, 1:], truth[:, 1:]
    return {
        f"psnr_{name}": float(psnr(predicted, truth).mean()),
        f"ssim_{name}": float(ssim(predicted, truth).mean()),
        f"gmsd_{name}": float(gmsd(predicted, truth).mean()),
    }
