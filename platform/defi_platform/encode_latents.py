"""Encoding of corpora into a latent cache on Ray, on GPUs where there are any: the job of jobs/encode_latents.py."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from defi_platform import roles
from defi_platform.cluster import ray_session
from defi_platform.cluster.requirements import Demand, announce
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import EncodeConfig, PretrainConfig, TrainConfig
from defi_platform.config.paths import absolute_paths
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.latents.cache import (
    SAME,
    EncoderInfo,
    create_cache,
    missing_rows,
    remove_leftovers,
    write_shard,
)
from defi_platform.data.latents.frame_encoder import DTYPES, FrameEncoder
from defi_platform.data.loader.sample_decoder import STAGE, decode_job, quarantine_entry
from defi_platform.data.loader.stream import ACTOR_CPUS
from defi_platform.data.manifest.quarantine import add_to_quarantine, strict_error
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.rejection import BadVideo
from defi_platform.errors import ConfigError
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress
from defi_platform.train.engine.seeds import seed_of
from defi_platform.train.recipes.registry import PRETRAININGS


@dataclass(frozen=True)
class EncodeSummary:
    """Result of an encoding: videos, frames, what was skipped, and the time."""

    folder: str
    info: EncoderInfo
    videos: int
    """In the cache now."""
    encoded: int
    frames: int
    skipped: dict[str, int]
    seconds: float

    def text(self) -> str:
        """A few lines for people."""
        skipped = ", ".join(f"{n} {reason}" for reason, n in sorted(self.skipped.items()))
        return (
            f"{self.info.column}: {self.encoded} videos, {self.frames} frames encoded in {self.seconds:.1f} s "
            f"({self.frames / max(self.seconds, 1e-9):.0f} frames/s)"
            + (f"; skipped {skipped}" if skipped else "")
            + f"\n  {self.videos} videos in {self.folder} (encoder {self.info.fingerprint}: {self.info.describes})"
        )


def encode_latents(config: EncodeConfig) -> EncodeSummary:
    """Encodes every video of the corpora that the cache does not hold yet.

    Raises: UserError; CacheError when the folder is the cache of another encoder.
    """
    config = absolute_paths(config)
    _check(config)
    folder = config.data.cache
    assert folder is not None
    started = time.monotonic()
    with ray_session(config.ray):
        announce([encoder_demand(config)])
        register_run(folder)
        manifest = ingest(config.data)
        # Built here too: the fingerprint is needed before anything is written.
        info = _encoder(config).info(config.data.height, config.data.width, config.dtype)
        create_cache(folder, info)
        remove_leftovers(folder)
        todo = missing_rows(folder, manifest, np.arange(len(manifest)))
        encoded, frames, skipped = _encode(config, manifest, info, todo)
        videos = len(manifest) - len(missing_rows(folder, manifest, np.arange(len(manifest))))
    return EncodeSummary(folder, info, videos, encoded, frames, skipped, time.monotonic() - started)


def encoder_demand(config: EncodeConfig) -> Demand:
    """The resources of one encoder on the connected cluster; the others join when there is room."""
    resources = {"CPU": ACTOR_CPUS}
    if roles.capacity(roles.TRAIN, "GPU"):
        resources["GPU"] = 1.0
    return Demand(name=f"{config.kind}: encoders", resources=resources, role=roles.TRAIN)


def _check(config: EncodeConfig) -> None:
    if config.kind not in PRETRAININGS:
        raise ConfigError(
            f"there is no model kind '{config.kind}' to encode for; choose {' or '.join(PRETRAININGS)}."
        )
    if config.dtype not in DTYPES:
        raise ConfigError(f"dtype is {config.dtype}; choose {' or '.join(DTYPES)}.")
    if config.data.cache is None:
        raise ConfigError("data.cache names no folder to write to. Set data.cache=FOLDER.")


def _encoder(config: EncodeConfig, device: str = "cpu") -> FrameEncoder:
    """The encoder of the model that a training with these settings builds, weight for weight."""
    settings = PretrainConfig(model=config.model, data=config.data, train=TrainConfig(seed=config.seed))
    recipe = PRETRAININGS[config.kind](settings)
    torch.manual_seed(seed_of(config.seed, "weights"))
    return FrameEncoder(recipe.build_without_cache().to(device))  # type: ignore[arg-type]


def _encode(
    config: EncodeConfig, manifest: Manifest, info: EncoderInfo, todo: np.ndarray
) -> tuple[int, int, dict[str, int]]:
    """Returns: videos and frames encoded, and videos skipped by reason."""
    if not len(todo):
        return 0, 0, {}
    gpus = int(roles.capacity(roles.TRAIN, "GPU"))
    workers = config.workers or gpus or 1
    groups = _groups(manifest, todo, info, config.shard_mb << 20)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    dataset = ray.data.from_items([{"rows": group} for group in groups], override_num_blocks=len(groups))
    dataset.context.enable_progress_bars = False
    results = dataset.map_batches(
        _VideoEncoder,
        fn_constructor_args=(config, manifest, info),
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(groups))),
        num_cpus=ACTOR_CPUS,
        num_gpus=1 if gpus else 0,
        **roles.options(roles.TRAIN),
    )
    videos, frames, skipped = 0, 0, dict[str, int]()
    with Progress(f"{info.column}: encoding", "videos", len(todo)) as progress:
        for row in results.iter_rows():
            videos, frames = videos + int(row["videos"]), frames + int(row["frames"])
            for reason in filter(None, str(row["skipped"]).split(",")):
                skipped[reason] = skipped.get(reason, 0) + 1
            progress.step(int(row["videos"]) + len(list(filter(None, str(row["skipped"]).split(",")))))
    return videos, frames, skipped


def _groups(manifest: Manifest, rows: np.ndarray, info: EncoderInfo, shard_bytes: int) -> list[list[int]]:
    """Rows by shard: as many videos as fit, at least one."""
    groups: list[list[int]] = []
    free = 0
    for row, frames in zip(rows.tolist(), manifest.numbers("num_frames")[rows].tolist(), strict=True):
        need = frames * info.frame_bytes
        if not groups or need > free:
            groups.append([])
            free = shard_bytes
        groups[-1].append(row)
        free -= need
    return groups


class _VideoEncoder:
    """Decodes videos in decoder processes, encodes them and writes one shard per call."""

    def __init__(self, config: EncodeConfig, manifest: Manifest, info: EncoderInfo) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        self._config, self._manifest, self._info = config, manifest, info
        self._encoder = _encoder(config, device)
        found = self._encoder.info(config.data.height, config.data.width, config.dtype)
        assert found.fingerprint == info.fingerprint, "two builds of one encoder differ"
        self._pool = DecoderPool(config.data.decode)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Encodes {"rows": (1, n)}; returns the counts of videos and frames, and the reasons of the skipped ones."""
        rows = [int(row) for row in batch["rows"][0]]
        parts: list[np.ndarray] = []
        videos: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for row, part in zip(rows, self._encoded(rows), strict=True):
            video = self._manifest.row(row)
            if isinstance(part, BadVideo):
                entry = quarantine_entry(video, part)
                if self._config.data.strict:
                    raise strict_error(entry)
                bad.append(entry)
                continue
            parts.append(part)
            assert len(part) == video["num_frames"]
            videos.append({name: video[name] for name in ("corpus", "video_id", *SAME)})
        assert self._config.data.cache is not None and self._manifest.folder is not None
        if videos:
            write_shard(self._config.data.cache, np.concatenate(parts), videos)
        add_to_quarantine(self._manifest.folder, bad, STAGE)
        frames = sum(video["num_frames"] for video in videos)
        catalogue.ENCODE_VIDEOS.add(len(videos), kind=self._config.kind, result="encoded")
        catalogue.ENCODE_FRAMES.add(frames, kind=self._config.kind)
        for entry in bad:
            catalogue.ENCODE_VIDEOS.add(kind=self._config.kind, result=entry["reason"])
        return {
            "videos": np.array([len(videos)]),
            "frames": np.array([frames]),
            "skipped": np.array([",".join(entry["reason"] for entry in bad)], dtype=object),
        }

    def _encoded(self, rows: list[int]) -> Iterator[np.ndarray | BadVideo]:
        """Yields one answer per row: (F, ...) or a `BadVideo`. Frames are decoded ahead, a batch of them at a time."""
        pieces = [(row, piece) for row in rows for piece in self._pieces(row)]
        data = self._config.data
        jobs = (decode_job(self._manifest, data, row, piece) for row, piece in pieces)
        answers = self._pool.run(jobs)
        for row in rows:
            parts: list[np.ndarray] = []
            problem: BadVideo | None = None
            for _ in self._pieces(row):
                answer = next(answers)
                if isinstance(answer, BadVideo):
                    problem = problem or answer
                elif problem is None:
                    assert isinstance(answer, np.ndarray)
                    parts.append(self._encoder(answer).astype(self._info.dtype))
            yield problem or np.concatenate(parts)

    def _pieces(self, row: int) -> list[tuple[int, ...]]:
        frames = self._manifest.row(row)["num_frames"]
        step = self._config.batch_frames
        return [tuple(range(i, min(i + step, frames))) for i in range(0, frames, step)]
