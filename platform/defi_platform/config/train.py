"""The model and one training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from defi_platform.config.data import CorpusConfig
from defi_platform.config.fields import (
    PATH,
    RESUME_CONTENT,
    RESUME_EXTEND,
    RESUME_FREE,
    RESUME_RESTART,
    RESUME_UNTIL_COMPLETE,
)


@dataclass
class ModelConfig:
    """A preset of `defi_models` and changes to it."""

    preset: str = field(default="nano", metadata=RESUME_CONTENT)
    """nano | small | paper; sizes of the model (`python -m defi_models.describe PRESET` lists them)."""
    overrides: dict[str, Any] = field(default_factory=dict, metadata=RESUME_CONTENT)
    """Fields of the model's own Config, by name; nested parts as nested mappings."""
    init_from: str | None = field(default=None, metadata=PATH | RESUME_CONTENT)
    """Model folder whose weights training starts from; null: weights as the preset initialises them."""


@dataclass
class ProbeConfig:
    """GIDM's linear probe: labelled corpora with whose actions its latent actions are compared."""

    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    """Corpora with actions, by name."""
    manifest: str = field(default=MISSING, metadata=PATH)
    """Folder for the manifest and quarantine tables of these corpora."""
    pairs: int = 512
    """Frame pairs of the training split, and as many of the validation split."""
    holdout: float = 0.2
    """Share of the episodes that the probe is tested on, chosen by a hash of their ids."""
    target: str = "mean"
    """mean | change; what is read off a pair: the mean action between its frames, or, for actions that are absolute
    positions, how far the last is from the first."""
    distractors: list[str] = field(default_factory=lambda: ["background", "lighting", "object"])
    """Kinds of changes to the frames under which the probe is repeated; each encodes all pairs once more. []: none."""


