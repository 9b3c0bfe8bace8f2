"""How the code explains itself: every public name has a docstring that names the thing, in the field's words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("platform", "defi_models", "defi_client")

RELATIVE_CLAUSE = re.compile(r"(What|Which|Where|How|Who|Why|When)\b")
"""Openings that describe a thing without naming it: "What a corpus has" instead of "Listing of a corpus"."""

PRIVATE_WORDS = re.compile(r"\b(verdicts?|claims?|spool|told|beside training|the door)\b", re.IGNORECASE)
"""Words of this project's past for what the field calls probe result, record, spill file, message, asynchronous
validation and ingress."""

ORDINARY_USES = {
    ("tasks.py", ' the door",'): "the instruction of a Meta-World task",
    ("sequences.py", "the door is"): "the sliding door of CALVIN's table",
}
"""(file, words) -> reason why they stay."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A module, class or function of the product."""

    place: str
    node: ast.Module | ast.ClassDef | Function
    public: bool

    @property
    def docstring(self) -> str | None:
        return ast.get_docstring(self.node)


@cache
def definitions() -> list[Definition]:
    """All modules of the product with their classes, methods and functions; not those inside functions."""

    def inside(node: ast.Module | ast.ClassDef, place: str, public: bool) -> Iterator[Definition]:
        for child in node.body:
            if isinstance(child, ast.ClassDef | Function):
                named = public and not child.name.startswith("_")
                name = f"{place}:{child.lineno} {child.name}"
                yield Definition(name, child, named)
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, place, named)

    found = []
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            module, place = ast.parse(file.read_text()), str(file.relative_to(REPOSITORY))
            found.append(Definition(place, module, public=True))
            found += inside(module, place, public=True)
    assert len(found) > 1000
    return found


def _overrides(node: ast.AST) -> bool:
    names = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(name.split(".")[-1] in ("overload", "override") for name in names)


def test_every_module_and_public_name_has_a_docstring() -> None:
    without = [d.place for d in definitions() if d.public and not d.docstring and not _overrides(d.node)]
    assert not without, "\n".join(without)


def test_docstrings_name_the_thing() -> None:
    opening = [d.place for d in definitions() if d.docstring and RELATIVE_CLAUSE.match(d.docstring)]
    assert not opening, "\n".join(opening)


def test_public_functions_of_three_parameters_or_more_say_what_each_is() -> None:
    without = []
    for definition in definitions():
        node = definition.node
        if not definition.public or not isinstance(node, Function) or _overrides(node):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
        if len(names) >= 3 and "Args:" not in (definition.docstring or ""):
            without.append(f"{definition.place}({', '.join(names)})")
    assert not without, "\n".join(without)


def test_the_words_are_the_fields() -> None:
    files = [file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py")]
    files += [*(REPOSITORY / "jobs").glob("*.py"), *(REPOSITORY / "configs").rglob("*.yaml")]
    files += [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    found, used = [], set()
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            for match in PRIVATE_WORDS.finditer(line):
                allowed = [
                    use
                    for use in ORDINARY_USES
                    if use[0] == file.name and match[0] in use[1] and use[1] in line
                ]
                used.update(allowed)
                if not allowed:
                    found.append(f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
    assert used == ORDINARY_USES.keys(), "an ordinary use that is gone needs no exception"


@pytest.mark.parametrize(
    ("text", "matches"),
    [("How far it is", True), ("However far", False), ("Distance", False), ("Which one", True)],
)
def test_the_search_for_openings_knows_a_relative_clause(text: str, matches: bool) -> None:
    assert bool(RELATIVE_CLAUSE.match(text)) is matches
