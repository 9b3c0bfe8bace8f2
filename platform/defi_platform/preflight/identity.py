"""Identity of a process: its versions. The one check that runs on nodes whose image may lack the platform."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from defi_platform.preflight.findings import CLIENT, Finding, by_value, fail, named, number, ok, warn

SAME = ("torch", "deepspeed", "numpy", "pyarrow", "av", "omegaconf")
"""Packages whose release has to be the same everywhere: what they pickle, or compute, crosses nodes."""


def make_identity() -> Callable[[], dict[str, Any]]:
    """A function that finds out the versions of the process which runs it.

    It is made in here so that it is pickled with its code, not by name: a node that lacks the package can run it.

    Returns: a function that returns `python`, `ray`, `packages` {name: release or None}, `source` (digest of the
        platform's code) and `error` (why the platform cannot be imported; "" where it can).
    """
    names = list(SAME)

    def identity() -> dict[str, Any]:
        import importlib.metadata
        import platform
        import sys

        import ray

        packages: dict[str, str | None] = {}
        for name in [*names, "defi-platform"]:
            try:
                packages[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                packages[name] = None
        source, error = "", ""
        try:
            from pathlib import Path

            import defi_client
            import defi_models
            import defi_platform
            import defi_platform.preflight.probe
            from defi_platform.train.observability.code_version import source_digest

            parts = (defi_platform, defi_models, defi_client)
            source = source_digest(Path(part.__path__[0]) for part in parts)[:12]
        except Exception as problem:  # noqa: BLE001 - whatever an image lacks
            error = f"{type(problem).__name__}: {problem}"
        return {
            "python": platform.python_version(),
            "ray": ray.__version__,
            "packages": packages,
            "source": source,
            "error": error,
            "executable": sys.executable,
        }

    return identity


def judge_versions(found: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Compares the versions of all nodes with those of the client.

    Args:
        found: name of a node, or `CLIENT`, -> its identity.
    """
    findings = []
    ours = found[CLIENT]
    nodes = {name: identity for name, identity in found.items() if name != CLIENT}
    lacking = by_value({name: identity["error"] for name, identity in nodes.items() if identity["error"]})
    for error, names in lacking.items():
        findings.append(
            fail(
                "versions",
                f"{named(names, len(nodes))} cannot import the platform ({error}). Ship the code (`ray job submit "
                "--working-dir .`), or use an image that holds it (cluster/Dockerfile).",
            )
        )
    for title, of in _compared():
        for value, names in by_value({name: of(identity) for name, identity in nodes.items()}).items():
            if value != of(ours):
                findings.append(
                    fail(
                        "versions",
                        f"{named(names, len(nodes))}: {title} {value or 'is not installed'}, {CLIENT} has "
                        f"{of(ours) or 'none'}. {_FIX.get(title, _INSTALL)}",
                    )
                )
    sources = {identity["source"] for identity in nodes.values() if identity["source"]}
    if len(sources) > 1:
        groups = by_value(
            {name: identity["source"] for name, identity in nodes.items() if identity["source"]}
        )
        findings.append(
            fail(
                "versions",
                "nodes run different code: " + "; ".join(f"{named(n)} {s}" for s, n in groups.items()),
            )
        )
    elif sources and ours["source"] and sources != {ours["source"]}:
        findings.append(
            warn(
                "versions",
                f"the nodes run code {sources.pop()}, {CLIENT} {ours['source']}: a job that is submitted from here "
                "with its code runs this client's, one of the image runs the nodes'.",
            )
        )
    if not findings:
        packages = ours["packages"]
        findings.append(
            ok(
                "versions",
                f"{number(len(nodes), 'node')} and {CLIENT}: Python {ours['python']}, Ray {ours['ray']}, torch "
                f"{packages.get('torch')}, platform {packages.get('defi-platform') or 'not installed, shipped'} "
                f"(code {ours['source']})",
            )
        )
    return findings


_INSTALL = "Install the releases of constraints.txt everywhere."
_FIX = {
    "Python": "Ray moves pickles between nodes: use the same minor release everywhere.",
    "Ray": "All nodes and clients need the same release.",
}


def _compared() -> list[tuple[str, Callable[[Mapping[str, Any]], object]]]:
    def package(name: str) -> Callable[[Mapping[str, Any]], object]:
        return lambda identity: identity["packages"].get(name)

    minor: Callable[[Mapping[str, Any]], object] = lambda found: ".".join(found["python"].split(".")[:2])  # noqa: E731
    return [("Python", minor), ("Ray", lambda found: found["ray"]), *((name, package(name)) for name in SAME)]
