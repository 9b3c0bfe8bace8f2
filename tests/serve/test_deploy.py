"""Deployments that cannot come up."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from defi_platform.config import ServeConfig
from defi_platform.errors import ServeError
from defi_platform.serve.deployment.server import deploy


@pytest.mark.slow
def test_a_policy_that_only_fails_while_loading_is_one_clear_error(
    ray_cluster: None, policy_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(policy_folder, tmp_path / "policy")
    config = tmp_path / "policy" / "config.json"
    config.write_text(config.read_text().replace('"views"', '"eyes"'))
    with pytest.raises(ServeError, match=r"could not be served: .*CheckpointError: .*no field 'eyes'"):
        deploy(ServeConfig(policy=str(tmp_path / "policy"), port=0))