@dataclass
class TrainConfig:
    """One training run."""

    output: str = field(default=MISSING, metadata=PATH | RESUME_FREE)
    """Run folder (local or s3://): checkpoints, metrics, curves and the exported model."""
    seed: int = 0
    """Seed of initial weights, sample order, noise and dropout."""
    steps: int = field(default=100, metadata=RESUME_EXTEND)
    """Optimiser steps."""
    extend: str | None = field(default=None, metadata=RESUME_FREE)
    """stretch | rewarm; what becomes of a schedule that depends on `steps` when a run goes on with another number of them.
    stretch: it is that of a run of so many steps from the beginning, so the rate jumps; rewarm: it begins anew, warm-up
    included, over the steps that are left. null: such a run is refused."""
    restart_from: int | None = field(default=None, metadata=RESUME_FREE)
    """Step of a checkpoint from which a run goes on with another learning_rate, clip_grad_norm and the like, as a segment of
    its own. Later checkpoints are set aside. Leave it there when the same command goes on: it acts once. null: a run goes on
    from its last checkpoint as it was."""
    global_batch: int = 8
    """Samples per optimiser step, over all workers."""
    micro_batch: int = field(default=8, metadata=RESUME_FREE)
    """Samples per worker and forward pass; global_batch must be micro_batch x workers x a whole number."""
    num_workers: int = field(default=1, metadata=RESUME_FREE)
    """Workers; with `min_workers`, the maximum."""
    min_workers: int | None = field(default=None, metadata=RESUME_FREE)
    """Elastic training: the run continues with as few workers as this when nodes are lost and grows back when they
    return. Steps keep their global batch and their samples. null: exactly `num_workers`."""
    resize_check_s: float = field(default=60.0, metadata=RESUME_FREE)
    """Elastic training: seconds between two checks for resources to grow."""
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0}, metadata=RESUME_FREE)
    """Ray resources of one worker by name: CPU in logical cores, GPU in devices."""
    use_gpu: bool = field(default=False, metadata=RESUME_FREE)
    """Train on GPUs, one per worker unless resources_per_worker.GPU says otherwise."""
    learning_rate: float = field(default=1e-4, metadata=RESUME_RESTART)
    """Peak learning rate of AdamW."""
    weight_decay: float = field(default=1e-2, metadata=RESUME_RESTART)
    """Decoupled weight decay of AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata=RESUME_RESTART)
    """AdamW's two decay rates."""
    schedule: str = field(default="constant", metadata=RESUME_RESTART)
    """constant | cosine | as_written | as_run; shape of the learning rate over the steps. The last two are the policy's
    released fine-tuning: the schedule of its code (2 % rising from a tenth of the peak, 8 % at it, cosine to 1e-6 of it),
    and what its script does (the peak throughout)."""
    warmup_steps: int = field(default=0, metadata=RESUME_RESTART)
    """Steps of linear warm-up, of constant and cosine."""
    clip_grad_norm: float = field(default=1.0, metadata=RESUME_RESTART)
    """Largest global norm of the gradients; 0 turns clipping off."""
    zero_stage: int = field(default=1, metadata=RESUME_FREE)
    """DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimiser state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = field(default=False, metadata=RESUME_FREE)
    """Keep optimiser state and fp32 master weights in the host's memory (ZeRO 1 to 3)."""
    precision: str = field(default="fp32", metadata=RESUME_RESTART)
    """fp32 | bf16 | fp16"""
    deterministic: bool = field(default=False, metadata=RESUME_FREE)
    """On GPUs, only kernels that give the same bits each time (slower); an operation without one is an error that names
    it. With as many GPUs of one kind a run is then repeated and resumed bit for bit. CPUs compute so by themselves."""
    matmul_precision: str = field(default="highest", metadata=RESUME_FREE)
    """highest | high | medium; of products of fp32 numbers. highest: fp32; high: TF32 on GPUs that have it, convolutions
    too; medium: bf16."""
    noise: str = "cpu"
    """cpu | device; where noise is drawn. cpu: the same numbers on every machine. device: a GPU's own, which need no copy
    and are the same again on such a GPU only."""
    recompute: bool = field(default=False, metadata=RESUME_FREE)
    """Activation checkpointing: less memory, one more forward pass."""
    compile: bool = field(default=False, metadata=RESUME_FREE)
    """torch.compile of the parts that train."""
    ema_decay: float | None = field(default=None, metadata=RESUME_RESTART)
    """Decay of the exponential moving average of the weights, e.g. 0.9999; early on it is min(decay, (1 + n) / (10 + n))
    after n updates. null or 0: no average."""
    export_weights: str = field(default="raw", metadata=RESUME_RESTART)
    """raw | average; weights that are validated and exported. average needs ema_decay."""
    max_skipped_in_a_row: int | None = field(default=None, metadata=RESUME_FREE)
    """Consecutive updates that may be skipped because the gradient is not finite, before the run stops. null: 3, and 50
    under fp16, whose loss scaling skips some by design."""
    log_every: int = field(default=10, metadata=RESUME_FREE)
    """Steps between two rows of metrics."""
    validate_every: int = field(default=100, metadata=RESUME_FREE)
    """Steps between two validations; step 0 and the last step are always validated."""
    validation_samples: int = 32
    """Held-out samples of a validation, over all workers; always the same ones, whatever micro_batch is."""
    sampled_clips: int = field(default=32, metadata=RESUME_UNTIL_COMPLETE)
    """GFDM: held-out clips that are sampled at the end and by asynchronous validations, for PSNR, SSIM and GMSD with
    intervals over their episodes."""
    async_validation_every: int = field(default=0, metadata=RESUME_FREE)
    """Steps between two asynchronous validations, a multiple of `checkpoint_every`: a separate task evaluates a checkpoint
    while training continues (GFDM: sampled clips; GIDM: the linear probe; not for policies). 0: only at the end of the run."""
    async_validation_resources: dict[str, float] = field(
        default_factory=lambda: {"CPU": 1.0}, metadata=RESUME_FREE
    )
    """Ray resources of that task, in addition to those of the workers; {CPU: 1, GPU: 1} where a GPU is to spare."""
    checkpoint_every: int = field(default=100, metadata=RESUME_FREE)
    """Steps between two checkpoints; the last step always has one."""
    keep_checkpoints: int = field(default=2, metadata=RESUME_FREE)
    """Newest checkpoints that are kept."""
    keep_best: bool = field(default=False, metadata=RESUME_FREE)
    """Also keep the checkpoint with the lowest validation loss, of those that were validated at their step."""
    storage_patience_s: float = field(default=600.0, metadata=RESUME_FREE)
    """Seconds a checkpoint waits for storage that does not answer or a disk that is full, before the run fails."""
    max_failures: int = field(default=3, metadata=RESUME_FREE)
    """Worker failures that a run recovers from before it gives up; -1: any number. The same one at the same step three
    times in a row ends a run in any case, unless a node or a store is to blame."""
    preemption_grace_s: float = field(default=30.0, metadata=RESUME_FREE)
    """Seconds past the announced end of a spot node in which the other workers may finish the upload of the checkpoint that
    the announcement has brought about, before the run starts anew without that node."""
    restart_dead_codes_every: int = 100
    """Steps between two restarts of unused GIDM codes; the reference restarts them once per epoch. 0: never."""
    probe: ProbeConfig | None = field(default=None, metadata=RESUME_UNTIL_COMPLETE)
    """GIDM: labelled corpora for the linear probe at the end of the run; null: no probe."""
    threads: int | None = field(default=None, metadata=RESUME_FREE)
    """Torch threads per worker; null: torch's default."""
    peak_tflops: float | None = field(default=None, metadata=RESUME_FREE)
    """Peak TFLOP/s of one worker's device in the chosen precision, for MFU; null: known GPUs by name, no MFU elsewhere."""
    expected_step_s: float | None = field(default=None, metadata=RESUME_FREE)
    """Seconds of a step, for the hours in a dry run; null: as measured by an earlier attempt, else estimated."""


