"""Typed configuration of every job: the schema. `config_file.py` reads YAML and overrides into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

# --------------------------------------------------------------------------- parts


@dataclass
class RayConfig:
    """How a job reaches its cluster."""

    address: str | None = None
    """None joins the cluster the job was submitted to, or starts one on this machine."""
    local_cpus: int | None = None
    """Logical CPUs of a cluster started here; None: one per core, four at least, since train workers,
    decoders and simulators each hold a share."""


@dataclass
class ModelConfig:
    """A preset of `defi_models` and what to change in it."""

    preset: str = "nano"
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's own Config, by name; nested parts as nested mappings."""
    init_from: str | None = None
    """Model folder whose weights training starts from; None starts from the preset's own."""


@dataclass
class WindowConfig:
    """How long videos are cut into windows, each a video of its own; those with actions stay whole."""

    mode: str = "none"
    """none | shots | stride"""
    length_s: float = 10.0
    """Seconds of a window; with shots, of the longest one."""
    stride_s: float | None = None
    """Seconds from one start to the next; None: windows lie end to end."""
    shortest_s: float = 1.0
    """Shorter windows, such as what is left at the end, are rejected as too_short."""
    shot_threshold: float = 20.0
    """Grey levels (of 255) by which the picture changes at least where a shot begins."""


@dataclass
class FilterConfig:
    """Videos or windows that are left out, with their score in the quarantine; None turns a filter off."""

    scores: bool = False
    """Store the scores (columns luma, motion, sharpness of the manifest) also while no filter asks for them."""
    black: float | None = None
    """Least mean grey level (of 255); 16 is a dark room."""
    static: float | None = None
    """Least mean change of grey level from one half second to the next; 0.5 is a still picture with noise."""
    blurred: float | None = None
    """Least variance of the Laplacian, at a height of 240; 20 is out of focus."""
    too_short_s: float | None = None
    """Fewest seconds."""
    duplicate_bits: int | None = None
    """Most bits (of 192, over three pictures) in which two videos are taken for the same; 6 finds copies in
    another size or codec. Not for robots before fixed cameras, whose episodes all look alike."""


@dataclass
class CorpusConfig:
    """One source of video."""

    path: str = MISSING
    """Folder: local, s3:// or any fsspec URL."""
    format: str = "auto"
    weight: float = 1.0
    """Share of the mixture, relative to the other corpora."""
    cameras: dict[str, float] = field(default_factory=dict)
    """Probability per camera name; empty: every camera of the corpus alike."""
    fps: float | None = None
    """Frames per second where the files do not say (RLDS, HDF5) or say wrong; None: what the corpus says."""
    windows: WindowConfig = field(default_factory=WindowConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)


@dataclass
class DecodeConfig:
    """Limits of the processes that decode."""

    processes: int = 1
    """Decoder processes per training worker."""
    timeout_s: float = 30.0
    memory_mb: int = 2048
    recycle_after: int = 500
    """Videos after which a decoder process is replaced."""
    storage_patience_s: float = 600.0
    """How long a store that gives no video any more is waited for before the run ends."""


@dataclass
class DataConfig:
    """Corpora, how a sample is cut out of a video, and how it is decoded."""

    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    manifest: str = MISSING
    """Folder for the manifest and quarantine tables."""
    height: int = 64
    width: int = 64
    clip_frames: int = 8
    """Frames of a GFDM clip."""
    clip_span_s: float | None = None
    """Seconds a clip covers; None spreads the frames evenly over the whole video."""
    pair_interval_s: float = 1.0
    """Seconds between the two frames of a GIDM pair."""
    holdout: float = 0.1
    """Share of the videos kept for validation, chosen by a hash of the video id."""
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    strict: bool = False
    """Stop at the first bad video instead of putting it into quarantine."""
    retry_quarantined: bool = False
    """Open what is in quarantine again at this ingest. Otherwise it stays there until its file changes."""
    cache: str | None = None
    """Folder that jobs/encode_latents.py has filled: training videos it holds are read from there, as the frozen
    encoder sees them, instead of being decoded. One folder per model."""


@dataclass
class ProbeConfig:
    """GIDM's linear probe: labelled corpora whose true actions its latent actions are compared with."""

    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    manifest: str = MISSING
    pairs: int = 512
    """Of the training split, and as many of the validation split."""
    holdout: float = 0.2


