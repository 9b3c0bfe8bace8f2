"""The command line of jobs/supervise.py, and what it submits."""

from __future__ import annotations

from pathlib import Path

import pytest

from defi_platform.errors import ConfigError
from defi_platform.supervise.command import submission, supervise


def test_a_checkout_is_sent_with_its_runtime_environment_and_an_image_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEFI_HOME", "s3://bucket/defi")
    Path("env.yaml").write_text("excludes: [/runs/]\nenv_vars: {A: b}\n")
    arguments = ["--config", "a b.yaml", "train.steps=3"]
    sent = submission("pretrain_gfdm", arguments, shipped=True, runtime_env="env.yaml")
    assert sent.entrypoint == "python jobs/pretrain_gfdm.py --config 'a b.yaml' train.steps=3"
    assert sent.runtime_env == {
        "excludes": ["/runs/"],
        "working_dir": ".",
        "env_vars": {"DEFI_HOME": "s3://bucket/defi", "A": "b"},
    }
    held = submission("pretrain_gfdm", arguments, shipped=False)
    assert held.entrypoint.startswith("python -m defi_platform.jobs.pretrain_gfdm --config")
    assert held.runtime_env == {"env_vars": {"DEFI_HOME": "s3://bucket/defi"}}
    assert held.run == sent.run
    monkeypatch.setenv("DEFI_HOME", "s3://bucket/other")
    assert submission("pretrain_gfdm", arguments, shipped=False).run != held.run


def test_mistakes_are_errors_before_anything_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'pretrain_gfdm'"):
        supervise(["pretrain_gfmd"])
    with pytest.raises(ConfigError, match="stepz"):
        supervise(["jobs/pretrain_gfdm.py", "train.output=/x", "train.stepz=3"])
    with pytest.raises(ConfigError, match="has no jobs/ folder"):
        supervise(["--working-dir", str(tmp_path), "pretrain_gfdm"])
    with pytest.raises(ConfigError, match=r"cannot be read"):
        submission("pretrain_gfdm", [], shipped=False, runtime_env="absent.yaml")
    for text, wrong in {
        "[a]": "not a mapping",
        "excludes: a": "list of patterns",
        "env_vars: {A: 1}": "quotes",
    }.items():
        Path("env.yaml").write_text(text)
        with pytest.raises(ConfigError, match=wrong):
            submission("pretrain_gfdm", [], shipped=False, runtime_env="env.yaml")
    with pytest.raises(ConfigError, match="--failures is -1"):
        supervise(["--failures", "-1", "pretrain_gfdm"])
    with pytest.raises(ConfigError, match="--hours is nan"):
        supervise(["--hours", "nan", "pretrain_gfdm"])
