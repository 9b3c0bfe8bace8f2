"""configs/datasets: every stage of every kind of data, on small real data, with nothing set but paths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import write_lerobot
from dataset_stages import KINDS, config_of, one_step

from defi_models import presets
from defi_models.pretrained.folder import make_header
from defi_platform.config import FinetuneConfig, IngestConfig, PretrainBothConfig, ServeConfig
from defi_platform.data.ingest import probe_actors
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.errors import ConfigError, UserError
from defi_platform.serve.observation import Observation, PolicySpec, read_observation
from defi_platform.serve.policy_folder import load_policy, policy_spec
from defi_platform.train.config_checks import check_train_config
from defi_platform.train.driver.finetune import finetune
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe

Home = Callable[[str], Path]


@pytest.fixture
def home(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Makes the folder of corpora and runs of one kind, its corpora where its data.yaml looks for them."""
    monkeypatch.setenv("DEFI_HOME", str(tmp_path))
    monkeypatch.setattr(probe_actors, "FEW_FILES", 1000)  # in this process

    def made(kind: str) -> Path:
        (tmp_path / "corpora").mkdir()
        (tmp_path / "corpora" / kind).symlink_to(shared_data / KINDS[kind].data)
        if kind == "videos":
            write_lerobot(tmp_path / "corpora" / "robot", [12] * 8)
        return tmp_path

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_at_nano_size_takes_its_sizes_from_the_data(
    kind: str, home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home(kind)
    expected = KINDS[kind]
    manifest = ingest(config_of(IngestConfig, kind, "ingest_videos").data)
    assert len(manifest) > 0
    both = config_of(PretrainBothConfig, kind, "nano/pretrain")
    for model, recipe in (("gfdm", GFDMRecipe(both.gfdm)), ("gidm", GIDMRecipe(both.gidm))):
        one_step(recipe)
        assert (folder / kind / "nano" / model / "model" / "config.json").is_file()

    settings = config_of(FinetuneConfig, kind, "nano/finetune_policy")
    settings.dry_run = True
    assert (
        f"actions of {expected.action_dim} entries, states of {expected.read_dim or expected.state_dim}"
        in finetune(settings).text()
    )
    one_step(PolicyRecipe(settings))

    served = config_of(ServeConfig, kind, "nano/serve_policy")
    policy = load_policy(served.policy)
    spec = policy_spec(policy, served.policy)
    assert (spec.action_dim, spec.state_dim, spec.cameras) == (
        expected.action_dim,
        expected.state_dim,
        expected.cameras,
    )
    greeting = spec.metadata()["action"]
    assert json.loads(json.dumps(greeting)) == greeting
    for key, value in expected.contract.items():
        assert greeting[key] == value, key
    assert len(greeting["min"]) == expected.action_dim
    actions = policy.act(_batch(read_observation(_observation(spec), spec), spec))
    assert actions.shape == (1, spec.chunk, expected.action_dim) and torch.isfinite(actions).all()


def write_headers(runs: Path, preset: str) -> None:
    """The configurations of the two pretrained models, which is all that a dry run reads of them."""
    for name, config in (("gfdm", presets.gfdm(preset)), ("gidm", presets.gidm(preset))):
        model = runs / name / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(make_header(name, config)))


def _observation(spec: PolicySpec) -> dict[str, Any]:
    message: dict[str, Any] = {
        f"observation/images/{name}": np.zeros((90, 120, 3), np.uint8) for name in spec.cameras
    }
    return message | {"observation/state": np.zeros(spec.state_dim), "prompt": "go on", "seed": 0}