@dataclass
class TrainConfig:
    """One training run."""

    output: str = MISSING
    """Run folder (local or s3://): checkpoints, metrics, curves and the exported model."""
    seed: int = 0
    steps: int = 100
    global_batch: int = 8
    micro_batch: int = 8
    """Samples per worker and forward pass; global_batch must be micro_batch x workers x a whole number."""
    num_workers: int = 1
    """Workers; with `min_workers`, the most there may be."""
    min_workers: int | None = None
    """Elastic: the run goes on with as few as this when nodes are lost and grows back when they return. Steps keep
    their global batch and their samples; None: exactly `num_workers`."""
    resize_check_s: float = 60.0
    """Elastic: how often a running run looks for room to grow."""
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    use_gpu: bool = False
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    schedule: str = "constant"
    """constant | cosine | tri_stage"""
    warmup_steps: int = 0
    clip_grad_norm: float = 1.0
    """0 turns clipping off."""
    zero_stage: int = 1
    offload_optimizer: bool = False
    """Optimiser state and fp32 masters in the host's memory (ZeRO 1 to 3)."""
    precision: str = "fp32"
    """fp32 | bf16 | fp16"""
    recompute: bool = False
    """Activation checkpointing: less memory, one more forward pass."""
    compile: bool = False
    """torch.compile of the parts that train."""
    ema_decay: float | None = None
    """Average of the weights for validation and export, e.g. 0.9999; early on it is min(decay, (1 + n) / (10 + n))
    after n updates. None or 0: none is kept."""
    max_skipped_in_a_row: int | None = None
    """Updates with a gradient that is no number are left out; after so many in a row the run stops. None: 3, and
    50 under fp16, which leaves some out as a matter of course."""
    log_every: int = 10
    """Steps."""
    validate_every: int = 100
    """Steps; step 0 and the last step are always validated."""
    validation_batches: int = 4
    async_validation_every: int = 0
    """Steps, a multiple of `checkpoint_every`: how often a task beside training looks closely at a checkpoint (GFDM:
    sampled clips; GIDM: the linear probe). 0: only at the end of the run."""
    async_validation_resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """Of that task, besides those of the workers; {CPU: 1, GPU: 1} where a GPU is to spare."""
    checkpoint_every: int = 100
    """Steps; the last step is always checkpointed."""
    keep_checkpoints: int = 2
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss, of those that were validated at their step."""
    storage_patience_s: float = 600.0
    """How long a checkpoint waits for a store that does not answer or a disk that is full."""
    max_failures: int = 3
    """Worker deaths a run survives before it gives up; -1: any number."""
    restart_dead_codes_every: int = 100
    """Steps; GIDM's stand-in for the reference's once-per-epoch restart. 0 turns it off."""
    probe: ProbeConfig | None = None
    """GIDM: a linear probe at the end of the run; null for none."""
    threads: int | None = None
    """Torch threads per worker; None leaves torch's choice."""
    peak_tflops: float | None = None
    """Peak of one worker's device in the chosen precision, for MFU; None: known GPUs by name, no MFU elsewhere."""
    expected_step_s: float | None = None
    """Seconds of a step, for the hours that --dry-run tells; None: measured by an earlier attempt, or guessed."""


@dataclass
class TrackingConfig:
    """Where metrics go besides the run folder's JSONL."""

    wandb: bool = True
    """Weights & Biases; offline unless WANDB_API_KEY is set."""
    project: str = "defi"
    name: str | None = None


# --------------------------------------------------------------------------- jobs


@dataclass
class RecordConfig:
    """jobs/record_demos.py: scripted experts of a simulator -> LeRobot v3.0 datasets."""

    ray: RayConfig = field(default_factory=RayConfig)
    tasks: list[str] = MISSING
    episodes_per_task: int = 20
    labelled_per_task: int = 5
    """Episodes per task that keep their actions and proprioception, in a dataset of their own."""
    seed: int = 0
    camera: str = "workspace"
    height: int = 64
    width: int = 64
    max_steps: int = 200
    """Steps after which an episode without success is dropped, counted and replaced."""
    hold_steps: int = 8
    """Steps recorded after the first success, so that a policy also learns to stay there."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise on the executed actions; the labels stay the expert's own."""
    workers: int = 2
    output: str = MISSING
    """Folder that receives `video/` (frames and text only) and `labelled/` (with actions)."""


