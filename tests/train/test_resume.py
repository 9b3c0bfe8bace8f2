"""What a run that goes on may change, and how: another setting or input than it was begun with is never taken in silence."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from begun_runs import change_config, reached
from in_process import prepare, train_here, work

from defi_models import presets
from defi_models.pretrained.folder import make_header
from defi_platform import storage
from defi_platform.config import FinetuneConfig, ModelConfig, PretrainConfig, RayConfig
from defi_platform.errors import CheckpointError, ConfigError
from defi_platform.train.checkpoint import format as checkpoints
from defi_platform.train.driver import run as driver
from defi_platform.train.driver.run import check_resumable, complete_run
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.segments import Segment, continued, rate_of

Make = Callable[..., PretrainConfig]


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"step 12 with train\.seed=0, now it is 1.*choose another train\.output"),
        ({"learning_rate": 1e-3}, r"train\.learning_rate=0\.01, now it is 0\.001.*train\.restart_from=12"),
        ({"export_weights": "raw"}, r"jobs/export_model\.py run=.* weights=raw"),
        ({"steps": 6}, r"has reached step 12, train\.steps is 6\. Set train\.steps=12 or more"),
    ],
)
def test_a_complete_run_with_other_settings_is_refused_and_not_called_complete(
    changes: dict[str, Any], message: str, run_config: Make, tmp_path: Path
) -> None:
    reached(tiny.TinyRecipe(run_config(tmp_path)), 5, 12, complete=True)
    again = tiny.TinyRecipe(run_config(tmp_path))
    summary = complete_run(again)
    assert summary and summary.values["steps"] == 12
    assert complete_run(tiny.TinyRecipe(run_config(tmp_path, num_workers=2, keep_checkpoints=7)))
    with pytest.raises(ConfigError, match=message):
        complete_run(tiny.TinyRecipe(run_config(tmp_path, **changes)))


def test_a_complete_run_is_held_to_its_settings_after_its_checkpoints_were_deleted(
    run_config: Make, tmp_path: Path
) -> None:
    reached(tiny.TinyRecipe(run_config(tmp_path)), 12, complete=True)
    storage.delete(str(tmp_path / "checkpoints"))
    assert complete_run(tiny.TinyRecipe(run_config(tmp_path)))
    with pytest.raises(ConfigError, match=r"train\.seed=0, now it is 1"):
        complete_run(tiny.TinyRecipe(run_config(tmp_path, seed=1)))


def test_a_run_whose_config_is_gone_is_refused(run_config: Make, tmp_path: Path) -> None:
    reached(tiny.TinyRecipe(run_config(tmp_path)), 5)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.yaml.*Put the file back"):
        check_resumable(tiny.TinyRecipe(run_config(tmp_path)))


# --------------------------------------------------------------------------- inputs


@pytest.fixture
def policy(tmp_path: Path) -> FinetuneConfig:
    """A fine-tuning from two model folders, of which the driver reads nothing but contents."""
    for kind in ("gfdm", "gidm"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(make_header(kind, getattr(presets, kind)("nano"))))
        (folder / "model.safetensors").write_bytes(kind.encode())
    config = FinetuneConfig(gfdm=str(tmp_path / "gfdm"), gidm=str(tmp_path / "gidm"))
    config.data.manifest, config.train.output = str(tmp_path / "manifest"), str(tmp_path / "run")
    return config


def test_a_run_does_not_go_on_with_another_pretrained_model(policy: FinetuneConfig, tmp_path: Path) -> None:
    reached(PolicyRecipe(policy), 5)
    check_resumable(PolicyRecipe(policy))

    (tmp_path / "gfdm").rename(tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("nothing is loaded from it")
    elsewhere = replace(policy, gfdm=str(tmp_path / "moved"))
    check_resumable(PolicyRecipe(elsewhere))

    (tmp_path / "moved" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(
        CheckpointError, match=r"was built from another gfdm: .*gfdm \(digest \w{12}\) then, .*moved"
    ):
        check_resumable(PolicyRecipe(elsewhere))
    with pytest.raises(CheckpointError, match=r"gfdm does not exist"):
        check_resumable(PolicyRecipe(policy))


def test_a_complete_run_is_refused_for_other_inputs_and_stays_complete_without_them(
    policy: FinetuneConfig, tmp_path: Path
) -> None:
    reached(PolicyRecipe(policy), policy.train.steps, complete=True)
    assert complete_run(PolicyRecipe(policy))
    acting = replace(policy, acting=replace(policy.acting, steps=3))
    with pytest.raises(
        ConfigError, match=r"acting\.steps=null, now it is 3.*export_model\.py run=.* acting\.steps=3"
    ):
        complete_run(PolicyRecipe(acting))
    (tmp_path / "gidm" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(CheckpointError, match="was built from another gidm"):
        complete_run(PolicyRecipe(policy))
    storage.delete(policy.gidm)
    assert complete_run(PolicyRecipe(policy)), "it needs them no more"
    with pytest.raises(CheckpointError, match=r"other does not exist"):
        complete_run(PolicyRecipe(replace(policy, gidm=str(tmp_path / "other"))))


def test_how_a_run_acts_may_change_until_it_is_complete(policy: FinetuneConfig) -> None:
    reached(PolicyRecipe(policy), 5)
    check_resumable(PolicyRecipe(replace(policy, acting=replace(policy.acting, steps=3))))


def pretraining(tmp_path: Path, **model: Any) -> PretrainConfig:
    config = PretrainConfig(model=ModelConfig(**model))
    config.data.manifest, config.train.output = str(tmp_path / "manifest"), str(tmp_path / "run")
    return config


def test_a_run_does_not_go_on_with_another_backbone_or_a_cache_that_rounds(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(make_header("gidm", presets.gidm("nano"))))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    reached(GIDMRecipe(pretraining(tmp_path, init_from=str(tmp_path / "a"))), 5)
    with pytest.raises(CheckpointError, match=r"was built from another model\.init_from"):
        check_resumable(GIDMRecipe(pretraining(tmp_path, init_from=str(tmp_path / "b"))))
    config = pretraining(tmp_path, init_from=str(tmp_path / "a"))
    config.data.cache = str(tmp_path / "cache")
    for dtype, refused in (("float32", False), ("float16", True)):
        storage.write_text(str(tmp_path / "cache" / "encoder.json"), json.dumps({"dtype": dtype}))
        if refused:
            with pytest.raises(CheckpointError, match=r"another data\.cache: None \(digest none\) then"):
                check_resumable(GIDMRecipe(config))
        else:
            check_resumable(GIDMRecipe(config))


def test_a_model_is_compared_by_what_its_settings_mean(tmp_path: Path) -> None:
    reached(GIDMRecipe(pretraining(tmp_path, overrides={"encoder": {"dropout": 0.0}})), 5)
    check_resumable(GIDMRecipe(pretraining(tmp_path)))
    wrong = pretraining(tmp_path, overrides={"encoder": {"dropout": 0.5}})
    with pytest.raises(
        CheckpointError,
        match=r"encoder\.dropout 0\.0 there, 0\.5 in the config\. .* model\.overrides\.encoder\.dropout=0\.0",
    ):
        check_resumable(GIDMRecipe(wrong))


# --------------------------------------------------------------------------- older runs


def test_a_gidm_that_was_begun_with_dropout_goes_on_with_it_or_not_at_all(tmp_path: Path) -> None:
    reached(GIDMRecipe(pretraining(tmp_path, preset="paper")), 5, older=True)
    with pytest.raises(
        CheckpointError,
        match=r"encoder\.dropout 0\.1 there.* model\.overrides\.decoder\.dropout=0\.1 model\.overrides\.encoder\.dropout=0\.1",
    ):
        check_resumable(GIDMRecipe(pretraining(tmp_path, preset="paper")))
    as_begun = {"encoder": {"dropout": 0.1}, "decoder": {"dropout": 0.1}}
    check_resumable(GIDMRecipe(pretraining(tmp_path, preset="paper", overrides=as_begun)))


def test_a_gidm_whose_dropout_was_chosen_goes_on(tmp_path: Path) -> None:
    chosen = pretraining(
        tmp_path, preset="small", overrides={"encoder": {"dropout": 0.0}, "decoder": {"dropout": 0.2}}
    )
    reached(GIDMRecipe(chosen), 5, older=True)
    check_resumable(GIDMRecipe(chosen))


def test_an_older_run_keeps_the_places_of_what_it_was_built_from(
    policy: FinetuneConfig, tmp_path: Path
) -> None:
    reached(PolicyRecipe(policy), 5, older=True)
    check_resumable(PolicyRecipe(policy))
    (tmp_path / "gfdm").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"nobody can say .* kept no digests"):
        check_resumable(PolicyRecipe(replace(policy, gfdm=str(tmp_path / "moved"))))


def test_an_older_run_with_an_average_goes_on_to_export_it(run_config: Make, tmp_path: Path) -> None:
    run = reached(tiny.TinyRecipe(run_config(tmp_path)), 5, older=True)
    change_config(run, lambda values: values["train"].pop("export_weights"))
    check_resumable(tiny.TinyRecipe(run_config(tmp_path, export_weights="average")))
    with pytest.raises(ConfigError, match=r"train\.export_weights=average, now it is raw"):
        check_resumable(tiny.TinyRecipe(run_config(tmp_path, export_weights="raw")))


def test_an_unfinished_run_of_a_schedule_that_is_gone_is_taken_up_again_with_another(
    run_config: Make, tmp_path: Path
) -> None:
    run = reached(tiny.TinyRecipe(run_config(tmp_path)), 5, older=True)
    change_config(run, lambda values: values["train"].update(schedule="tri_stage"))
    with pytest.raises(
        ConfigError, match=r"train\.schedule=tri_stage, now it is as_run.*train\.restart_from=5"
    ):
        check_resumable(tiny.TinyRecipe(run_config(tmp_path, schedule="as_run")))
    recipe = tiny.TinyRecipe(run_config(tmp_path, schedule="as_run", restart_from=5))
    check_resumable(recipe)
    assert [one.settings["schedule"] for one in recipe.segments] == ["tri_stage", "as_run"]
    assert rate_of(recipe.segments, 5) == 1e-2


def test_settings_that_this_version_does_not_have_are_named(
    run_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = reached(tiny.TinyRecipe(run_config(tmp_path)), 5)
    change_config(run, lambda values: values["train"].update(warp_factor=4))
    check_resumable(tiny.TinyRecipe(run_config(tmp_path)))
    assert "does not have and leaves out: train.warp_factor=4\n" in capsys.readouterr().out


# --------------------------------------------------------------------------- more steps


def extended(run_config: Make, output: Path, step: int, **changes: Any) -> list[Segment]:
    """Segments of a run of 12 steps under cosine that goes on at `step` with other settings."""
    before = run_config(output, schedule="cosine", warmup_steps=2).train
    settings = {"schedule": "cosine", "warmup_steps": 2, **changes}
    return continued([Segment.first(before)], run_config(output, **settings).train, step)


def test_more_steps_under_a_falling_rate_have_to_say_what_becomes_of_it(
    run_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"would jump from 0\.005 to 0\.00878.*train\.extend=stretch .*train\.extend=rewarm"
    ):
        extended(run_config, tmp_path, 7, steps=24)
    before = [Segment.first(run_config(tmp_path, schedule="cosine", warmup_steps=2).train)]
    stretched = extended(run_config, tmp_path, 7, steps=24, extend="stretch")
    assert [rate_of(stretched, step) for step in range(7)] == [rate_of(before, step) for step in range(7)]
    whole = [Segment.first(run_config(tmp_path, schedule="cosine", warmup_steps=2, steps=24).train)]
    assert [rate_of(stretched, step) for step in range(7, 24)] == [
        rate_of(whole, step) for step in range(7, 24)
    ]
    rewarmed = extended(run_config, tmp_path, 12, steps=24, extend="rewarm")
    assert [rate_of(rewarmed, step) for step in range(12, 24)] == [
        rate_of(before, step) for step in range(12)
    ]
    assert [one.begun_by for one in rewarmed] == ["start", "extend=rewarm"]


def test_fewer_steps_under_a_falling_rate_are_a_jump_too(run_config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its learning rate would jump"):
        extended(run_config, tmp_path, 7, steps=8)


def test_more_steps_at_a_constant_rate_are_a_segment_and_no_question(
    run_config: Make, tmp_path: Path
) -> None:
    first = Segment.first(run_config(tmp_path).train)
    longer = continued([first], run_config(tmp_path, steps=24).train, 12)
    assert [(one.start, one.begun_by, one.steps) for one in longer] == [(0, "start", 12), (12, "steps", 24)]
    assert continued(longer, run_config(tmp_path, steps=24).train, 15) == longer


def test_a_start_reads_the_checkpoints_before_it_has_the_folder_and_once_after(
    run_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a store each marker of each rank is a request, and so is each checkpoint."""
    reached(tiny.TinyRecipe(run_config(tmp_path)), 3, 6, 9)
    reads: list[str] = []
    whole = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri: (reads.append(uri), whole(uri))[1])
    for name in ("announce", "start_shared_actors", "_run_all"):
        monkeypatch.setattr(driver, name, lambda *_: None)
    monkeypatch.setattr(driver, "ray_session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(driver, "retry_run_folder", lambda *_: driver.RunSummary("", {}))
    driver.train(RayConfig(), [tiny.TinyRecipe(run_config(tmp_path))])
    assert sum("/checkpoints/" in uri for uri in reads) == 2 * 3


# --------------------------------------------------------------------------- taken up again


@pytest.mark.parametrize("store", ["memory://moved", None])
def test_files_and_folders_are_moved_within_a_store(store: str | None, tmp_path: Path) -> None:
    root = store or str(tmp_path)
    storage.write_text(storage.join(root, "a", "one"), "1")
    storage.write_text(storage.join(root, "a", "b", "two"), "2")
    storage.move(storage.join(root, "a", "one"), storage.join(root, "c", "1"))
    storage.move(storage.join(root, "a"), storage.join(root, "c", "d"))
    assert [entry.name for entry in storage.walk(root)] == ["c/1", "c/d/b/two"]
    assert storage.read_text(storage.join(root, "c", "1")) == "1"


def test_a_step_without_a_checkpoint_is_no_place_to_go_on_from(run_config: Make, tmp_path: Path) -> None:
    recipe = tiny.TinyRecipe(run_config(tmp_path, restart_from=7))
    with pytest.raises(ConfigError, match=r"holds no checkpoint\. Leave it out"):
        check_resumable(recipe)
    reached(tiny.TinyRecipe(run_config(tmp_path)), 5, 10)
    with pytest.raises(ConfigError, match=r"no checkpoint of that step; it has: 5, 10\."):
        check_resumable(recipe)
    with pytest.raises(ConfigError, match=r"train\.seed=0, now it is 3"):
        check_resumable(tiny.TinyRecipe(run_config(tmp_path, restart_from=5, seed=3)))


def test_a_diverged_run_goes_on_as_its_message_says(
    process_group: None, run_config: Make, tmp_path: Path
) -> None:
    """The whole of it: the message, the way on that it names, the record, and the same command once more."""
    prepare(
        recipe := tiny.TinyRecipe(run_config(tmp_path, checkpoint_every=3, keep_checkpoints=3), diverge_at=7)
    )
    kind, message = work(recipe)["error"]
    assert kind == "Diverged" and "The last checkpoint, of step 6," in message
    assert "train.restart_from=6" in message and "train.learning_rate (0.01)" in message
    before = tiny.losses(tmp_path)

    lower = {"checkpoint_every": 3, "keep_checkpoints": 3, "learning_rate": 1e-3}
    with pytest.raises(
        ConfigError, match=r"train\.learning_rate=0\.01, now it is 0\.001.*train\.restart_from=6"
    ):
        prepare(tiny.TinyRecipe(run_config(tmp_path, **lower)))
    again = run_config(tmp_path, **lower, restart_from=3)
    train_here(tiny.TinyRecipe(again))
    aside = tmp_path / "set_aside" / next((tmp_path / "set_aside").iterdir()).name
    assert [one.step for one in checkpoints.committed(str(aside))] == [6]
    assert max(row["step"] for row in tiny.rows(aside, "train")) == 7
    assert yaml.safe_load((aside / "config.yaml").read_text())["train"]["learning_rate"] == 1e-2

    after = tiny.losses(tmp_path)
    assert [after[step] for step in range(1, 5)] == [before[step] for step in range(1, 5)]
    assert after[6] != before[6] and sorted(after) == list(range(1, 13))
    rates = {row["step"]: row["lr"] for row in tiny.rows(tmp_path, "train")}
    assert (rates[3], rates[4]) == (1e-2, 1e-3)
    segments = json.loads((tmp_path / "run_card.json").read_text())["segments"]
    assert [(one["start"], one["begun_by"], one["settings"]["learning_rate"]) for one in segments] == [
        (0, "start", 1e-2), (3, "restart_from", 1e-3),
    ]  # fmt: skip
    assert "| 3 | restart_from | 12 | learning_rate 0.001," in (tmp_path / "run_card.md").read_text()

    summary = complete_run(tiny.TinyRecipe(again))
    assert summary and summary.values["resumed_from"] == 3, "it acts once"
    with pytest.raises(ConfigError, match=r"train\.learning_rate=0\.001, now it is 0\.01"):
        complete_run(tiny.TinyRecipe(run_config(tmp_path, checkpoint_every=3)))
