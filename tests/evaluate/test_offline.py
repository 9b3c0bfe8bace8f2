"""Offline evaluation: recorded episodes, a real server, errors that are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_server import policy_server

from defi_client.recording.h264 import encode_h264
from defi_client.recording.lerobot import Camera, Episode, LeRobotWriter, Vector, frame_stats
from defi_platform.config import ObservationKeysConfig, OfflineConfig, ServeConfig
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.data.manifest.split import hash_position, held_out
from defi_platform.errors import ConfigError, CorpusError
from defi_platform.evaluate.offline.action_error import Predictions, Scale, mean_errors
from defi_platform.evaluate.offline.dataset import open_dataset
from defi_platform.evaluate.offline.evaluate import SUMMARY, _chosen, evaluate_offline

LENGTHS = (30, 41, 24, 36)
GREETING = {"cameras": ["front"], "action_dim": 2, "state_dim": 2, "chunk": 4, "policy_digest": "d1"}


def recorded(number: int) -> np.ndarray:
    """Actions of an episode, (n, 2): a walk, and an entry that never changes."""
    walk = np.cumsum(np.random.default_rng(number).normal(size=LENGTHS[number]))
    return np.stack([walk, np.ones(LENGTHS[number])], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four episodes in one video file, whose pictures and states say episode and step."""
    folder = tmp_path_factory.mktemp("dataset")
    writer = LeRobotWriter(
        folder,
        10,
        [Camera("front", 32, 32)],
        [Vector("action", ("x", "gripper")), Vector("observation.state", ("episode", "step"))],
        "test",
    )
    for number, length in enumerate(LENGTHS):
        shades = [50 * number + step for step in range(length)]
        frames = np.stack([np.full((32, 32, 3), shade, np.uint8) for shade in shades])
        states = np.array([[number, step] for step in range(length)], np.float32)
        writer.add(
            Episode(
                text=f"task {number}",
                videos={"front": encode_h264(list(frames), 10)},
                video_stats={"front": frame_stats(frames)},
                length=length,
                vectors={"action": recorded(number), "observation.state": states},
            )
        )
    writer.finish()
    return folder


def knows_all(off_by: float = 0.0) -> Callable[[dict[str, Any], Any], dict[str, Any]]:
    """A policy that knows the recorded actions, and checks that it is shown the right picture."""

    def answer(observation: dict[str, Any], socket: Any) -> dict[str, Any]:
        number, step = map(int, observation["observation/state"])
        shade = float(observation["observation/images/front"].mean())
        assert abs(shade - (50 * number + step)) < 2.5, (shade, number, step)
        assert observation["prompt"] == f"task {number}"
        ended = np.zeros((4, 2), np.float32)
        chunk = np.concatenate([recorded(number), ended])[step : step + 4]
        return {"actions": chunk + np.float32([off_by, 0]), "policy_digest": "d1"}

    return answer


def config(dataset: Path, output: Path, url: str, **changes: Any) -> OfflineConfig:
    return OfflineConfig(
        dataset=str(dataset), output=str(output), url=url, **{"episodes": [0, 2, 3], "every": 5, **changes}
    )


def test_errors_are_those_of_the_policy_and_resume_asks_nothing_twice(dataset: Path, tmp_path: Path) -> None:
    with policy_server(knows_all(off_by=0.5), GREETING) as server:
        result = evaluate_offline(config(dataset, tmp_path / "run", server.url))
        asked = len(server.observations)
        (tmp_path / "run/episodes/episode_000002.npz").unlink()
        again = evaluate_offline(config(dataset, tmp_path / "run", server.url))
        assert len(server.observations) - asked == len(range(1, LENGTHS[2], 5))
    errors = result.details["errors"]
    assert again.details["errors"] == errors
    raw = errors["policy"]["raw"]["by_horizon_and_dimension"]
    assert np.shape(raw) == (4, 2)
    assert all(np.isclose(step[0]["mean"], 0.5) and np.isclose(step[1]["mean"], 0.0) for step in raw)
    others = recorded(1)[:, 0]
    overall = errors["policy"]["normalised"]["overall"]
    assert np.isclose(overall["mean"], 0.5 / others.std(), rtol=1e-5)
    assert errors["policy"]["normalised"]["by_dimension"][1] is None, "an entry that never changes"
    repeated = [step["mean"] for step in errors["repeat_last"]["normalised"]["by_horizon"]]
    assert repeated[-1] > repeated[0], "on a walk the last action is worth less, the further ahead it is held"
    mean = [np.abs(recorded(n)[1::5, 0] - others.mean()) for n in (0, 2, 3)]
    first = errors["mean_action"]["raw"]["by_horizon_and_dimension"][0][0]["mean"]
    assert np.isclose(first, np.concatenate(mean).mean(), rtol=1e-5)
    low_high = errors["repeat_last"]["normalised"]["overall"]
    assert low_high["low"] < low_high["mean"] < low_high["high"]
    summary = result.summary()
    assert "repeat_last" in summary and "gripper" in summary and "3 episodes" in summary
    assert json.loads((tmp_path / "run" / SUMMARY).read_text()) == again.details


