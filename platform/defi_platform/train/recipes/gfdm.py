"""Recipe of GFDM: denoising of video clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from defi_platform import storage
from defi_platform.config import ModelConfig
from defi_platform.data.manifest.split import VALIDATION
from defi_platform.data.sampling.samplers import ClipRule, Rule
from defi_platform.train.engine.seeds import sample_generators
from defi_platform.train.recipe import EvalReport
from defi_platform.train.recipes.video_base import VideoRecipe, model_errors, starting_config
from defi_platform.train.validation.clip_grid import encode_video, image_grid
from defi_platform.train.validation.episode_bootstrap import means_with_intervals
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

    @property
    def evaluated_samples(self) -> int:
        """Clips that are sampled."""
        return self.config.train.sampled_clips

    def rule(self) -> Rule:
        """Clips of `data.clip_frames` frames."""
        return ClipRule.of(self.config.data)

    def model_config(self, model: ModelConfig | None = None) -> GFDM.Config:
        """The GFDM that training starts from."""
        from defi_models import presets
        from defi_models.gfdm import GFDM

        config: GFDM.Config = starting_config(GFDM, presets.gfdm, model or self.config.model)
        return config

    def cost(self) -> Cost:
        """Cost of the configured GFDM."""
        from defi_models.describe import cost_of

        config = self.model_config()
        return cost_of(config, recompute=self.config.train.recompute)

    def build_without_cache(self) -> nn.Module:
        """Builds GFDM from its folder or preset."""
        from defi_models import presets
        from defi_models.gfdm import GFDM

        model = self.config.model
        with model_errors():
            built = (
                self.load(GFDM.from_pretrained, "model.init_from", model.init_from)
                if model.init_from
                else GFDM(presets.gfdm(model.preset, **model.overrides))
            )
        self._check_clips(built.config)
        return built

    def check(self) -> None:
        """Checks that clips are cut as the model needs them."""
        self._check_clips(self.model_config())

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

        Writes an image and a video of the first SHOWN_CLIPS with three rows per clip: the truth, the prediction in one
        denoising step (as the policy reads it), and the one in SAMPLING_STEPS. Reports PSNR, SSIM and GMSD of both, of
        predicting that nothing moves, and by how much both differ from that on the same clips.

        Args:
            model: GFDM, in evaluation mode.
            batch: `train.sampled_clips` of the validation split.
            folder: run folder.
            step: of the checkpoint, part of the files' names.
        """
        shown: dict[str, list[Tensor]] = {}
        measured: dict[str, list[Tensor]] = {}
        for first in range(0, len(batch["sample"]), self.config.train.micro_batch):
            part = slice(first, first + self.config.train.micro_batch)
            truth = batch["frames"][part].to(next(model.parameters()).device)
            clips = {"still": truth[:, :1].expand_as(truth)}
            for steps in (1, SAMPLING_STEPS):
                clips[f"{steps}_steps" if steps > 1 else "1_step"] = model.sample(  # type: ignore[operator]
                    truth[:, 0],
                    batch["text"][part],
                    steps=steps,
                    generator=sample_generators(
                        self.config.train.seed, "media", batch["sample"][part].tolist()
                    ),
                )
            for name, predicted in clips.items():
                for measure, of_clips in _quality(predicted, truth).items():
                    measured.setdefault(f"{measure}_{name}", []).append(of_clips)
            if first < SHOWN_CLIPS:
                for name, frames in {"truth": truth, **clips}.items():
                    shown.setdefault(name, []).append(frames[: SHOWN_CLIPS - first].cpu())
        del shown["still"]
        rows = [torch.cat(parts).numpy() for parts in shown.values()]
        media = {
            f"media/clips_{step:06d}.png": image_grid(rows),
            f"media/clips_{step:06d}.mp4": encode_video(rows),
        }
        for name, content in media.items():
            storage.write_bytes(storage.join(folder, name), content)
        figures = clip_figures(
            {name: torch.cat(parts) for name, parts in measured.items()}, self._episodes(batch)
        )
        return EvalReport(list(media), {"sampled_clips": figures})

    def _episodes(self, batch: dict[str, Any]) -> list[str]:
        """Of each sample: cameras and windows of one episode resemble each other."""
        plan, episodes = self.plan(VALIDATION), []
        for k, corpus, video, skipped in zip(
            batch["sample"].tolist(), batch["corpus"], batch["video_id"], batch["skipped"], strict=True
        ):
            # What stands in for a bad video is not what the plan names.
            episode = "" if skipped else plan.manifest.row(plan.resolve(k).row)["episode_id"]
            episodes.append(f"{corpus}/{episode or video}")
        return episodes


def clip_figures(measured: dict[str, Tensor], episodes: Sequence[str]) -> dict[str, Any]:
    """Means over clips, with 95 % intervals over their episodes.

    Args:
        measured: MEASURE_PREDICTION -> (N,) one figure per clip, such as psnr_1_step, with the prediction `still`.
        episodes: of each clip.

    Returns: means by name, those of the differences from a still picture on the same clips (psnr_1_step_over_still)
        among them; `intervals` of all by name, [null, null] where there is one episode alone; numbers of `clips`
        and `episodes`.
    """
    over = {
        f"{name}_over_still": figures - measured[f"{measure}_still"]
        for name, figures in measured.items()
        if (measure := name.partition("_")[0]) and not name.endswith("_still")
    }
    found = means_with_intervals(measured | over, episodes)
    return {
        "clips": len(episodes),
        "episodes": len(set(episodes)),
        **{name: mean for name, (mean, _, _) in found.items()},
        "intervals": {name: [low, high] for name, (_, low, high) in found.items()},
    }


def _quality(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Of each clip, (B,): means over the predicted frames, which are all but the first."""
    predicted, truth = predicted[:, 1:], truth[:, 1:]
    return {measure.__name__: measure(predicted, truth).mean(dim=1).cpu() for measure in (psnr, ssim, gmsd)}
