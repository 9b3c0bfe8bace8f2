"""The command `defi` and the configs of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from defi_platform.command import descriptions, run
from defi_platform.config import PretrainConfig
from defi_platform.config.loader import find_config, load_config
from defi_platform.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]


def test_it_lists_the_jobs_of_a_checkout_with_their_first_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([]) == 0
    shown = capsys.readouterr().out
    scripts = {script.stem for script in (REPOSITORY / "jobs").glob("*.py")} - {"source_tree"}
    assert set(descriptions()) == scripts
    for name, text in descriptions().items():
        assert text and f"  {name} " in shown and text in shown
        assert text in (REPOSITORY / "jobs" / f"{name}.py").read_text(), (
            "the two entries of a job say the same"
        )


def test_a_job_that_does_not_exist_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ConfigError, match=r"no job 'pretrain_gfmd'.*Did you mean 'pretrain_gfdm'"):
        run(["pretrain_gfmd"])


def test_it_runs_the_job_with_the_rest_of_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["defi"])
    with pytest.raises(SystemExit) as ended:
        run(["pretrain_gfdm", "--help"])
    assert ended.value.code == 0
    assert "usage: defi pretrain_gfdm" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["demo/pretrain_gfdm.yaml", "configs/demo/pretrain_gfdm.yaml"])
def test_a_config_that_is_not_here_comes_from_the_package(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(PretrainConfig, path)
    assert config == load_config(PretrainConfig, REPOSITORY / "configs/demo/pretrain_gfdm.yaml")


def test_a_config_that_is_here_comes_before_the_package_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "pretrain_gfdm.yaml").write_text("train: {steps: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert find_config("demo/pretrain_gfdm.yaml") == Path("demo/pretrain_gfdm.yaml")


def test_a_config_that_is_nowhere_is_an_error_with_both_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"neither in .*defi_platform/configs.*Did you mean 'pretrain_gfdm.yaml'"
    ) as error:
        find_config("demo/pretrain_gfmd.yaml")
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ConfigError, match="does not exist"):
        find_config("/demo/pretrain_gfdm.yaml")
