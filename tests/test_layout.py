"""The layout that docs/architecture.md describes: small files, small folders, imports that only point downwards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {"defi_client": REPOSITORY, "defi_models": REPOSITORY, "defi_platform": REPOSITORY / "platform"}

MAX_LINES, MAX_MODULES = 400, 12

LAYERS = [
    {"defi_client", "defi_models", "defi_platform.logs", "defi_platform.metrics"},
    {"defi_platform.errors", "defi_platform.retry"},
    {"defi_platform.storage"},
    {"defi_platform.config"},
    {"defi_platform.roles"},
    {"defi_platform.cluster", "defi_platform.progress"},
    {"defi_platform.data.rejection", "defi_platform.data.tables"},
    {"defi_platform.data.manifest"},
    {"defi_platform.data.sources", "defi_platform.data.sampling"},
    {"defi_platform.data.decode"},
    {"defi_platform.data.ingest", "defi_platform.data.latents"},
    {"defi_platform.data.loader"},
    {"defi_platform.train"},
    {"defi_platform.serve"},
    {"defi_platform.evaluate"},
    {"defi_platform.encode_latents", "defi_platform.larybench", "defi_platform.demo"},
    {"defi_platform.supervise"},
    {"defi_platform.preflight", "defi_platform.status"},
    {"defi_platform.command", "defi_platform.jobs"},
]
"""The folders and files of the product from the lowest layer to the highest. A module imports from its own folder and
from layers below it; folders that share a layer do not import each other."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all modules of the product; a package's own file is its `__init__`."""
    found = {}
    for package, root in ROOTS.items():
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, functions' included, except those for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not _for_type_checkers(child):
            yield from _imports(child)


@cache
def edges() -> dict[str, set[str]]:
    """Module -> modules of the product that it imports."""
    found: dict[str, set[str]] = {}
    for module, file in modules().items():
        targets: set[str] = set()
        for statement in _imports(ast.parse(file.read_text())):
            if isinstance(statement, ast.Import):
                targets |= {alias.name for alias in statement.names}
                continue
            assert not statement.level, f"{file}: relative import; the product's imports are absolute"
            base = statement.module or ""
            # `from package import module` and `from module import name` look alike.
            targets |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base
                for alias in statement.names
            }
        found[module] = {target for target in targets if target in modules()} - {module}
    return found


def layer_of(module: str) -> tuple[int, str]:
    """Number and name of the layer's member that holds a module."""
    for number, members in enumerate(LAYERS):
        for member in members:
            if module == member or module.startswith(f"{member}."):
                return number, member
    raise AssertionError(f"{module} is in no layer: name it in LAYERS, where it may import what lies below")


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a directed graph, closed; [] when there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_the_search_for_circles_finds_one() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    assert circle(edges()) == []


def test_folders_do_not_import_each_other_in_circles() -> None:
    folders: dict[str, set[str]] = {}
    for module, targets in edges().items():
        source = _folder(module)
        for target in map(_folder, targets):
            # A package's own files and those of its sub-packages form one unit upwards, not a circle.
            if target != source and not f"{source}.".startswith(f"{target}."):
                folders.setdefault(source, set()).add(target)
    assert circle(folders) == []


def _folder(module: str) -> str:
    return module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]


def test_imports_point_to_lower_layers_only() -> None:
    upward = []
    for module, targets in edges().items():
        if module in ("defi_platform", "defi_platform.data"):
            continue
        number, member = layer_of(module)
        for target in targets - {"defi_platform", "defi_platform.data"}:
            lower, other = layer_of(target)
            if lower > number or (lower == number and other != member):
                upward.append(f"{module} imports {target}")
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize(
    "folder", ["platform", "defi_models", "defi_client", "cluster", "jobs", "benchmarks", "tests"]
)
def test_files_have_at_most_400_lines_and_folders_at_most_12_modules(folder: str) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    lengths = {str(file.relative_to(REPOSITORY)): len(file.read_text().splitlines()) for file in files}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
    if folder in ("platform", "defi_models", "defi_client", "cluster"):
        counts: dict[str, int] = {}
        for file in files:
            if file.name != "__init__.py":
                name = str(file.parent.relative_to(REPOSITORY))
                counts[name] = counts.get(name, 0) + 1
        # One module per job, as in jobs/.
        counts.pop("platform/defi_platform/jobs", None)
        assert {name: count for name, count in counts.items() if count > MAX_MODULES} == {}


def test_every_folder_of_the_product_says_in_one_sentence_what_it_is() -> None:
    wrong = []
    for module, file in modules().items():
        if file.name != "__init__.py":
            continue
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
        first = " ".join(text.split("\n\n")[0].split())
        if not first.endswith(".") or ". " in first:
            wrong.append(f"{module}: {first!r}")
    assert not wrong, "\n".join(wrong)


def test_no_folder_of_the_product_lacks_its_init_and_platform_has_none() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists(), (
        "it would shadow the standard library's module"
    )
    folders = {file.parent for file in modules().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_modules_are_named_after_what_they_know() -> None:
    vague = {"utils", "util", "helpers", "common", "misc", "manager"}
    assert [name for name in modules() if vague & set(name.split("."))] == []


def test_layers_are_declared_once_and_hold_something() -> None:
    members = [member for layer in LAYERS for member in layer]
    assert len(members) == len(set(members))
    assert [member for member in members if member not in modules()] == []