def _batch(observation: Observation, spec: PolicySpec) -> dict[str, Any]:
    assert observation.state is not None
    state = observation.state[None] if spec.state is None else spec.state.apply(observation.state[None])
    return {
        "images": torch.from_numpy(observation.images)[None],
        "text": [observation.prompt],
        "proprio": torch.from_numpy(state),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_size_passes_its_checks_before_anything_is_ingested(kind: str, home: Home) -> None:
    folder = home(kind)
    both = config_of(PretrainBothConfig, kind, "small/pretrain")
    for recipe in (GFDMRecipe(both.gfdm), GIDMRecipe(both.gidm)):
        check_train_config(recipe.config.train)
        recipe.check()
        assert "not ingested yet" in "".join(recipe.describe_data())
    write_headers(folder / kind / "small", "small")
    settings = config_of(FinetuneConfig, kind, "small/finetune_policy", ["dry_run=true"])
    check_train_config(settings.train)
    policy = PolicyRecipe(settings)
    policy.check()
    text = "".join(policy.describe_data())
    assert f"actions of {KINDS[kind].action_dim} entries" in text
    assert f"views: {KINDS[kind].cameras[0]} (compared over time)" in text
    served = config_of(ServeConfig, kind, "small/serve_policy")
    assert served.policy == f"{settings.train.output}/model"


@pytest.mark.parametrize("ingested", [False, True])
def test_a_size_that_contradicts_the_data_is_one_error_of_the_dry_run(ingested: bool, home: Home) -> None:
    folder = home("calvin")
    if ingested:
        ingest(config_of(IngestConfig, "calvin", "ingest_videos").data)
    write_headers(folder / "calvin" / "nano", "nano")

    def dry_run(*changes: str) -> str:
        return finetune(
            config_of(FinetuneConfig, "calvin", "nano/finetune_policy", ["dry_run=true", *changes])
        ).text()

    head = "model.overrides.adapter.head"
    right = dry_run(f"{head}.action_dim=7", f"{head}.proprio_dim=0", "model.overrides.views=2")
    assert "views: static (compared over time); then gripper" in right
    with pytest.raises(ConfigError) as error:
        dry_run(f"{head}.action_dim=4", f"{head}.proprio_dim=9", "model.overrides.views=1")
    for part in (
        "action_dim=4, actions have 7",
        "proprio_dim=9, states have 10",
        "views=1, the corpora have 2",
    ):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="in this order"):
        dry_run("model.overrides.cameras=[gripper,static]")
    with pytest.raises(ConfigError, match=r"data\.height=96, but the policy model 'nano' has height=64"):
        dry_run("data.height=96")
    with pytest.raises(ConfigError, match="a chunk has 1 to 10 actions"):
        dry_run("actions.execute_steps=11")
    for change, message in {
        "data.corpora.calvin.cameras.wrist=1": "cameras names 'wrist', which the corpus does not have",
        "data.corpora.calvin.state=[elbow]": r"state\[0\] is 'elbow', which the states do not have",
        "data.corpora.calvin.state=[15]": r"state\[0\] is 15; the states have entries 0 to 14",
        f"{head}.chunk=0": "model chunk is 0",
        "acting.sigma_min=99": r"acting\.sigma_min is 99; the policy samples from 80",
        "acting.clip=range": r"^acting\.clip is 'range'",
    }.items():
        with pytest.raises(UserError, match=message):
            dry_run(change)
    absent = ["data.corpora.gone.path=/nowhere", "data.corpora.gone.weight=0"]
    assert "then gripper" in dry_run(*absent)
    assert ("not ingested yet" in dry_run(*absent)) != ingested


def test_corpora_that_differ_are_one_error_of_the_dry_run(home: Home) -> None:
    folder = home("calvin")
    write_headers(folder / "calvin" / "nano", "nano")
    write_lerobot(folder / "corpora" / "robot", [12] * 4, cameras=("a", "b"))
    changes = ["dry_run=true", f"data.corpora.robot.path={folder}/corpora/robot"]
    settings = config_of(FinetuneConfig, "calvin", "nano/finetune_policy", changes)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match="calvin: actions of 7 entries, states of 10, 2 cameras; robot: actions of 4"
        ):
            finetune(settings)
        ingest(settings.data)
