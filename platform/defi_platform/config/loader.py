"""Loading of a job's configuration: YAML file + dotted overrides -> a checked dataclass.

A YAML mapping may say `extends: other.yaml` (a path relative to the file it is in); its own keys then override the
ones it extends. A null takes an entry of a mapping such as data.corpora away. Unknown keys, wrong types and values outside
their range are errors before anything starts, and the message names the nearest existing key.

`${home:}` stands for the folder (or bucket) that holds corpora and runs: see `data_home`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import os
import re
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, Node, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from defi_models.errors import did_you_mean
from defi_platform.config.data import CorpusConfig
from defi_platform.config.data_checks import check_all
from defi_platform.config.evaluate import EvaluateConfig, OfflineConfig
from defi_platform.config.help import keys_help
from defi_platform.errors import ConfigError, one_line

Schema = TypeVar("Schema")

PACKAGED = Path(__file__).resolve().parents[1] / "configs"
"""The configs of configs/, which travel with the package."""


def data_home() -> str:
    """The folder or bucket of corpora and runs.

    DEFI_HOME (a folder or s3:// URL) if set, else `runs` next to the virtual environment in use, else ~/defi.

    Never relative to the working directory: under `ray job submit --working-dir .` that is a temporary copy
    which Ray deletes, and which differs from node to node.
    """
    home = os.environ.get("DEFI_HOME")
    if home:
        return home.rstrip("/") if "://" in home else str(Path(home).expanduser().absolute())
    if sys.prefix != sys.base_prefix:
        return str(Path(sys.prefix).parent / "runs")
    return str(Path.home() / "defi")


OmegaConf.register_resolver("home", data_home, replace=True)


class _Parser(argparse.ArgumentParser):
    """A parser whose `--help` also lists the config keys, which are read only then."""

    def __init__(self, schema: type, description: str) -> None:
        super().__init__(description=description)
        self._schema = schema

    def format_help(self) -> str:
        return f"{super().format_help()}\n{keys_help(self._schema)}"


def parse_arguments(
    schema: type[Schema],
    argv: Sequence[str] | None = None,
    flags: Mapping[str, str] | None = None,
    description: str | None = None,
    positional: str | None = None,
) -> Schema:
    """Parses a job's command line: `--config FILE` and any number of `dotted.key=value`.

    Args:
        schema: the job's config class.
        argv: arguments; None: those of the process.
        flags: further options, each with the override that it stands for.
        description: of the job, for --help; None: the docstring of `schema`.
        positional: key of a list that takes every argument which is no override; None: there are no such arguments.

    Returns: the checked config.
    Raises: ConfigError for a file that is absent or damaged, an unknown key, a wrong type, a missing value.
    """
    parser = _Parser(schema, (description or schema.__doc__ or "").strip())
    parser.add_argument("--config", metavar="FILE", help="YAML file; see configs/, which the package has too")
    if positional:
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar=f"{positional.upper()} | key=value",
            help="paths and dotted overrides",
        )
    else:
        parser.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted overrides: train.steps=10"
        )
    for flag, override in (flags or {}).items():
        parser.add_argument(flag, dest="flag_overrides", action="append_const", const=override, help=override)
    arguments = parser.parse_intermixed_args(argv)
    overrides = [*arguments.overrides, *(getattr(arguments, "flag_overrides", None) or [])]
    if positional:
        # A path that looks like an override is written as ./a=b.
        plain = [item for item in overrides if not re.match(r"[A-Za-z_][\w.]*=", item)]
        if plain:
            overrides = [f"{positional}={json.dumps(plain)}", *(one for one in overrides if one not in plain)]
    return load_config(schema, arguments.config, overrides)


def load_config(schema: type[Schema], path: str | Path | None, overrides: Sequence[str] = ()) -> Schema:
    """Builds a checked config from defaults, a YAML file and overrides; later ones override earlier ones.

    Args:
        schema: the config class.
        path: YAML file, see `find_config`; None: defaults and overrides only.
        overrides: each `dotted.key=value`.

    Raises: ConfigError, see `parse_arguments`.
    """
    from_file = OmegaConf.create(read_yaml(find_config(path)) if path else {})
    for item in overrides:
        if "=" not in item:
            raise ConfigError(
                f"'{item}' is not an override; write it as dotted.key=value, e.g. train.steps=10."
            )
    source = str(path or "the command line")
    changes = OmegaConf.create({})
    for item in overrides:
        try:
            changes.merge_with_dotlist([item])
        except YAMLError as error:
            raise ConfigError(
                f"'{item}': what stands behind '=' is no YAML value ({one_line(error)}); put it into quotes."
            ) from error
    for entries, name in _entries_without_use(schema, changes):
        key = f"{entries._get_full_key(name)}"
        there = OmegaConf.select(from_file, entries._get_full_key(None))
        if entries._get_node(name)._is_none() and name not in (there or ()):  # type: ignore[union-attr]
            raise ConfigError(
                f"{key}=null takes nothing away.{did_you_mean(name, sorted(map(str, there or ())))}"
            )
    own = cast(dict[Any, Any], OmegaConf.to_container(changes))
    values = _overridden(cast(dict[Any, Any], OmegaConf.to_container(from_file)), own)
    return _checked(schema, OmegaConf.create(values), source)


def from_mapping(schema: type[Schema], values: Any, source: str) -> Schema:
    """Builds a checked config from a plain mapping.

    Args:
        schema: the config class.
        values: nested mappings of its fields.
        source: named in errors, such as the file that the values are from.

    Raises: ConfigError for an unknown key, a wrong type, a missing value.
    """
    return _checked(schema, OmegaConf.create(values), source)


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, as it is stored in run folders."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def to_mapping(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain dicts and lists."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), resolve=True))


def find_config(path: str | Path) -> Path:
    """The config file of a path: where it says, else the one of the package, with or without `configs/` before it.

    Raises: ConfigError naming both places.
    """
    given = Path(path)
    if given.is_file():
        return given
    inside = Path(*given.parts[1:]) if given.parts[:1] == (PACKAGED.name,) else given
    packaged = PACKAGED / inside
    if packaged.is_file() and not given.is_absolute():
        return packaged
    folders = [folder for folder in (given.parent, packaged.parent) if folder.is_dir()]
    present = sorted({file.name for folder in folders for file in folder.glob("*.yaml")})
    raise ConfigError(
        f"config file {given} does not exist, neither in {Path.cwd()} nor among the configs of the package in "
        f"{PACKAGED}.{did_you_mean(given.name, present)}"
    )


def read_yaml(path: Path) -> dict[Any, Any]:
    """The content of a YAML file, with those that it extends.

    Raises: ConfigError for a file that is absent or damaged.
    """
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"config file {path} does not exist.{did_you_mean(path.name, present)}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # OmegaConf raises whatever its YAML reader does
        raise ConfigError(f"config file {path} is not readable YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} holds a list; a mapping of keys to values is expected.")
    return _extended(content, path.parent)


def _extended(own: dict[Any, Any], folder: Path) -> dict[Any, Any]:
    # On plain mappings: OmegaConf copies a mapping with all that is in it for every entry that is set.
    own = {key: _extended(value, folder) if isinstance(value, dict) else value for key, value in own.items()}
    return _overridden(read_yaml(folder / own.pop("extends")), own) if "extends" in own else own


def _overridden(base: dict[Any, Any], own: dict[Any, Any]) -> dict[Any, Any]:
    # A mapping that names all entries anew has their order: of cameras, it is the order of a policy's views.
    values = {key: base.get(key) for key in own} if own.keys() >= base.keys() else dict(base)
    for key, value in own.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        values[key] = _overridden(base[key], value) if nested else value
    return values


def _merged(source: str, *parts: Any) -> Any:
    try:
        return OmegaConf.merge(*parts)
    except TypeError as error:  # OmegaConf's error for it names no key
        raise ConfigError(f"{source}: a list is in the place of a mapping of keys to values.") from error


def _checked(schema: type[Schema], values: Any, source: str) -> Schema:
    for key, siblings in _unknown_keys(schema, values):
        raise ConfigError(f"{source}: there is no key '{key}'.{did_you_mean(key, siblings)}")
    for wrong in _misfits(schema, values):
        raise ConfigError(f"{source}: {wrong}")
    values = copy.deepcopy(values)
    for entries, name in list(_entries_without_use(schema, values)):
        del entries[name]
    try:
        merged = _merged(source, _structured(cast(type, schema)), values)
        serves_nothing = (
            issubclass(schema, EvaluateConfig) and (merged.url or "policy" not in merged.arms)
        ) or (schema is OfflineConfig and merged.url)
        if serves_nothing and OmegaConf.is_missing(merged.serve, "policy"):
            merged.serve.policy = ""
        config = cast(Schema, OmegaConf.to_object(merged))
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{source}: '{error.full_key}' has no value; set it in the file or add {error.full_key}=VALUE."
        ) from error
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"{source}: '{error.full_key}': {message}") from error
    check_all(config)
    return config


@functools.cache
def _structured(schema: type) -> Any:
    """The defaults of a config class, only to be read: making them takes longer than all else that is done here."""
    return OmegaConf.structured(schema)


def _entries_without_use(schema: type, values: Any) -> Iterator[tuple[DictConfig, str]]:
    """Yields (mapping, name) of its entries that are null, and of corpora of weight 0, which need no path."""
    if not isinstance(values, DictConfig) or values._is_none() or not dataclasses.is_dataclass(schema):
        return
    structured = _structured(schema)
    for field in dataclasses.fields(schema):
        part, node = values._get_node(field.name), structured._get_node(field.name)
        if not isinstance(part, DictConfig) or part._is_none():
            continue
        element = node._metadata.element_type if isinstance(node, DictConfig) else None
        if not dataclasses.is_dataclass(element):
            # An optional part that is null by default has no type of its own.
            kind = OmegaConf.get_type(node)
            kind = kind if dataclasses.is_dataclass(kind) else node._metadata.ref_type
            yield from _entries_without_use(cast(type, kind), part)
            continue
        for name in list(part):
            entry = part._get_node(name)
            assert isinstance(entry, Node)
            unused = entry._is_none()
            if element is CorpusConfig and isinstance(entry, DictConfig) and not unused:
                unused = entry.get("weight") == 0 and not entry.get("path")
            if unused:
                yield part, cast(str, name)


def _misfits(schema: type, values: Any, prefix: str = "") -> Iterator[str]:
    """Yields, with the way to write it, what has another shape than its field: a name for a list, nothing for a value."""
    if not isinstance(values, DictConfig) or values._is_none() or not dataclasses.is_dataclass(schema):
        return
    for name, kind in typing.get_type_hints(schema).items():
        node = values._get_node(name)
        if node is None or node._is_interpolation() or node._is_missing():
            continue
        key, given = f"{prefix}{name}", values[name]
        parts = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        optional = types.NoneType in parts
        plain = next(part for part in parts if part is not types.NoneType)
        if given is None:
            if not optional and typing.get_origin(plain) is not dict:
                bare = OmegaConf.is_missing(_structured(schema), name)
                yield f"{key} is empty; write {key}=VALUE{'' if bare else ', or leave it out for the default'}."
        elif dataclasses.is_dataclass(plain):
            if isinstance(given, DictConfig):
                yield from _misfits(cast(type, plain), given, f"{key}.")
            else:
                inside = [field.name for field in dataclasses.fields(plain)]
                first = "names" if "names" in inside and isinstance(given, str) else inside[0]
                yield f"{key} is a group of settings ({', '.join(inside)}); set one of them, e.g. {key}.{first}={given}."
        elif typing.get_origin(plain) is list and isinstance(given, str | int | float):
            yield f"{key} is a list; write {key}=[{given}]."


def _unknown_keys(schema: type, values: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yields (dotted unknown key, dotted keys of the same part) of a mapping against a dataclass."""
    if not isinstance(values, DictConfig) or values._is_none() or not dataclasses.is_dataclass(schema):
        return
    structured = _structured(schema)
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
            entries, element = values[key], cast(type, node._metadata.element_type)
            # Anything but a mapping, null included, is an error of the merge.
            for entry in entries if isinstance(entries, DictConfig) else ():
                yield from _unknown_keys(element, entries[entry], f"{name}.{entry!s}.")
        elif child is not None and dataclasses.is_dataclass(child):
            yield from _unknown_keys(cast(type, child), values[key], f"{name}.")