@dataclass
class IngestConfig:
    """jobs/ingest_videos.py: corpora -> manifest and quarantine."""

    ray: RayConfig = field(default_factory=RayConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass
class PretrainConfig:
    """jobs/pretrain_gfdm.py and jobs/pretrain_gidm.py."""

    ray: RayConfig = field(default_factory=RayConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    dry_run: bool = False
    """Tell what the run would be and start nothing; on the command line: --dry-run."""


@dataclass
class EncodeConfig:
    """jobs/encode_latents.py: fills data.cache for a pretraining with the same model and data settings."""

    ray: RayConfig = field(default_factory=RayConfig)
    kind: str = MISSING
    """gfdm (VAE latents) | gidm (patch features)"""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    """train.seed of that training: presets without stored weights draw theirs from it."""
    dtype: str = "float32"
    """float32 gives the losses of training from pictures; float16 takes half the space."""
    batch_frames: int = 32
    """Frames that are encoded at once."""
    shard_mb: int = 256
    """Size of a file of the cache; a longer video gets one of its own."""
    workers: int | None = None
    """Encoders at work; None: one per GPU, or one where there is none."""


@dataclass
class InspectConfig:
    """jobs/inspect_corpus.py: one HTML page about the corpora."""

    ray: RayConfig = field(default_factory=RayConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    """Of the plan whose mixture is shown."""
    samples: int = 10_000
    """Samples of the plan that are counted."""
    videos_per_corpus: int = 12
    """Strips of the contact sheet."""
    frames_per_video: int = 6
    output: str = MISSING
    """Folder that receives corpora.html."""


@dataclass
class PretrainBothConfig:
    """jobs/pretrain.py: both pretrainings on one cluster, each with its own resources."""

    ray: RayConfig = field(default_factory=RayConfig)
    dry_run: bool = False
    """As in PretrainConfig, for both."""
    gfdm: PretrainConfig = field(default_factory=PretrainConfig)
    gidm: PretrainConfig = field(default_factory=PretrainConfig)


@dataclass
class FinetuneConfig(PretrainConfig):
    """jobs/finetune_policy.py."""

    gfdm: str = MISSING
    """Model folder of the pretrained GFDM."""
    gidm: str = MISSING
    """Model folder of the pretrained GIDM."""
    trainable: str = "gidm+adapter"
    """adapter | gidm+adapter | gfdm+adapter | all"""


@dataclass
class ExportConfig:
    """jobs/export_model.py: the newest checkpoint of a run -> a model folder."""

    run: str = MISSING
    """Run folder of a training, complete or not."""
    output: str | None = None
    """Model folder; None: `model` in the run folder, where a complete run puts it."""


@dataclass
class ServeConfig:
    """jobs/serve_policy.py."""

    ray: RayConfig = field(default_factory=RayConfig)
    policy: str = MISSING
    """Policy folder; nothing else is needed to serve it."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 picks a free one."""
    replicas: int = 1
    replica_cpus: float = 1.0
    replica_gpus: float = 0.0
    max_batch_size: int = 8
    """Observations of different clients that one forward pass may hold."""
    max_connections: int = 1000
    """Open websockets per gateway replica."""
    threads: int | None = None
    """Torch threads per replica; None leaves torch's choice."""


@dataclass
class EvaluateConfig:
    """jobs/evaluate_policy.py: closed-loop rollouts against a served policy."""

    ray: RayConfig = field(default_factory=RayConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    """The policy to serve for the evaluation; ignored when `url` is set."""
    url: str | None = None
    """ws://host:port of a policy that is served already."""
    tasks: list[str] = MISSING
    arms: list[str] = field(default_factory=lambda: ["policy", "random", "expert"])
    episodes_per_task: int = 10
    seed: int = 10_000
    """First seed of the initial states; every arm meets the same ones. Keep it away from the recording's."""
    max_steps: int = 150
    camera: str = "workspace"
    height: int = 64
    width: int = 64
    execute_steps: int | None = None
    """Actions of a chunk that are carried out before the next observation is sent; None: the whole chunk."""
    video_every: int = 2
    """Simulator steps per frame of the episode videos; 0 writes none."""
    workers: int = 2
    output: str = MISSING


@dataclass
class DemoConfig:
    """jobs/demo.py: every stage once, end to end."""

    record: RecordConfig = field(default_factory=RecordConfig)
    pretrain: PretrainBothConfig = field(default_factory=PretrainBothConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    output: str = MISSING
    """Folder of the stage records and the report."""