@dataclass
class ActionConfig:
    """The meaning of a policy's actions, kept in its folder and in the greeting of robots.

    Where this says nothing, it is what the corpus says (LeRobot: names; CALVIN: everything), else `unknown`.
    """

    names: list[str] = field(default_factory=list)
    """One per entry of an action."""
    units: list[str] = field(default_factory=list)
    """One per entry, such as m, rad, or `0.02 m` where 1 stands for 2 cm."""
    kind: str = "unknown"
    """absolute | relative | mixed | unknown; targets, changes, or as the units say."""
    gripper: str = "unknown"
    """How the gripper's entry is turned into a command."""
    control_hz: float | None = None
    """Actions per second; null: the frames per second of the corpus."""
    execute_steps: int | None = None
    """Actions of a chunk to carry out before the next observation is sent; null: all of them."""


@dataclass
class ActingConfig:
    """Settings of acting, kept in the policy's folder and part of its digest.

    null: as the folder says; at the fine-tuning, 10 steps down to the sigma_min of training and actions as they are.
    """

    steps: int | None = None
    """Denoising steps."""
    sigma_min: float | None = None
    """Noise level of the last denoising step; the released evaluation has 1.0, its training 0.001."""
    clip: str | None = None
    """none | statistics | limits; range to which actions are clipped: that of the training data, or limits_low to
    limits_high."""
    limits_low: list[float] | None = None
    """One per entry of an action, raw units."""
    limits_high: list[float] | None = None
    """One per entry of an action, raw units."""
    gripper: str | None = None
    """none | binary; binary: gripper entries above gripper_threshold become gripper_above, the others gripper_below."""
    gripper_entries: list[int] | None = None
    """Positions within an action; null: the last one, -1."""
    gripper_threshold: float | None = None
    """Raw units; null: 0."""
    gripper_below: float | None = None
    """Raw units; null: -1."""
    gripper_above: float | None = None
    """Raw units; null: 1."""


@dataclass
class ServedActingConfig(ActingConfig):
    """Settings of acting in place of those of the served folder; null: as the folder says.

    Other settings make it another policy, with a digest of its own.
    """

    execute_steps: int | None = None
    """Actions of a chunk that clients are asked to carry out before the next observation."""


@dataclass
class TrackingConfig:
    """Experiment tracking, in addition to the run folder's JSONL."""

    wandb: bool = True
    """Track with Weights & Biases; offline unless WANDB_API_KEY is set."""
    project: str = "defi"
    """W&B project."""
    name: str | None = None
    """W&B run name; null: chosen by W&B."""