def test_held_out_episodes_are_those_that_a_training_leaves_out(dataset: Path) -> None:
    listed = open_dataset(str(dataset))
    assert [episode.name for episode in listed.episodes] == [f"episode_{n:06d}" for n in range(4)]
    held = {episode.name for episode in listed.held_out(0.5)}
    assert 0 < len(held) < 4
    # As the ingest's split: positions of the episodes' names, whatever the cameras.
    names = [f"episode_{number:06d}" for number in range(4)]
    split = held_out(np.array([hash_position(name) for name in names], np.uint64), 0.5)
    assert held == {name for name, apart in zip(names, split, strict=True) if apart}


def test_of_a_project_those_are_evaluated_on_that_its_split_holds_out(dataset: Path, tmp_path: Path) -> None:
    listed = open_dataset(str(dataset))
    split = ProjectSplit(str(tmp_path / "split"))
    positions = np.array([hash_position(f"episode_{number:06d}") for number in range(4)], np.uint64)
    split.decide("robots", positions, np.zeros(4, np.uint64), 0.0, np.array([False, True, False, True]))
    (tmp_path / "run").mkdir()
    there = f"data: {{split: {tmp_path}/split, corpora: {{robots: {{path: {dataset}}}}}}}"
    (tmp_path / "run/config.yaml").write_text(there)
    own = OfflineConfig(dataset=str(dataset), serve=ServeConfig(policy=str(tmp_path / "run/model")))
    assert [episode.name[-1] for episode in _chosen(own, listed)] == ["1", "3"], "as its run says"
    by_url = replace(own, url="ws://somewhere:1", split=str(tmp_path / "split"), corpus="robots")
    assert [episode.name[-1] for episode in _chosen(by_url, listed)] == ["1", "3"]
    assert _chosen(replace(by_url, split=None), listed) == listed.held_out(0.1), "nobody knows of a split"
    # Another training has learned from a copy of episode 1's pictures: it is unseen no more.
    split.decide("robots", positions, np.array([0, 7, 0, 8], np.uint64), 0.0, np.array([0, 1, 0, 1], bool))
    split.decide("copies", positions[:1], np.array([7], np.uint64), 0.0, np.array([False]))
    assert [episode.name[-1] for episode in _chosen(by_url, listed)] == ["3"]
    for share, numbers in ((0.7, listed.held_out(0.7)), (0.2, listed.held_out(0.2))):
        there = f"data: {{holdout: {share}, corpora: {{robots: {{path: {dataset}}}}}}}"
        (tmp_path / "run/config.yaml").write_text(there)
        assert _chosen(own, listed) == numbers, "as its run says"
        assert _chosen(replace(own, holdout=1.0), listed) == listed.episodes
    (tmp_path / "run/config.yaml").write_text(f"data: {{holdout: 0, corpora: {{r: {{path: {dataset}}}}}}}")
    with pytest.raises(ConfigError, match=r"holdout is 0\.0, which leaves none of the 4"):
        _chosen(own, listed)
    with pytest.raises(ConfigError, match="split needs corpus"):
        _chosen(replace(by_url, corpus=None), listed)
    with pytest.raises(CorpusError, match=r"knows no corpus 'robot'\. It has: copies, robots"):
        _chosen(replace(by_url, corpus="robot"), listed)
    split.decide("trained", positions, np.zeros(4, np.uint64), 0.0, np.zeros(4, bool))
    with pytest.raises(ConfigError, match="holds out none of the 4 episodes"):
        _chosen(replace(by_url, corpus="trained"), listed)


