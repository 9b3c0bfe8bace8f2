"""Configs of the jobs that ingest, encode, train and export, and of the demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from defi_platform.config.cluster import RayConfig
from defi_platform.config.data import DataConfig, DecodeConfig
from defi_platform.config.evaluate import (
    CompareConfig,
    EvaluateConfig,
    ExportEvaluationConfig,
    InspectConfig,
    InstallConfig,
    OfflineConfig,
    RecordConfig,
    TuneConfig,
)
from defi_platform.config.fields import PATH, RESUME_CONTENT, RESUME_FREE, RESUME_UNTIL_COMPLETE
from defi_platform.config.serve import ServeConfig
from defi_platform.config.train import ActingConfig, ActionConfig, ModelConfig, TrackingConfig, TrainConfig


@dataclass
class IngestConfig:
    """Ingest of corpora into a manifest and a quarantine (jobs/ingest_videos.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune_days: float | None = None
    """Delete the rows that an ingest replaced more than so many days ago; trainings that began on them cannot go on
    then. null: all are kept."""


@dataclass
class EncodeConfig:
    """Filling of data.cache for a pretraining with the same model and data settings (jobs/encode_latents.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    kind: str = MISSING
    """gfdm (VAE latents) | gidm (patch features)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    """train.seed of that training: presets without stored weights initialise theirs from it."""
    dtype: str = "float32"
    """float32 | float16; float32 gives the losses of training from pictures, float16 takes half the space."""
    batch_frames: int = 32
    """Frames that are encoded at once."""
    shard_mb: int = 256
    """Size of a file of the cache in MiB; a longer video gets a file to itself."""
    workers: int | None = None
    """Encoders in parallel; null: one per GPU, or one where there is none."""


@dataclass
class PretrainConfig:
    """Pretraining of GFDM or GIDM (jobs/pretrain_gfdm.py, jobs/pretrain_gidm.py)."""

    is_run: ClassVar[bool] = True
    """--help says of every key what may become of it in a run that has begun."""

    ray: RayConfig = field(default_factory=RayConfig, metadata=RESUME_FREE)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig, metadata=RESUME_FREE)
    dry_run: bool = field(default=False, metadata=RESUME_FREE)
    """Report what the run would do and start nothing; on the command line: --dry-run."""


@dataclass
class PretrainBothConfig:
    """Both pretrainings on one cluster, each with its own resources (jobs/pretrain.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    dry_run: bool = False
    """Report what both runs would do and start nothing; on the command line: --dry-run."""
    gfdm: PretrainConfig = field(default_factory=PretrainConfig)
    gidm: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass
class FinetuneConfig(PretrainConfig):
    """Fine-tuning of the fused policy (jobs/finetune_policy.py)."""

    gfdm: str = field(default=MISSING, metadata=PATH | RESUME_CONTENT)
    """Model folder of the pretrained GFDM."""
    gidm: str = field(default=MISSING, metadata=PATH | RESUME_CONTENT)
    """Model folder of the pretrained GIDM."""
    trainable: str = "gidm+adapter"
    """adapter | gidm+adapter | gfdm+adapter | all; parts of the policy that train."""
    actions: ActionConfig = field(default_factory=ActionConfig, metadata=RESUME_UNTIL_COMPLETE)
    acting: ActingConfig = field(default_factory=ActingConfig, metadata=RESUME_UNTIL_COMPLETE)


@dataclass
class PackageConfig:
    """Acting of a policy compiled ahead (AOTInductor), for one batch size, device and precision."""

    path: str = field(default=MISSING, metadata=PATH)
    """File to write, ending in .pt2; local or s3://."""
    batch: int = 1
    """Observations of a forward pass."""
    device: str = "cpu"
    """cpu | cuda; the device must be in this machine."""
    dtype: str = "float32"
    """float32 | bfloat16"""


