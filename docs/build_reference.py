"""Build the API reference from the docstrings (what `make docs` calls): python docs/build_reference.py FOLDER [--no-source]

Half of the time goes into the colours of the source code that each page can show.
"""

from __future__ import annotations

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("defi_models", "defi_platform", "defi_client")
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]


def list_submodules(name: str) -> None:
    """Adds the modules of a package to its `__all__`, by which pdoc chooses the pages it makes."""
    package = import_module(name)
    found = list(pkgutil.iter_modules(package.__path__))
    if hasattr(package, "__all__"):
        package.__all__ = [*package.__all__, *(module.name for module in found)]
    for module in found:
        if module.ispkg:
            list_submodules(f"{name}.{module.name}")


def main(folder: str, *options: str) -> None:
    """Writes one page per module, an index and the search."""
    import pdoc

    for package in PACKAGES:
        list_submodules(package)
    pdoc.render.configure(docformat="google", show_source="--no-source" not in options)
    pdoc.pdoc(*PACKAGES, output_directory=Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
