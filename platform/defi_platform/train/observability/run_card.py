"""run_card.json and run_card.md of a complete run: settings and versions to repeat it, and what it took."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from defi_platform import storage
from defi_platform.config.loader import to_mapping, to_yaml
from defi_platform.train.observability.code_version import code_version, installed_version
from defi_platform.train.observability.peak_flops import known_peak_tflops
from defi_platform.train.observability.phase_timer import PHASES
from defi_platform.train.recipe import Recipe

JSON, MARKDOWN = "run_card.json", "run_card.md"
PACKAGES = (
    "defi-platform", "ray", "torch", "deepspeed", "diffusers", "transformers", "safetensors", "numpy", "pyarrow",
    "av", "omegaconf", "wandb",
)  # fmt: skip


def write_run_card(
    recipe: Recipe, fingerprint: str, summary: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes both files into the run folder.

    Args:
        recipe: of the run.
        fingerprint: of the plan.
        summary: content of summary.json.
        rows: of metrics.jsonl, all attempts.
    """
    card = make_card(recipe, fingerprint, summary, rows)
    output = recipe.config.train.output
    storage.write_text(storage.join(output, JSON), json.dumps(card, indent=1))
    storage.write_text(
        storage.join(output, MARKDOWN), as_markdown(card, to_yaml(recipe.config), recipe.job or "...")
    )


