"""Reads a job's configuration: YAML file + dotted overrides -> a checked dataclass.

A YAML mapping may say `extends: other.yaml` (a path relative to the file it stands in); its own keys then
win over the ones it extends. Unknown keys and wrong types are refused before anything starts, and the
message names the nearest key there is.

`${home:}` stands for the folder (or bucket) that holds corpora and runs: see `data_home`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from defi_platform.errors import ConfigError

Schema = TypeVar("Schema")


def data_home() -> str:
    """Where corpora and runs lie: DEFI_HOME (a folder or s3:// URL), else `runs` beside the virtual
    environment in use, else ~/defi.

    Never relative to the working directory: under `ray job submit --working-dir .` that is a temporary copy
    which Ray deletes, and every node has another one.
    """
    named = os.environ.get("DEFI_HOME")
    if named:
        return named.rstrip("/") if "://" in named else str(Path(named).expanduser().absolute())
    if sys.prefix != sys.base_prefix:
        return str(Path(sys.prefix).parent / "runs")
    return str(Path.home() / "defi")


OmegaConf.register_resolver("home", data_home, replace=True)


def parse_arguments(
    schema: type[Schema], argv: Sequence[str] | None = None, flags: Mapping[str, str] | None = None
) -> Schema:
    """Reads a job's command line: `--config FILE` and any number of `dotted.key=value`.

    Args:
        flags: further options and the override that each one stands for.

    Raises: ConfigError for a file that is absent or damaged, an unknown key, a wrong type, a missing value.
    """
    description = (schema.__doc__ or "").strip()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides: train.steps=10")
    for flag, override in (flags or {}).items():
        parser.add_argument(
            flag, dest="overrides_of_flags", action="append_const", const=override, help=override
        )
    arguments = parser.parse_intermixed_args(argv)
    chosen = getattr(arguments, "overrides_of_flags", None) or []
    return load_config(schema, arguments.config, [*arguments.overrides, *chosen])


def load_config(schema: type[Schema], path: str | Path | None, overrides: Sequence[str] = ()) -> Schema:
    """Builds a checked `schema` from defaults, a YAML file and dotted overrides, the later ones winning."""
    from_file = _read_yaml(Path(path)) if path else OmegaConf.create()
    for item in overrides:
        if "=" not in item:
            raise ConfigError(
                f"'{item}' is not an override; write it as dotted.key=value, e.g. train.steps=10."
            )
    merged = OmegaConf.merge(from_file, OmegaConf.from_dotlist(list(overrides)))
    return _checked(schema, merged, str(path or "the command line"))


def from_mapping(schema: type[Schema], values: Any, place: str) -> Schema:
    """Checks a plain mapping against `schema`; `place` is named in errors."""
    return _checked(schema, OmegaConf.create(values), place)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as it is stored in run folders."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def to_mapping(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dicts and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), resolve=True))


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist.{_did_you_mean(path.name, beside)}")
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # OmegaConf passes on whatever its YAML reader raises
        raise ConfigError(f"config file {path} is not readable YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"config file {path} holds a list; a mapping of keys to values is expected.")
    return _extended(content, path.parent)


def _extended(node: DictConfig, folder: Path) -> DictConfig:
    base = OmegaConf.create()
    if "extends" in node:
        base = _read_yaml(folder / cast(str, node.pop("extends")))
    for key in list(node.keys()):
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            node[key] = _extended(child, folder)
    return cast(DictConfig, OmegaConf.merge(base, node))


def _checked(schema: type[Schema], values: Any, place: str) -> Schema:
    for key, siblings in _unknown_keys(schema, values):
        raise ConfigError(f"{place}: there is no key '{key}'.{_did_you_mean(key, siblings)}")
    try:
        config = OmegaConf.merge(OmegaConf.structured(schema), values)
        return cast(Schema, OmegaConf.to_object(config))
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{place}: '{error.full_key}' has no value; set it in the file or add {error.full_key}=VALUE."
        ) from error
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"{place}: '{error.full_key}': {message}") from error


def _unknown_keys(schema: type, values: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields (dotted unknown key, dotted keys that exist beside it) of a mapping against a dataclass."""
    if not isinstance(values, DictConfig) or values._is_none() or not dataclasses.is_dataclass(schema):
        return
    structured = OmegaConf.structured(schema)
    known = {f.name for f in dataclasses.fields(schema)}
    for key in values:
        name = f"{prefix}{key!s}"
        if key not in known:
            yield name, [prefix + k for k in sorted(known)]
            continue
        if values._get_node(key) is None or OmegaConf.is_missing(values, key):
            continue
        node = structured._get_node(key)
        child = OmegaConf.get_type(node)
        if isinstance(node, DictConfig) and dataclasses.is_dataclass(node._metadata.element_type):
            for name_in_dict in values[key]:
                element = cast(type, node._metadata.element_type)
                yield from _unknown_keys(element, values[key][name_in_dict], f"{name}.{name_in_dict}.")
        elif child is not None and dataclasses.is_dataclass(child):
            yield from _unknown_keys(cast(type, child), values[key], f"{name}.")


def _did_you_mean(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f" Did you mean '{near[0]}'?"
    return f" There is: {', '.join(choices)}." if choices else ""
