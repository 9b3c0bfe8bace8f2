"""What cluster/render.py makes of values, rendered in this process, and the checks of Kubernetes and KubeRay on it."""

from __future__ import annotations

import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import render
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource
from rendering.checks import check
from rendering.values import ClusterValues

from defi_platform.config.loader import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES = REPOSITORY / "cluster" / "values"
SCHEMAS = REPOSITORY.parent / "shared" / "kuberay"
"""CRD schemas of KubeRay 1.7; they are not part of the repository."""
KUBERNETES = "1.31.0"
"""Version whose schemas the objects have to fit: the oldest but few that KubeRay 1.7 runs on."""
SHELLCHECK = str(Path(sys.executable).with_name("shellcheck"))
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}


def files(target: str, config: str, *overrides: str) -> dict[str, str]:
    """Name -> text of the rendered files.

    Args:
        target: kind of cluster.
        config: file in cluster/values.
        overrides: dotted.key=value.
    """
    return dict(_files(target, config, overrides))


@cache
def _files(target: str, config: str, overrides: tuple[str, ...]) -> dict[str, str]:
    values = load_config(ClusterValues, VALUES / config, overrides)
    check(values, target)
    return render.RENDERERS[target](values)


@cache
def _objects(config: str, overrides: tuple[str, ...]) -> str:
    texts = files("kuberay", config, *overrides).values()
    return json.dumps([item for text in texts for item in yaml.load_all(text, Loader=yaml.CSafeLoader)])


def objects(config: str, *overrides: str) -> list[dict[str, Any]]:
    """All Kubernetes objects of values."""
    found: list[dict[str, Any]] = json.loads(_objects(config, overrides))
    return found


def of_kind(kind: str, config: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Name -> object, of one kind."""
    found = [item for item in objects(config, *overrides) if item["kind"] == kind]
    return {item["metadata"]["name"]: item for item in found}


def cluster_of(item: dict[str, Any]) -> dict[str, Any]:
    """The specification of the Ray cluster in one of KubeRay's objects."""
    spec: dict[str, Any] = item["spec"]
    for key in ("rayClusterSpec", "rayClusterConfig"):
        spec = spec.get(key, spec)
    return spec


def pods_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Pod templates of an object of any kind."""
    if item["kind"] == "Job":
        return [item["spec"]["template"]]
    if item["kind"] not in RAY_KINDS:
        return []
    cluster = cluster_of(item)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = item["spec"].get("submitterPodTemplate")
    return [group["template"] for group in groups] + ([submitter] if submitter else [])


def validate(item: dict[str, Any]) -> None:
    """Checks an object against the schemas of Kubernetes and KubeRay; keys that they do not know are errors.

    Raises: jsonschema.ValidationError.
    """
    if item["kind"] not in RAY_KINDS:
        _check(json.dumps(item), item["kind"], item["apiVersion"])
        return
    for pod in pods_of(item):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **pod}
        _check(json.dumps(whole), "Pod", "v1")
    _crd(RAY_KINDS[item["kind"]]).validate(item)


@cache  # The same pods come again and again.
def _check(text: str, kind: str, version: str) -> None:
    _kubernetes(kind, version).validate(json.loads(text))


@cache
def _kubernetes(kind: str, version: str) -> jsonschema.Draft202012Validator:
    # As kubernetes_validate.validate does, which reads the schemas of all kinds again for every object.
    folder = f"kubernetes-json-schema/v{KUBERNETES}-local-strict"
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)
    schema = schema_contents(f"{folder}/{kind.lower()}-{name}.json", KUBERNETES)
    return jsonschema.Draft202012Validator(schema, registry=_definitions())


@cache
def _definitions() -> Registry[Any]:
    folder = f"kubernetes-json-schema/v{KUBERNETES}-local-strict"
    found = Resource.from_contents(schema_contents(f"{folder}/_definitions.json", KUBERNETES))
    return (found @ Registry()).crawl()


@cache
def _crd(plural: str) -> jsonschema.Draft202012Validator:
    file = SCHEMAS / f"{plural}.v1.schema.json"
    if not file.is_file():
        pytest.skip(f"{file.name} of KubeRay 1.7 is not here: {SCHEMAS}")
    return jsonschema.Draft202012Validator(_closed(json.loads(file.read_text())))


def _closed(schema: Any) -> Any:
    """The schema with unknown keys forbidden, as the API server reports them."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(part) for key, part in schema.items()}
    if "properties" in closed and closed.get("type") == "object":
        open_ = closed.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in closed
        if not open_ and closed["properties"]:
            closed["additionalProperties"] = False
    return closed
