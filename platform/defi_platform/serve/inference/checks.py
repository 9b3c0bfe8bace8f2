"""Checks of the settings of the policy's computation, before anything starts."""

from __future__ import annotations

from defi_platform.config import ServeConfig
from defi_platform.errors import ConfigError

DTYPES = ("float32", "bfloat16")
COMPILE_MODES = ("none", "graphs", "default", "reduce-overhead", "max-autotune")
_LARGEST_BATCH = 1024


def check_inference(config: ServeConfig) -> None:
    """Checks `model`, `threads`, `max_batch_size`, `limits.action_margin` and `scaling`.

    Args:
        config: of serving.

    Raises:
        ConfigError: a value does not fit; names its key and what is allowed.
    """
    model = config.model
    for key, value, choices in (
        ("model.dtype", model.dtype, DTYPES),
        ("model.compile", model.compile, COMPILE_MODES),
    ):
        if value not in choices:
            raise ConfigError(f"{key} is '{value}'; it is one of {', '.join(choices)}.")
    if model.deterministic and model.compile not in ("none", "graphs"):
        raise ConfigError(
            f"model.deterministic and model.compile={model.compile} do not go together: a compiled kernel is "
            "chosen by measuring, so another start may compute with another one. Set one of them."
        )
    if model.package and model.compile != "none":
        raise ConfigError(
            f"model.package is compiled already, so model.compile={model.compile} has no use. Set one of them."
        )
    if model.compile == "graphs" and not config.replica_gpus:
        raise ConfigError(
            "model.compile=graphs replays CUDA graphs, but replica_gpus is 0. Give each replica a GPU or a share of one, "
            "or set another model.compile."
        )
    for key, number in (
        ("model.prompt_cache", model.prompt_cache),
        ("threads", config.threads),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"{key} is {number}; it must be 1 or more.")
    margin, scaling = config.limits.action_margin, config.scaling
    if margin is not None and not margin >= 0:
        raise ConfigError(f"limits.action_margin is {margin}; it must be 0 or more, or null for no check.")
    if scaling.target_in_flight is not None and not scaling.target_in_flight > 0:
        raise ConfigError(
            f"scaling.target_in_flight is {scaling.target_in_flight}; it must be above 0, or null for the default."
        )
    for key, time in (
        ("max_wait_ms", scaling.max_wait_ms),
        ("upscale_delay_s", scaling.upscale_delay_s),
        ("downscale_delay_s", scaling.downscale_delay_s),
    ):
        if not time >= 0:
            raise ConfigError(f"scaling.{key} is {time}; it must be 0 or more.")
    if not 1 <= config.max_batch_size <= _LARGEST_BATCH:
        raise ConfigError(
            f"max_batch_size is {config.max_batch_size}; it is a number from 1 to {_LARGEST_BATCH}."
        )
