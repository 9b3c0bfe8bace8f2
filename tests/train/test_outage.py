"""A whole run in a bucket whose store goes away when it is least convenient: while the run ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ending import EndingRecipe
from in_process import fit_here
from s3_server import EVERYTHING, FlakyProxy, s3_server
from tiny import wait_for

from defi_platform import storage
from defi_platform.config import PretrainConfig, RayConfig
from defi_platform.train.driver.run import train
from defi_platform.train.observability.status import StatusView

AWAY_S = 12.0
"""Longer than one request is tried again."""


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """Before a real S3 server with a bucket `runs`."""
    import fsspec

    with s3_server() as endpoint:
        proxy = FlakyProxy(int(endpoint.rsplit(":", 1)[1]))
        for name, value in environment(proxy).items():
            monkeypatch.setenv(name, value)
        storage.forget_connections()
        fsspec.filesystem("s3", endpoint_url=endpoint).mkdir("runs")
        yield proxy
        proxy.close()
    storage.forget_connections()


def environment(proxy: FlakyProxy) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": proxy.endpoint}


@pytest.mark.slow
def test_a_store_that_is_away_while_a_run_ends_is_waited_for_by_workers_and_driver(
    ray_cluster: None,
    process_group: None,
    run_config: Callable[..., PretrainConfig],
    proxy: FlakyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the driver's own way, but its worker is a thread here: starting one takes longer than the run."""
    monkeypatch.setattr("defi_platform.train.driver.run._fit", fit_here)

    def outage() -> None:
        wait_for(tmp_path / "over")
        proxy.refuse = EVERYTHING
        (tmp_path / "away").touch()
        time.sleep(AWAY_S)
        proxy.refuse = b""

    threading.Thread(target=outage, daemon=True).start()
    config = run_config(tmp_path, max_failures=0)
    config.train.output = "s3://runs/a"
    (summary,) = train(RayConfig(), [EndingRecipe(config, tmp_path)])
    assert proxy.refused and summary.values["steps"] == 12 and summary.values["resumed_from"] is None
    assert summary.values["media"] == ["media/said.txt"]
    assert {"summary.json", "run_card.md", "curves.png", "model"} <= set(storage.names("s3://runs/a"))


@pytest.mark.slow
def test_whoever_watches_a_run_outlives_its_store(
    proxy: FlakyProxy, capfd: pytest.CaptureFixture[str]
) -> None:
    proxy.refuse = EVERYTHING
    StatusView({"gfdm": "s3://runs/a"}).refresh()
    assert "gfdm: its status cannot be read for now, s3://runs/a does not answer" in capfd.readouterr().out