@dataclass
class ExportConfig:
    """Export of the newest checkpoint of a run as a model folder (jobs/export_model.py)."""

    run: str = field(default=MISSING, metadata=PATH)
    """Run folder of a training, complete or not."""
    output: str | None = field(default=None, metadata=PATH)
    """Model folder; null: `model` in the run folder, where a complete run puts it."""
    weights: str | None = None
    """raw | average; null: train.export_weights of the run, and the average for older runs that keep one."""
    acting: ActingConfig = field(default_factory=ActingConfig)
    """Of a policy. null: as the run says."""
    package: PackageConfig | None = None
    """Of a policy: also compile its acting into one file. null: no package."""


@dataclass
class LaryBenchConfig:
    """Export of GIDM's latent actions in LARYBench's layout (jobs/export_larybench.py).

    From one of LARYBench's own tables (`metadata`), or from labelled corpora (`data`).
    """

    ray: RayConfig = field(default_factory=RayConfig)
    model: str = field(default=MISSING, metadata=PATH)
    """Model folder of GIDM."""
    output: str = field(default=MISSING, metadata=PATH)
    """Folder for the tables (`data`), the latent actions (`latent_actions`: LARY_LA_DIR) and, of corpora, pictures and
    actions (DATA_DIR is this folder)."""
    task: str = "regression"
    """regression | classification; pairs of frames with the actions between them, or videos with a label."""
    dataset: str = MISSING
    """Data set, as LARYBench calls it (calvin, human_1st, ...), or a name for the corpora."""
    name: str = "gidm"
    """Model name in LARYBench's --model and in names of files."""
    vectors: str = "tokens"
    """tokens | latents; behind or before the codebook."""
    stride: int = 5
    """Frames between the two of a pair, and actions of a row, of a regression."""
    batch: int = 16
    """Pairs of a forward pass."""
    device: str | None = None
    """cpu | cuda | cuda:N; null: the GPU of this machine, where there is one."""
    metadata: str | None = field(default=None, metadata=PATH)
    """LARYBench's table of rows (DATASET_metadata_SPLIT.csv); null: rows of `data`."""
    pictures: str | None = field(default=None, metadata=PATH)
    """Folder that the paths in `metadata` are relative to."""
    split: str | None = None
    """Split of `metadata`: train, val, seen_train, ..."""
    height: int = 224
    """Pixels of a frame of `metadata`, as the model sees it."""
    width: int = 224
    """Pixels of a frame of `metadata`, as the model sees it."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    """Limits of the decoding of videos of `metadata`."""
    data: DataConfig | None = None
    """Labelled corpora; their training split becomes train, their validation split val."""


@dataclass
class DemoConfig:
    """Every stage once, end to end (jobs/demo.py)."""

    record: RecordConfig = field(default_factory=RecordConfig)
    pretrain: PretrainBothConfig = field(default_factory=PretrainBothConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    output: str = field(default=MISSING, metadata=PATH)
    """Folder of the stage records and the report."""


JOB_CONFIGS: dict[str, type[Any]] = {
    "pretrain": PretrainBothConfig,
    "pretrain_gfdm": PretrainConfig,
    "pretrain_gidm": PretrainConfig,
    "finetune_policy": FinetuneConfig,
    "encode_latents": EncodeConfig,
    "ingest_videos": IngestConfig,
    "serve_policy": ServeConfig,
    "evaluate_policy": EvaluateConfig,
    "evaluate_offline": OfflineConfig,
    "compare_evaluations": CompareConfig,
    "export_evaluation": ExportEvaluationConfig,
    "tune_evaluation": TuneConfig,
    "record_demos": RecordConfig,
    "inspect_corpus": InspectConfig,
    "install_benchmark": InstallConfig,
    "export_model": ExportConfig,
    "export_larybench": LaryBenchConfig,
    "demo": DemoConfig,
}
"""Job -> its config, in the order in which they are tried for a file that may be of any."""