def make_card(
    recipe: Recipe, fingerprint: str, summary: dict[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """The card as plain values.

    Args:
        recipe: of the run.
        fingerprint: of the plan.
        summary: content of summary.json.
        rows: of metrics.jsonl, all attempts.
    """
    phases = phase_seconds(rows)
    gpu = torch.cuda.get_device_name() if recipe.config.train.use_gpu else None
    return {
        "summary": summary,
        "speed": speed(recipe, summary, rows, phases),
        "phase_s": phases,
        "attempts": [row for row in rows if row["split"] == "attempt"],
        "segments": [asdict(segment) for segment in recipe.segments],
        "skipped_updates": [row for row in rows if row["split"] == "skipped"],
        "gpu_peak_gib": max((row["gpu_peak_bytes"] for row in rows if "gpu_peak_bytes" in row), default=0)
        / 2**30,
        "data_fingerprint": fingerprint,
        "data_version": recipe.data_version(),
        "code": code_version(),
        "packages": {name: installed_version(name) for name in PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpu": platform.processor() or platform.machine(),
            "gpu": gpu,
            "cuda": torch.version.cuda if gpu else None,
        },
        "config": to_mapping(recipe.config),
    }


def phase_seconds(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the whole run by phase, on rank 0; steps that were lost to a death are not among them."""
    total, before = dict.fromkeys(PHASES, 0.0), 0
    for row in rows:
        if row["split"] == "attempt":
            before = row["step"]
        elif row["split"] == "train":
            for phase in PHASES:
                total[phase] += row.get(f"{phase}_s", 0.0) * (row["step"] - before)
            before = row["step"]
    return {phase: round(seconds, 3) for phase, seconds in total.items()}


def speed(
    recipe: Recipe, summary: dict[str, Any], rows: list[dict[str, Any]], phases: dict[str, float]
) -> dict[str, float | None]:
    """Speed of training itself, without start-up, validation and export.

    Args:
        recipe: of the run.
        summary: content of summary.json.
        rows: of metrics.jsonl.
        phases: seconds of the run by phase.

    Returns: samples per second, model TFLOP/s per worker, peak TFLOP/s of a worker's device, model FLOP utilisation
        (MFU) and the share of time spent waiting for data; None where the peak or the cost is not known.
    """
    seconds = sum(phases.values()) - phases["validation"]
    samples = sum(row["split"] == "train" for row in rows) and summary["samples"]
    cost = recipe.cost()
    rate = samples / seconds if seconds else 0.0
    flops = rate * cost.training_flops / summary["workers"] if cost else None
    peak = recipe.config.train.peak_tflops or known_peak_tflops(recipe.config.train)
    return {
        "samples_per_s": rate,
        "model_tflops_per_worker": flops / 1e12 if flops else None,
        "peak_tflops": peak,
        "mfu": flops / (peak * 1e12) if flops and peak else None,
        "data_wait": phases["data"] / seconds if seconds else 0.0,
    }


def as_markdown(card: dict[str, Any], config: str, job: str) -> str:
    """The card as Markdown.

    Args:
        card: see `make_card`.
        config: resolved, as YAML.
        job: script below jobs/ that runs the recipe.
    """
    summary, code, rate = card["summary"], card["code"], card["speed"]
    first, last = summary["validation"]["first"], summary["validation"]["last"]
    commit = (
        f", commit {code['commit']}" + (" with changes" if code["changed"] else "") if code["commit"] else ""
    )
    total = sum(card["phase_s"].values()) or 1.0
    mfu = f"{rate['mfu']:.1%}" if rate["mfu"] is not None else "not known (no peak for this device)"
    tflops = rate["model_tflops_per_worker"]
    rows = [
        ("steps", f"{summary['steps']:,} ({summary['samples']:,} samples)"),
        ("validation loss", f"{first['loss']:.6g} -> {last['loss']:.6g}"),
        *_sampled(summary),
        ("time", f"{summary['wall_s']:.0f} s in {len(card['attempts'])} attempts, workers "
         + ", ".join(str(row["workers"]) for row in card["attempts"])),
        ("samples per second", f"{rate['samples_per_s']:.2f}"),
        ("model TFLOP/s per worker", f"{tflops:.4g}" if tflops else "not known"),
        ("MFU", mfu),
        ("GPU memory, peak", f"{card['gpu_peak_gib']:.2f} GiB" if card["machine"]["gpu"] else "no GPU"),
        ("updates left out", str(len(card["skipped_updates"]))),
        ("checkpoints left out", str(summary["checkpoints_left_out"])),
        ("videos left out", ", ".join(f"{n} {why}" for why, n in summary["skipped"].items()) or "none"),
        ("resumed from", f"step {summary['resumed_from'] or 0}"),
        ("data", f"fingerprint {card['data_fingerprint'] or 'none'}"),
        ("manifest", ", ".join(table for part in card["data_version"].values() for table in part.values()) or "none"),
        ("code", f"defi-platform {code['version']}, source {code['source'][:12]}{commit}"),
        ("machine", ", ".join(f"{k} {v}" for k, v in card["machine"].items() if v)),
        ("arithmetic", _arithmetic(card["attempts"])),
    ]  # fmt: skip
    phases = [
        (phase, f"{seconds:.1f} s", f"{seconds / total:.1%}") for phase, seconds in card["phase_s"].items()
    ]
    return "\n".join(
        [
            f"# {summary['kind']}: run card",
            "",
            *_table(("what", "value"), rows),
            "",
            "## Time by phase",
            "",
            *_table(("phase", "time", "share"), phases),
            "",
            "## Segments",
            "",
            *_table(("from step", "begun by", "steps", "settings"), map(_segment, card["segments"])),
            "",
            "## Packages",
            "",
            ", ".join(f"{name} {version}" for name, version in card["packages"].items() if version),
            "",
            "## To repeat it",
            "",
            f"Save the configuration below as `run.yaml`, check out the code above, and run "
            f"`python jobs/{job} --config run.yaml`."
            + (" Its segments have to be run one after the other." if len(card["segments"]) > 1 else ""),
            "",
            "```yaml",
            config.rstrip(),
            "```",
            "",
        ]
    )


def _sampled(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Picture quality of the clips that a GFDM run sampled, with 95 % intervals over episodes."""
    clips = summary.get("sampled_clips")
    if not clips:
        return []

    def text(name: str) -> str:
        low, high = clips["intervals"][name]
        return f"{clips[name]:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")

    return [
        (
            f"sampled clips: {clips['clips']} of {clips['episodes']} episodes, in 1 step",
            f"PSNR {text('psnr_1_step')} dB, over a still picture {text('psnr_1_step_over_still')} dB; "
            f"SSIM {text('ssim_1_step')}, over it {text('ssim_1_step_over_still')}",
        )
    ]


def _arithmetic(attempts: Iterable[dict[str, Any]]) -> str:
    """Devices of the attempts and whether each computed deterministically; earlier versions noted neither."""
    kinds = dict.fromkeys((row["device"], row["deterministic"]) for row in attempts if "device" in row)
    words = {True: "deterministic", False: "not deterministic (train.deterministic)"}
    return ", then ".join(f"{words[same]} on {device}" for device, same in kinds) or "not noted"


def _segment(segment: dict[str, Any]) -> tuple[str, ...]:
    settings = ", ".join(f"{name} {value}" for name, value in segment["settings"].items())
    return str(segment["start"]), segment["begun_by"], f"{segment['steps']:,}", settings


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
