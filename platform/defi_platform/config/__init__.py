"""Typed configuration: YAML files and dotted overrides go in, checked dataclasses come out."""

from defi_platform.config.cluster import RayConfig
from defi_platform.config.data import (
    CorpusConfig,
    DataConfig,
    DecodeConfig,
    FilterConfig,
    SamplingConfig,
    WindowConfig,
)
from defi_platform.config.evaluate import (
    EvaluateConfig,
    InspectConfig,
    RecordConfig,
    SimulatorConfig,
    StopRuleConfig,
)
from defi_platform.config.jobs import (
    JOB_CONFIGS,
    DemoConfig,
    EncodeConfig,
    ExportConfig,
    FinetuneConfig,
    IngestConfig,
    PretrainBothConfig,
    PretrainConfig,
)
from defi_platform.config.serve import (
    InferenceConfig,
    LimitsConfig,
    ObservationKeysConfig,
    SecurityConfig,
    ServeConfig,
    SessionConfig,
)
from defi_platform.config.train import (
    ActingConfig,
    ActionConfig,
    ModelConfig,
    ProbeConfig,
    ServedActingConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "JOB_CONFIGS",
    "ActingConfig",
    "ActionConfig",
    "CorpusConfig",
    "DataConfig",
    "DecodeConfig",
    "DemoConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FilterConfig",
    "FinetuneConfig",
    "InferenceConfig",
    "IngestConfig",
    "InspectConfig",
    "LimitsConfig",
    "ModelConfig",
    "ObservationKeysConfig",
    "PretrainBothConfig",
    "PretrainConfig",
    "ProbeConfig",
    "RayConfig",
    "RecordConfig",
    "SamplingConfig",
    "SecurityConfig",
    "ServeConfig",
    "ServedActingConfig",
    "SessionConfig",
    "SimulatorConfig",
    "StopRuleConfig",
    "TrackingConfig",
    "TrainConfig",
    "WindowConfig",
]
