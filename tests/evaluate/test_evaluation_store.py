"""The store of episodes: what it refuses, what it keeps apart, and drivers that share it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defi_platform import storage
from defi_platform.errors import ConfigError
from defi_platform.evaluate.store.episodes import EpisodeStore, Finished
from defi_platform.evaluate.store.identity import policy_identity
from defi_platform.evaluate.store.steps import pack_steps, unpack_steps
from defi_platform.storage.leases import FolderInUse, FolderLease, Leases

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from s3_server import s3_server

SETTINGS = {"benchmark": "metaworld", "options": {}, "view": {"cameras": ["workspace"], "height": 64}}
ONE, TWO = {"digest": "1" * 64}, {"digest": "2" * 64}


def row(task: str = "open", seed: int = 0, arm: str = "policy", **more: Any) -> dict[str, Any]:
    return {"arm": arm, "task": task, "seed": seed, "success": True, **more}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A bucket of a real S3 server, as a URL."""
    with pytest.MonkeyPatch.context() as patch, s3_server() as endpoint:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        storage.forget_connections()
        import s3fs

        s3fs.S3FileSystem(endpoint_url=endpoint).mkdir("evaluations")
        yield "s3://evaluations"
    storage.forget_connections()


@pytest.fixture(params=["disk", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


# --------------------------------------------------------------------------- episodes


def test_an_episode_is_found_again_whatever_its_task_is_called(output: str) -> None:
    tasks = ["pick_up the/black bowl", "pick_up the black bowl", "../..", "Öffne", "a" * 300]
    store = EpisodeStore(output, SETTINGS, ONE)
    for task in tasks:
        store.add(Finished(row(task), video=task.encode()))
    again = EpisodeStore(output, SETTINGS, ONE)
    again.refresh()
    assert {found["task"] for found in again.rows.values()} == set(tasks)
    for task in tasks:
        found = again.rows[again.unit("policy", task, 0)]
        assert storage.read_bytes(storage.join(output, found["video"])) == task.encode()


def test_steps_are_kept_beside_the_row_bit_for_bit(tmp_path: Path) -> None:
    actions = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    steps = {
        "step": [0, 1, 2],
        "subtask": [0, 0, 1],
        "observation_sha256": ["ab", "", "cd"],
        "action": actions,
        "executed": actions.clip(-1, 1),
        "reward": [0.0, 0.5, 1.0],
        "success": [False, False, True],
    }
    assert pack_steps(steps) == pack_steps(steps)
    store = EpisodeStore(str(tmp_path), SETTINGS, ONE)
    stored = store.add(Finished(row(), steps=pack_steps(steps)))
    table = store.steps(stored)
    assert table is not None and np.array_equal(np.stack(table["action"].to_numpy()), actions)
    assert table["observation_sha256"].to_pylist() == ["ab", "", "cd"]
    with pytest.raises(ValueError, match="differ in length"):
        pack_steps({**steps, "reward": [0.0]})
    none = {name: np.zeros((0, 4)) if name in ("action", "executed") else [] for name in steps}
    assert unpack_steps(pack_steps(none)).num_rows == 0


def test_of_two_drivers_that_finish_one_episode_the_first_ones_stays(output: str) -> None:
    one, two = EpisodeStore(output, SETTINGS, ONE), EpisodeStore(output, SETTINGS, ONE)
    assert one.add(Finished(row(host="a")))["host"] == "a"
    assert two.add(Finished(row(host="b")))["host"] == "a"
    two.refresh()
    assert len(two.rows) == 1


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    store = EpisodeStore(str(tmp_path), SETTINGS, ONE)
    unit = store.add(Finished(row()))["unit"]
    path = tmp_path / f"episodes/{unit}.json"
    for content in (path.read_bytes()[:9], b"[]", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"episodes/{unit}\.json is damaged.*Delete the file"):
            EpisodeStore(str(tmp_path), SETTINGS, ONE).refresh()
    path.unlink()
    assert EpisodeStore(str(tmp_path), SETTINGS, ONE).add(Finished(row(host="again")))["host"] == "again"


def test_nothing_is_bound_before_the_first_finished_episode(tmp_path: Path) -> None:
    output = str(tmp_path)
    failed = EpisodeStore(output, SETTINGS, ONE)
    failed.add_fault("policy", "open", 0, {"kind": "hang", "message": "no answer", "place": "step"})
    other = EpisodeStore(output, {**SETTINGS, "options": {"horizon": "official"}}, TWO)
    other.add(Finished(row()))
    with pytest.raises(ConfigError, match=r"other settings \(options.horizon: official there, None here\)"):
        failed.add(Finished(row()))


def test_a_policy_that_becomes_known_later_is_checked_too(tmp_path: Path) -> None:
    EpisodeStore(str(tmp_path), SETTINGS, ONE).add(Finished(row()))
    store = EpisodeStore(str(tmp_path), SETTINGS)
    with pytest.raises(ConfigError):
        store.set_policy(TWO)
    store.set_policy(ONE)
    assert store.look_up(store.unit("policy", row()["task"], row()["seed"])) is not None


def test_another_policy_or_other_settings_are_refused_naming_both(tmp_path: Path) -> None:
    output = str(tmp_path)
    EpisodeStore(output, SETTINGS).add(Finished(row(arm="random")))
    EpisodeStore(output, SETTINGS, ONE).add(Finished(row(), protocol={"mujoco": "3.3.0"}))
    EpisodeStore(output, SETTINGS, ONE), EpisodeStore(output, SETTINGS)
    with pytest.raises(ConfigError, match=f"another policy .digest: {'1' * 64} there, {'2' * 64} here"):
        EpisodeStore(output, SETTINGS, TWO)
    changed = {**SETTINGS, "view": {"cameras": ["workspace"], "height": 32}}
    with pytest.raises(ConfigError, match=r"other settings \(view.height: 64 there, 32 here\)"):
        EpisodeStore(output, changed, ONE)
    with pytest.raises(ConfigError, match=r"another installation .*mujoco: 3.3.0 there, 3.4.0 here"):
        EpisodeStore(output, SETTINGS, ONE).add(Finished(row(seed=1), protocol={"mujoco": "3.4.0"}))


def test_a_folder_of_an_earlier_version_is_refused_with_the_fix(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "episodes/policy_coffee-button-v3_500.json"), "{}")
    with pytest.raises(ConfigError, match=r"earlier version .*Choose another output"):
        EpisodeStore(str(tmp_path), SETTINGS)


def test_faults_are_counted_across_drivers(output: str) -> None:
    one, two = EpisodeStore(output, SETTINGS, ONE), EpisodeStore(output, SETTINGS, ONE)
    assert one.add_fault("policy", "open", 3, {"kind": "hang"}) == 1
    assert two.add_fault("policy", "open", 3, {"kind": "abort"}) == 2
    assert one.add_fault("policy", "open", 3, {"kind": "memory"}) == 3
    again = EpisodeStore(output, SETTINGS, ONE)
    again.refresh(), again.refresh()
    assert [fault["kind"] for fault in again.faults[again.unit("policy", "open", 3)]] == [
        "hang",
        "abort",
        "memory",
    ]


def test_a_policy_is_known_by_its_digest_wherever_it_is_and_by_name_without_one() -> None:
    greeting = {"policy_digest": "ab", "chunk": 8}
    assert policy_identity(greeting, None, "ws://a:1") == policy_identity(greeting, "mine", "/models/copy")
    assert policy_identity({}, "pi0-fast at step 30000", "ws://a:1") == {"name": "pi0-fast at step 30000"}
    with pytest.raises(ConfigError, match=r"ws://a:1 names no policy_digest.* policy_name=NAME"):
        policy_identity({}, None, "ws://a:1")


# --------------------------------------------------------------------------- leases


def test_a_unit_has_one_driver_until_that_one_ends(output: str) -> None:
    with Leases(output) as two:
        with Leases(output) as one:
            assert one.take("a") and one.take("a")
            assert not two.take("a") and two.take("b") and not one.take("b")
        assert two.take("a"), "the other has given it back"


def test_a_folder_has_one_job_at_a_time(output: str) -> None:
    """The lease of a run's folder, on the same two stores."""
    for _ in range(3):
        with FolderLease(output, "gfdm") as one:
            with (
                pytest.raises(FolderInUse, match=rf"gfdm: .* written to by process {os.getpid()} on"),
                FolderLease(output, "gfdm"),
            ):
                pass
            assert not one.is_lost()
    assert len(storage.names(storage.join(output, "in_use/leases"))) == 3
    assert storage.names(storage.join(output, "in_use/drivers")) == []
