"""Configuration: files, inheritance, overrides, and errors that name the fix."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from defi_platform.config import (
    CompareConfig,
    CorpusConfig,
    DemoConfig,
    EncodeConfig,
    EvaluateConfig,
    ExportConfig,
    ExportEvaluationConfig,
    FinetuneConfig,
    IngestConfig,
    InspectConfig,
    InstallConfig,
    LaryBenchConfig,
    ModelConfig,
    OfflineConfig,
    PretrainBothConfig,
    PretrainConfig,
    RecordConfig,
    ServeConfig,
    TuneConfig,
)
from defi_platform.config.fields import RESUME_RULES, changes
from defi_platform.config.help import keys, keys_help
from defi_platform.config.loader import data_home, load_config, parse_arguments, to_mapping, to_yaml
from defi_platform.config.paths import absolute_paths
from defi_platform.errors import ConfigError

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
NOT_FROM_CONFIG = {"source_tree", "check_cluster", "status", "supervise"}
"""Without a config of their own."""
JOBS = sorted(path for path in (REPOSITORY / "jobs").glob("*.py") if path.stem not in NOT_FROM_CONFIG)
WITHOUT_TORCH_AND_RAY = """
import contextlib, io, json, os, runpy, sys
sys.modules.update(torch=None, ray=None)
argument, *jobs = sys.argv[1:]
path, environment, modules, answers = sys.path[:], dict(os.environ), set(sys.modules), {}
for job in jobs:
    # As in a process of its own, but for the packages that others install.
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in ("defi_platform", "defi_models", "defi_client", "source_tree"):
            del sys.modules[name]
    os.environ.clear(), os.environ.update(environment)
    sys.path[:], sys.argv = [job.rpartition("/")[0], *path], [job, argument]
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            runpy.run_path(job, run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
    answers[job.rpartition("/")[2]] = [code, out.getvalue(), error.getvalue()]
print(json.dumps(answers))
"""
"""Starts jobs, one after the other, where an import of either is an error."""
SCHEMAS = {
    "record_demos": RecordConfig,
    "ingest_videos": IngestConfig,
    "encode_latents": EncodeConfig,
    "inspect_corpus": InspectConfig,
    "pretrain_gfdm": PretrainConfig,
    "pretrain_gidm": PretrainConfig,
    "pretrain_gfdm_table": PretrainConfig,
    "pretrain_gidm_table": PretrainConfig,
    "pretrain": PretrainBothConfig,
    "finetune_policy_table": FinetuneConfig,
    "finetune_policy": FinetuneConfig,
    "serve_policy": ServeConfig,
    "export_model": ExportConfig,
    "export_larybench": LaryBenchConfig,
    "evaluate_policy": EvaluateConfig,
    "evaluate_offline": OfflineConfig,
    "calvin": EvaluateConfig,
    "calvin_released": EvaluateConfig,
    "install_benchmark": InstallConfig,
    "tune_evaluation": TuneConfig,
    "compare_evaluations": CompareConfig,
    "export_evaluation": ExportEvaluationConfig,
    "demo": DemoConfig,
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text("train: {output: out, steps: 7, seed: 3}\ndata: {manifest: m}\n")
    (tmp_path / "run.yaml").write_text(
        "extends: base.yaml\ntrain: {steps: 5}\ndata: {corpora: {robots: {path: x, weight: 2}}}\n"
    )
    return tmp_path


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_configuration_file_fits_its_schema_and_survives_being_stored(
    path: Path, tmp_path: Path
) -> None:
    config = load_config(SCHEMAS[path.stem], path)
    stored = tmp_path / "stored.yaml"
    stored.write_text(to_yaml(config))
    assert to_mapping(load_config(SCHEMAS[path.stem], stored)) == to_mapping(config)


def test_a_file_wins_over_what_it_extends_and_the_command_line_over_both(files: Path) -> None:
    config = parse_arguments(PretrainConfig, ["--config", str(files / "run.yaml"), "train.seed=9"])
    assert (config.train.steps, config.train.seed, config.train.output) == (5, 9, "out")
    assert config.data.corpora["robots"].weight == 2.0


def test_a_mapping_that_names_all_entries_anew_has_their_order(files: Path) -> None:
    order = "{data: {corpora: {robots: {cameras: %s}}}, extends: %s}"
    for name, cameras, base in (
        ("static", "{static: 1, gripper: 1}", "run.yaml"),
        ("gripper", "{gripper: 1, static: 1}", "static.yaml"),
    ):
        (files / f"{name}.yaml").write_text(order % (cameras, base))

    def views(name: str, *overrides: str) -> list[str]:
        config = load_config(
            PretrainConfig, files / f"{name}.yaml", [f"data.corpora.robots.cameras{o}" for o in overrides]
        )
        return list(config.data.corpora["robots"].cameras)

    assert views("static") == views("gripper", "={static: 1, gripper: 1}") == ["static", "gripper"]
    assert views("gripper") == views("static", "={gripper: 1, static: 1}") == ["gripper", "static"]
    assert views("static", ".gripper=0.5") == ["static", "gripper"], (
        "one entry alone says nothing of the order"
    )


@pytest.mark.parametrize(
    ("override", "named", "fix"),
    [
        ("train.stepz=1", "train.stepz", "train.steps"),
        ("data.corpora.robots.pth=y", "data.corpora.robots.pth", "data.corpora.robots.path"),
        ("data.decode.timeout=1", "data.decode.timeout", "data.decode.timeout_s"),
        ("trian.steps=1", "trian", "train"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_one_named(
    files: Path, override: str, named: str, fix: str
) -> None:
    with pytest.raises(ConfigError, match=f"'{named}'.*Did you mean '{fix}'"):
        load_config(PretrainConfig, files / "run.yaml", [override])


def answers(argument: str, folder: Path, **where: Any) -> dict[str, tuple[int, str, str]]:
    """Name of each job in a folder -> exit code, output and errors of `python jobs/NAME ARGUMENT`."""
    jobs = [str(folder / job.name) for job in JOBS]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH_AND_RAY, argument, *jobs],
        capture_output=True,
        text=True,
        **where,
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(answer) for name, answer in json.loads(done.stdout).items()}


@pytest.fixture(scope="module")
def complaints() -> dict[str, tuple[int, str, str]]:
    return answers("no_such_key=1", REPOSITORY / "jobs")


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_reports_a_mistake_in_its_config_before_it_imports_for_seconds(
    job: Path, complaints: dict[str, tuple[int, str, str]]
) -> None:
    code, _, errors = complaints[job.name]
    assert code == 2 and "ConfigError: " in errors
    assert "no_such_key" in errors


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree whose platform package says on stderr that it was imported."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "platform", "defi_models", "defi_client"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "platform" / "defi_platform" / "__init__.py").open("a") as module:
        module.write("\nimport sys\nprint(f'imported {__file__}', file=sys.stderr)\n")
    return copy


@pytest.fixture(scope="module")
def helps(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return answers("--help", checkout / "jobs", cwd=tmp_path_factory.mktemp("elsewhere"), env=environment)


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_the_help_of_a_job_in_a_bare_checkout_lists_every_key_and_imports_neither_torch_nor_ray(
    job: Path, checkout: Path, helps: dict[str, tuple[int, str, str]]
) -> None:
    code, shown, errors = helps[job.name]
    assert code == 0, errors
    assert f"imported {checkout / 'platform'}" in errors, "the packages of another checkout were used"
    # The supervisor has no config of its own: what follows the job's name is the job's.
    for key in keys(SCHEMAS[job.stem]) if job.stem != "supervise" else []:
        assert f"\n  {key.name}: {key.type} = {key.default}\n" in shown


@pytest.mark.parametrize("schema", sorted(set(SCHEMAS.values()), key=lambda one: one.__name__))
def test_every_config_key_is_documented(schema: type) -> None:
    assert [key.name for key in keys(schema) if not key.doc] == []


def test_the_help_knows_types_defaults_docs_and_the_entries_of_mappings() -> None:
    found = {key.name: key for key in keys(FinetuneConfig)}
    assert found["train.steps"].default == "100" and found["train.steps"].type == "int"
    assert found["gfdm"].default == "required" and found["gfdm"].doc.startswith("Model folder")
    assert found["train.use_gpu"].default == "false"
    assert found["train.resources_per_worker"].default == "{CPU: 1.0}"
    assert found["train.betas"].default == "[0.9, 0.999]"
    assert found["train.probe"].default == "null"
    assert {"data.corpora.NAME.path", "train.probe.corpora.NAME.windows.mode"} <= set(found)


def test_every_key_of_a_run_says_what_may_become_of_it_on_resume() -> None:
    rules: dict[str, set[str]] = {}
    for key in keys(FinetuneConfig):
        rules.setdefault(key.rule, set()).add(key.name)
    assert rules.keys() == set(RESUME_RULES)
    assert rules["restart"] == {
        f"train.{name}" for name in (
            "learning_rate", "weight_decay", "betas", "schedule", "warmup_steps", "clip_grad_norm", "precision",
            "ema_decay", "export_weights",
        )
    }  # fmt: skip
    assert rules["extend"] == {"train.steps"}
    assert rules["content"] == {
        "model.preset", "model.overrides", "model.init_from", "gfdm", "gidm", "data.cache",
    }  # fmt: skip
    assert {
        "train.seed",
        "train.noise",
        "train.global_batch",
        "data.height",
        "data.corpora.NAME.weight",
        "trainable",
    } <= rules["bound"]
    assert {"data.decode.processes", "ray.address", "tracking.wandb", "data.retry_quarantined"} <= rules[
        "free"
    ]
    assert {"acting.steps", "actions.kind", "train.probe.pairs"} <= rules["until_complete"]
    assert "On resume: fixed." in keys_help(FinetuneConfig)
    assert "On resume" not in keys_help(ServeConfig), "nothing of it is resumed"
    page = (REPOSITORY / "docs" / "resuming.md").read_text()
    assert [rule for rule in RESUME_RULES.values() if f"| {rule} |" not in page] == []


def test_settings_are_compared_with_those_that_a_run_was_begun_with() -> None:
    config = FinetuneConfig()
    config.data.corpora = {"robots": CorpusConfig(path="x"), "new": CorpusConfig(path="y")}
    now = to_mapping(config)
    before = copy.deepcopy(now)
    assert list(changes(config, now, before)) == []
    del before["data"]["corpora"]["robots"]["sampling"], before["train"]["seed"], before["acting"]
    assert list(changes(config, now, before)) == [], "a key that was not there yet had its default"
    before["data"]["corpora"]["old"] = before["data"]["corpora"].pop("new")
    before["data"]["corpora"]["robots"]["weight"] = 2.0
    before["data"]["decode"]["processes"] = before["ray"]["address"] = 7
    before["train"]["steps"] = 50
    assert {(one.key, one.before, one.now, one.rule) for one in changes(config, now, before)} == {
        ("data.corpora.new", None, "y", "bound"),
        ("data.corpora.old", "y", None, "bound"),
        ("data.corpora.robots.weight", 2.0, 1.0, "bound"),
        ("train.steps", 50, 100, "extend"),
    }


def test_every_path_of_a_config_becomes_absolute_and_nothing_else_changes(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(FinetuneConfig, files / "run.yaml", ["gfdm=s3://b/gfdm/", "gidm=models/gidm"])
    absolute = absolute_paths(config)
    assert config.data.corpora["robots"].path == "x", "the given config is left as it was"
    assert absolute.data.corpora["robots"].path == str(tmp_path / "x")
    assert (absolute.data.manifest, absolute.train.output) == (str(tmp_path / "m"), str(tmp_path / "out"))
    assert (absolute.gfdm, absolute.gidm) == ("s3://b/gfdm", str(tmp_path / "models" / "gidm"))
    assert absolute.data.cache is None and absolute.model.init_from is None
    before, after = to_mapping(config), to_mapping(absolute)
    assert before["tracking"] == after["tracking"] and before["data"]["decode"] == after["data"]["decode"]
    assert absolute_paths(absolute) == absolute


def test_an_empty_optional_path_is_no_path_and_not_the_working_directory() -> None:
    pretrain = absolute_paths(PretrainConfig(model=ModelConfig(init_from="")))
    assert pretrain.model.init_from is None
    # An export would replace the folder that it names.
    assert absolute_paths(ExportConfig(run="s3://b/run", output="")).output is None


def test_a_value_of_the_wrong_type_is_refused_with_its_key_and_place(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: 'train\.steps': .*'many'.*Integer"):
        load_config(PretrainConfig, files / "run.yaml", ["train.steps=many"])


@pytest.mark.parametrize(
    ("value", "complaint"),
    [("null", r"'data\.corpora'.*not Optional"), ("[1]", "list"), ("videos", r"'data\.corpora'.*str")],
)
def test_corpora_that_are_no_mapping_are_refused(files: Path, value: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml: .*{complaint}"):
        load_config(PretrainConfig, files / "run.yaml", [f"data.corpora={value}"])


def test_a_missing_value_is_named_with_the_way_to_set_it(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"'data\.manifest' has no value.*data\.manifest=VALUE"):
        load_config(PretrainConfig, tmp_path / "empty.yaml")


def test_an_evaluation_that_serves_no_policy_needs_none() -> None:
    arguments = ["output=/x", "tasks=[drawer-close-v3]"]
    for unserved in ("url=ws://host:8000", "arms=[random,expert]"):
        assert parse_arguments(EvaluateConfig, [*arguments, unserved]).output == "/x"
    with pytest.raises(ConfigError, match=r"'serve\.policy' has no value"):
        parse_arguments(EvaluateConfig, arguments)


def test_a_missing_file_names_its_neighbour(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"rum\.yaml does not exist.*Did you mean 'run\.yaml'"):
        load_config(PretrainConfig, files / "rum.yaml")


def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("train: {steps: [1")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not readable YAML"):
        load_config(PretrainConfig, tmp_path / "broken.yaml")


def test_an_argument_without_a_value_is_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="'resume' is not an override"):
        load_config(PretrainConfig, files / "run.yaml", ["resume"])


@pytest.mark.parametrize("item", ["train.output=:", "data.corpora={a", "train.betas=[0.9"])
def test_a_value_that_is_no_yaml_is_refused_with_its_argument(files: Path, item: str) -> None:
    with pytest.raises(ConfigError, match=f"'{re.escape(item)}': .* no YAML value .* quotes"):
        load_config(PretrainConfig, files / "run.yaml", [item])


def test_the_home_of_data_is_a_bucket_a_folder_or_beside_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEFI_HOME", "s3://robots/defi/")
    assert data_home() == "s3://robots/defi"
    monkeypatch.setenv("DEFI_HOME", str(tmp_path))
    assert data_home() == str(tmp_path)
    monkeypatch.delenv("DEFI_HOME")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert data_home() == str(tmp_path / "runs")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert data_home() == str(Path.home() / "defi")
