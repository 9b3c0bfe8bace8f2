"""Needs of a job, read from its config: folders, a port to listen on, resources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from defi_platform import storage
from defi_platform.config import (
    JOB_CONFIGS,
    EvaluateConfig,
    RayConfig,
    ServeConfig,
)
from defi_platform.config.fields import is_path
from defi_platform.config.loader import load_config
from defi_platform.errors import ConfigError
from defi_platform.preflight.folders import Folder

WRITTEN = ("output", "manifest", "cache", "text_cache")
"""Names of the keys of folders that jobs write to."""


def load_any(path: str | None, overrides: Sequence[str], job: str | None = None) -> tuple[str, Any]:
    """Loads the config of a job that need not be named.

    Args:
        path: of the YAML file; None: overrides alone.
        overrides: `key=value`.
        job: name of a script below jobs/, without `.py`; None: the first whose config the file can be.

    Returns: name of the job, and its config.
    Raises: ConfigError when it fits none, with what is wrong for the job that is named like the file.
    """
    if job is not None:
        if job not in JOB_CONFIGS:
            raise ConfigError(f"there is no job '{job}'; choose one of {', '.join(JOB_CONFIGS)}.")
        return job, load_config(JOB_CONFIGS[job], path, overrides)
    errors: dict[str, ConfigError] = {}
    stem = Path(path or "").stem
    # The longest name that the file's begins with comes first: pretrain_gfdm_table.yaml is one of pretrain_gfdm.
    names = sorted(JOB_CONFIGS, key=lambda name: -len(name) if stem.startswith(name) else 0)
    for name in names:
        try:
            return name, load_config(JOB_CONFIGS[name], path, overrides)
        except ConfigError as error:
            errors[name] = error
    likely = names[0]
    raise ConfigError(
        f"{path or 'the overrides'} is no config of any job; for {likely}: {errors[likely]} Name another with --job."
    )


def ray_config(config: Any) -> RayConfig:
    """The connection that a job's config asks for."""
    found: RayConfig = config.ray
    return found


def folders(config: Any) -> list[Folder]:
    """The folders and files that a job reads or writes, each once; those inside another that is written are left out."""
    found: dict[str, Folder] = {}
    for key, uri in _paths(config, ""):
        # A training adds to the split of its project; an offline evaluation, whose key is `split`, reads it.
        writes = key.rpartition(".")[2] in WRITTEN or key.endswith("data.split")
        if uri not in found or writes:
            found[uri] = Folder(uri, key, writes)
    written = [uri for uri, folder in found.items() if folder.writes]
    return [
        folder
        for uri, folder in found.items()
        if not any(other != uri and uri.startswith(f"{other.rstrip('/')}/") for other in written)
    ]


def _paths(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{key}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    yield from _paths(entry, f"{key}.{name}.")
        elif is_path(field) and value not in (None, MISSING, ""):
            yield key, storage.absolute(value)


def listens(config: Any) -> ServeConfig | None:
    """The settings of the policy that a job serves; None: it serves none."""
    if isinstance(config, ServeConfig):
        return config
    if isinstance(config, EvaluateConfig) and config.url is None and "policy" in config.arms:
        return config.serve
    return None
