"""Corpora, and how samples are cut out of their videos and decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from defi_platform.config.fields import PATH, RESUME_CONTENT, RESUME_FREE


@dataclass
class WindowConfig:
    """Segmentation of long videos into windows, each a video by itself with the actions of its own frames."""

    mode: str = "none"
    """none | shots | stride"""
    length_s: float = 10.0
    """Seconds of a window; with shots, of the longest one."""
    stride_s: float | None = None
    """Seconds from one start to the next; null: windows lie end to end."""
    shortest_s: float = 1.0
    """Seconds; shorter windows, such as the remainder at the end, are rejected as too_short."""
    shot_threshold: float = 20.0
    """Grey levels (of 255) by which the picture changes at least where a shot begins."""


@dataclass
class FilterConfig:
    """Quality filters; a video or window below a threshold goes into the quarantine with its score."""

    scores: bool = False
    """Store the scores (columns luma, motion, sharpness of the manifest) also while no filter asks for them."""
    black: float | None = None
    """Lowest mean grey level (of 255) that is accepted; 16 is a dark room. null: no filter."""
    static: float | None = None
    """Lowest mean change of grey level (of 255) from one half second to the next that is accepted; 0.5 is a still
    picture with noise. null: no filter."""
    blurred: float | None = None
    """Lowest variance of the Laplacian, at a height of 240 pixels, that is accepted; 20 is out of focus. null: no
    filter."""
    too_short_s: float | None = None
    """Shortest video in seconds that is accepted. null: no filter."""
    duplicate_bits: int | None = None
    """Most bits (of 192, over three pictures) by which two videos may differ and still count as duplicates; 6 finds
    copies in another size or codec. Not for robots before fixed cameras, whose episodes are all similar. null: no
    filter."""


@dataclass
class SamplingConfig:
    """Sampling of one corpus: how samples are cut out of its videos; what is not set here is as `data` says."""

    whole: bool = False
    """GFDM: spread the frames of a clip evenly over the whole video."""
    span_s: float | None = None
    """GFDM: seconds that a clip covers. null: data.clip_span_s, unless `whole` or `stride` is set."""
    stride: int | None = None
    """GFDM: frames of the video from one frame of a clip to the next; 16 frames at stride 2 cover 31. null: see span_s."""
    start_every: int = 1
    """GFDM: frames from one start to the next that clips may have; 2: they start at frames 0, 2, 4, ..."""
    pair_interval_s: float | None = None
    """GIDM: seconds between the two frames of a pair. null: data.pair_interval_s."""
    max_frames: int | None = None
    """Frames of the longest video that is drawn from; longer ones are left out and counted as too_long. null: any."""
    unit: str = "frames"
    """frames | seconds | videos; what is drawn evenly: every frame that a sample can start at once per epoch, every
    second of them, or every video. A clip of the whole video can start only once."""


@dataclass
class CorpusConfig:
    """One source of video."""

    path: str = field(default=MISSING, metadata=PATH)
    """Folder: local, s3:// or any fsspec URL."""
    format: str = "auto"
    """auto | annotated | lerobot_v3 | lerobot_v21 | rlds | calvin | webdataset | hdf5 | something | plain"""
    weight: float = 1.0
    """Share of the mixture, relative to the other corpora."""
    cameras: dict[str, float] = field(default_factory=dict)
    """Probability per camera name; 0 leaves a camera out. Empty: all cameras of the corpus equally. A policy's views have
    the order of these names, and the first is what GIDM compares over time; empty: CALVIN's static first, else by name."""
    fps: float | None = None
    """Frames per second where the files do not say (RLDS, HDF5) or say wrong; null: as the corpus says."""
    state: list[Any] = field(default_factory=list)
    """Entries of the raw state that the policy reads, in this order: names, indices, or mappings with `name` or `index`
    and, for angles in radians, `angle` (sin_cos | unwrap) and `around`, the middle of an unwrapped angle (its mean
    direction in the data without it). Empty: the raw state as it is."""
    windows: WindowConfig = field(default_factory=WindowConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class DecodeConfig:
    """Decoder processes and their limits."""

    processes: int = 1
    """Decoder processes per training worker."""
    timeout_s: float = 30.0
    """Seconds after which the decoding of one sample is stopped and its video rejected."""
    memory_mb: int = 2048
    """MiB that a decoder process may use beyond what it starts with; a video that needs more is rejected."""
    recycle_after: int = 500
    """Videos after which a decoder process is replaced."""
    storage_patience_s: float = 600.0
    """Seconds without any readable video, while storage is unavailable, after which the run ends."""


@dataclass
class DataConfig:
    """Corpora, the shape of a sample, and decoding."""

    corpora: dict[str, CorpusConfig] = field(default_factory=dict)
    """Corpora by name, which is that of a folder in the manifest. null takes one of the file's away, as in
    data.corpora.NAME=null; one of weight 0 is not ingested and needs no path."""
    manifest: str = field(default=MISSING, metadata=PATH | RESUME_FREE)
    """Folder for the manifest and quarantine tables."""
    height: int = 64
    """Pixels of a frame, as the model sees it."""
    width: int = 64
    """Pixels of a frame, as the model sees it."""
    clip_frames: int = 8
    """Frames of a GFDM clip."""
    clip_span_s: float | None = None
    """Seconds a clip covers; null spreads the frames evenly over the whole video."""
    pair_interval_s: float = 1.0
    """Seconds between the two frames of a GIDM pair."""
    holdout: float = 0.1
    """Share of the videos kept for validation, chosen by a hash of the episode's id."""
    split: str | None = field(default=None, metadata=PATH)
    """Folder in which a project keeps which episodes are held out, one for all its trainings: what one of them validates on,
    no other one learns from. holdout decides on episodes that are new to it. null: each training by holdout alone."""
    decode: DecodeConfig = field(default_factory=DecodeConfig, metadata=RESUME_FREE)
    strict: bool = field(default=False, metadata=RESUME_FREE)
    """Stop at the first bad video instead of putting it into quarantine."""
    retry_quarantined: bool = field(default=False, metadata=RESUME_FREE)
    """Open quarantined videos again at this ingest. Otherwise they stay there until their files change."""
    take_in_new: bool = field(default=False, metadata=RESUME_FREE)
    """A resumed run goes on with the videos it began with, whatever was ingested since. true: from its last checkpoint on
    with those of now, whose order is another one."""
    cache: str | None = field(default=None, metadata=PATH | RESUME_CONTENT)
    """Folder that jobs/encode_latents.py has filled: training videos it holds are read from there, as the frozen
    encoder sees them, instead of being decoded. One folder per model."""
    text_cache: str | None = field(default=None, metadata=PATH | RESUME_FREE)
    """Folder for what frozen text encoders make of the corpora's texts. A run encodes those that are not there yet before its
    first step, those of its probe and sampled clips too; its workers share the work, and no step runs a text encoder then.
    null: each worker encodes texts as they come and holds the last ones in memory. One folder for all encoders and runs."""


def drawn_corpora(data: DataConfig) -> dict[str, CorpusConfig]:
    """The corpora that have a share of the mixture; those of weight 0 are neither ingested nor drawn."""
    return {name: corpus for name, corpus in data.corpora.items() if corpus.weight != 0}