def test_a_foreign_server_gets_its_own_keys_and_needs_a_name(dataset: Path, tmp_path: Path) -> None:
    def answer(observation: dict[str, Any], socket: Any) -> dict[str, Any]:
        assert set(observation) == {"observation/image", "observation/state", "prompt", "seed"}
        return {"actions": np.zeros((2, 2), np.float32)}

    no_words = dict.fromkeys(("cameras", "action_dim", "state_dim", "chunk", "preset", "policy"))
    with policy_server(answer, {**no_words, "cameras": None}) as server:
        asked = config(
            dataset,
            tmp_path / "run",
            server.url,
            episodes=[1],
            observation_keys=ObservationKeysConfig(names="libero"),
            policy_cameras={"front": "image"},
        )
        with pytest.raises(
            ConfigError, match="does not say which policy it serves; name it: policy_name=NAME"
        ):
            evaluate_offline(asked)
        asked.policy_name = "pi0"
        assert np.shape(evaluate_offline(asked).details["errors"]["policy"]["raw"]["by_dimension"]) == (2,)
        asked.policy_name = "another"
        with pytest.raises(ConfigError, match="policy: pi0 there, another here"):
            evaluate_offline(asked)


def test_actions_of_another_robot_are_one_clear_error(dataset: Path, tmp_path: Path) -> None:
    def seven(observation: dict[str, Any], socket: Any) -> dict[str, Any]:
        return {"actions": np.zeros((4, 7), np.float32)}

    with (
        policy_server(seven, {**GREETING, "action_dim": 7}) as server,
        pytest.raises(ConfigError, match=r"gives 7 action dims, .*dataset.* has 2"),
    ):
        evaluate_offline(config(dataset, tmp_path / "run", server.url))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 0}, "every is 0; it must be 1 or more"),
        ({"episodes": []}, "episodes is empty"),
        ({"episodes": [0, 9]}, r"has 4 usable ones, 0 to 3, and not 9"),
        ({"episodes": [1, 1]}, "name each once"),
        ({"episodes": None, "holdout": 0.0}, "holdout is 0.0"),
        ({"policy_cameras": {"wrist": "x"}}, r"has no camera 'wrist', but front"),
        ({"policy_cameras": {"front": "top"}}, r"looks through front; .* has front\. .*policy_cameras"),
        ({"observation_keys": ObservationKeysConfig(names="droid")}, r"Name one: observation_keys\.state="),
        ({"observation_keys": ObservationKeysConfig(names="liberty")}, "Did you mean 'libero'"),
    ],
)
def test_mistakes_are_found_before_the_policy_is_asked(
    dataset: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with policy_server(knows_all(), GREETING) as server:
        with pytest.raises(ConfigError, match=message):
            evaluate_offline(config(dataset, tmp_path / "run", server.url, **changes))
        assert not server.observations


def test_of_a_real_dataset_episodes_without_files_are_left_out_and_counted(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "lerobot_v21/g1"

    def still(observation: dict[str, Any], socket: Any) -> dict[str, Any]:
        assert observation["observation/images/cam_high"].shape == (480, 640, 3)
        return {"actions": np.zeros((3, 26), np.float32), "policy_digest": "g1"}

    greeting = {"cameras": ["cam_high"], "action_dim": 26, "state_dim": 0, "policy_digest": "g1"}
    with policy_server(still, greeting) as server:
        result = evaluate_offline(
            config(folder, tmp_path / "run", server.url, episodes=None, holdout=1.0, every=200)
        )
    policy = result.details["errors"]["policy"]
    # Of the 100 episodes that its metadata lists, this copy of the dataset has the files of two.
    assert policy["episodes"] == 2 and len(result.details["left_out"]) == 98
    assert not result.details["scale"]["of_other_episodes"]
    assert len(policy["raw"]["by_dimension"]) == 26


def test_a_dataset_without_actions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(encode_h264([np.zeros((32, 32, 3), np.uint8)] * 4, 10))
    with pytest.raises(ConfigError, match=r"of the format plain; offline evaluation reads LeRobot"):
        open_dataset(str(tmp_path))
    with pytest.raises(CorpusError, match="does not exist"):
        open_dataset(str(tmp_path / "absent"))


def test_the_interval_is_over_episodes_and_not_over_steps() -> None:
    # Two episodes, one right and one wrong: however many steps they have, two are few.
    right, wrong = (
        Predictions(np.full((500, 1, 1), value, np.float32), np.zeros((500, 1, 1), np.float32))
        for value in (0.0, 1.0)
    )
    scale = Scale(np.zeros(1), np.ones(1))
    found = mean_errors([right, wrong], scale)["normalised"]["overall"]
    assert found == {"mean": 0.5, "low": 0.0, "high": 1.0}
