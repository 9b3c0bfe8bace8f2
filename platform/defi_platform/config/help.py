"""The list of a job's config keys for `--help`, read from the dataclasses and the docs under their fields."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from defi_platform.config.fields import RESUME_RULES, resume_rule

WIDTH = 110
NAME = "NAME"
"""Stands for the name of an entry of a mapping, as in data.corpora.NAME.path."""


@dataclass(frozen=True)
class Key:
    """One config key that takes a value."""

    name: str
    """Dotted."""
    type: str
    """As annotated."""
    default: str
    """As YAML; "required" where there is none."""
    doc: str
    """Meaning, with unit; "" where the schema says nothing."""
    rule: str = ""
    """What may become of it in a run that has begun, one of RESUME_RULES; "" where it is of no run."""


def keys(schema: type, prefix: str = "", of_run: bool = False, rule: str | None = None) -> Iterator[Key]:
    """Every key of a config class, nested ones included, in the order of the fields.

    Args:
        schema: a dataclass of `defi_platform.config`.
        prefix: dotted, with a dot at its end; of nested classes.
        of_run: this is a part of the config of a run.
        rule: of that part for a run that goes on, where it has one.
    """
    of_run |= getattr(schema, "is_run", False)
    docs = field_docs(schema)
    types_ = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = prefix + field.name
        own = resume_rule(field, rule) if of_run else ""
        annotation = types_[field.name]
        nested, in_mapping = _nested(annotation)
        if nested is None:
            yield Key(name, str(field.type), _default(field), docs.get(field.name, ""), own)
            continue
        if in_mapping or annotation is not nested:
            # An empty mapping or a null may be given for the whole part.
            doc = docs.get(field.name) or (inspect.getdoc(nested) or "").partition("\n")[0]
            yield Key(name, str(field.type), _default(field), doc, own)
        below = f"{name}.{NAME}." if in_mapping else f"{name}."
        yield from keys(nested, below, of_run, field.metadata.get("resume", rule))


def keys_help(schema: type) -> str:
    """All keys of a config class with type, default and doc, for people."""
    lines = ["config keys, in the YAML file or as key=value:"]
    for key in keys(schema):
        lines.append(f"  {key.name}: {key.type} = {key.default}")
        doc = f"{key.doc} {RESUME_RULES[key.rule]}".strip() if key.rule else key.doc
        lines += textwrap.wrap(doc, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


@functools.cache
def field_docs(schema: type) -> dict[str, str]:
    """Docs of a dataclass's fields: the string under each, on one line. Inherited fields are included."""
    found: dict[str, str] = {}
    for cls in reversed(schema.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def _nested(annotation: Any) -> tuple[type | None, bool]:
    """The config class inside an annotation, and whether it is that of a mapping's values."""
    is_mapping = typing.get_origin(annotation) is dict
    parts = typing.get_args(annotation) or (annotation,)
    for part in parts:
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return part, is_mapping
    return None, False


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is MISSING or value is dataclasses.MISSING:
        return "required"
    return _yaml(value)


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value)
