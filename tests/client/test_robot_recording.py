"""Recordings: whole after every episode, LeRobot v3.0 when closed, readable by the platform's ingest."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from kinematic_robot import SCALE, KinematicRobot, towards
from policy_server import policy_server

from defi_client.connection import Connection
from defi_client.control import Execution, run_episode
from defi_client.errors import RecordError
from defi_client.recording.assemble import assemble, main
from defi_client.recording.recorder import Recorder

GOAL = np.array([0.2, 0.7, 0.3, 0.5])
NAMES = ["x", "y", "z", "gripper"]


def recorder(folder: Path, **changes: Any) -> Recorder:
    settings: dict[str, Any] = {
        "fps": 50,
        "cameras": ["workspace"],
        "state_names": NAMES,
        "action_names": NAMES,
    }
    return Recorder(folder, **{**settings, **changes})


def drive(recording: Recorder, steps: int, instruction: str = "go there") -> KinematicRobot:
    robot = KinematicRobot()
    with policy_server(towards(GOAL)) as server, Connection(server.url) as connection:
        run_episode(
            robot,
            connection,
            instruction,
            max_steps=steps,
            execution=Execution(rate_hz=50.0),
            recorder=recording,
        )
    return robot


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[KinematicRobot]]:
    """Two episodes, of 12 and 7 actions."""
    folder = tmp_path_factory.mktemp("recorded") / "monday"
    with recorder(folder) as recording:
        robots = [drive(recording, 12), drive(recording, 7, "go back")]
    return folder, robots


def test_the_ingest_reads_what_was_executed(recorded: tuple[Path, list[KinematicRobot]]) -> None:
    formats = pytest.importorskip("defi_platform.data.sources.formats")
    folder, robots = recorded
    listed = list(formats.listing("lerobot_v3", str(folder / "dataset"), None))
    assert [(record.text, record.num_frames, record.num_actions) for record in listed] == [
        ("go there", 12, 12),
        ("go back", 7, 7),
    ]
    for record, robot in zip(listed, robots):
        signals = formats.read_signals("lerobot_v3", record.signals_uri, record.episode_id)
        assert np.array_equal(signals.actions, np.stack(robot.executed).astype(np.float32))
        assert np.allclose(signals.proprio[1:], np.stack(robot.path)[:-1], atol=1e-6)


def test_the_dataset_shows_what_the_robot_saw(recorded: tuple[Path, list[KinematicRobot]]) -> None:
    import av
    import pyarrow.parquet as pq

    folder, robots = recorded
    info = json.loads((folder / "dataset/meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_frames"], info["total_episodes"]) == (
        "v3.0",
        50,
        19,
        2,
    )
    (file,) = (folder / "dataset/videos/observation.images.workspace").rglob("*.mp4")
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 19
    robot = KinematicRobot()
    assert np.abs(frames[0].astype(int) - robot.images()["workspace"]).mean() < 8
    rows = pq.read_table(str(folder / "dataset/data/chunk-000/file-000.parquet")).to_pydict()
    states = np.stack(rows["observation.state"])
    assert np.allclose(states[0], robot.hand) and np.allclose(states[1], robots[0].path[0], atol=1e-6)
    tasks = pq.read_table(str(folder / "dataset/meta/tasks.parquet"))
    assert tasks.column("task").to_pylist() == ["go there", "go back"]
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(folder / "dataset/meta/tasks.parquet")
    assert list(frame.index) == ["go there", "go back"] and list(frame.columns) == ["task_index"]


def test_a_recording_whose_process_was_killed_keeps_its_finished_episodes(
    tmp_path: Path, recorded: tuple[Path, list[KinematicRobot]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "killed"
    shutil.copytree(recorded[0], folder)
    shutil.rmtree(folder / "dataset")
    (folder / "episodes" / "000002.partial").mkdir()
    (folder / "dataset.partial").mkdir()
    assert main([str(folder)]) == 0
    assert json.loads((folder / "dataset/meta/info.json").read_text())["total_episodes"] == 2
    with recorder(folder) as recording:
        drive(recording, 3)
    assert sorted(path.name for path in (folder / "episodes").iterdir())[-1] == "000003"
    assert json.loads((folder / "dataset/meta/info.json").read_text())["total_episodes"] == 3
    assert main([str(tmp_path)]) == 2 and "no recording.json" in capsys.readouterr().err
    assert main([]) == 2


def test_what_cannot_be_recorded_is_refused_before_anything_moves(tmp_path: Path) -> None:
    recording = recorder(tmp_path / "a", cameras=["wrist"])
    with pytest.raises(RecordError, match=r"no camera 'wrist', it has \['workspace'\]"):
        drive(recording, 3)
    with pytest.raises(RecordError, match="20 frames a second, the control loop 50"):
        drive(recorder(tmp_path / "b", fps=20), 3)
    with pytest.raises(RecordError, match="another fps; record into another folder"):
        recorder(tmp_path / "b", fps=30)
    odd = {"workspace": np.zeros((31, 32, 3), np.uint8)}
    with pytest.raises(RecordError, match="needs even sizes"):
        recorder(tmp_path / "c").begin("x", odd)
    with pytest.raises(RecordError, match="float32"):
        recorder(tmp_path / "c").begin("x", {"workspace": np.zeros((32, 32, 3), np.float32)})
    with pytest.raises(RecordError, match="no finished episode"):
        assemble(tmp_path / "c")


class RobotWithBuffers(KinematicRobot):
    """Its driver gives the same arrays at each call, and scales an action in place."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.shown = np.zeros((32, 32, 3), np.uint8), []  # type: ignore[var-annotated]

    def images(self) -> dict[str, Any]:
        self.picture[:] = super().images()["workspace"]
        self.shown.append(self.picture.copy())
        return {"workspace": self.picture}

    def state(self) -> Any:
        return self.hand

    def execute(self, action: Any) -> None:
        self.executed.append(action.copy())
        action *= SCALE
        self.hand += action
        self.picture[:] = 255


def test_a_robot_that_uses_its_arrays_again_is_recorded_as_it_was(tmp_path: Path) -> None:
    robot, seen = RobotWithBuffers(), []

    def answer(observation: dict[str, Any], socket: Any) -> Any:
        seen.append(np.array(observation["observation/images/workspace"]))
        return towards(GOAL)(observation, socket)

    with policy_server(answer) as server, Connection(server.url) as connection:
        with recorder(tmp_path) as recording:
            run_episode(
                robot, connection, "x", max_steps=5, execution=Execution(rate_hz=50.0), recorder=recording
            )
    with np.load(tmp_path / "episodes/000000/vectors.npz") as vectors:
        states, actions = vectors["state"], vectors["action"]
    begin = np.array([0, 0.5, 0.2, 0], np.float32)
    assert np.array_equal(actions, np.stack(robot.executed).astype(np.float32))
    assert np.array_equal(states[0], begin) and np.allclose(np.diff(states, axis=0), SCALE * actions[:-1])
    assert not any((picture == 255).all() for picture in seen)
    stats = json.loads((tmp_path / "episodes/000000/episode.json").read_text())["stats"]["workspace"]
    assert np.allclose(stats["q50"], 40 / 255), "pictures of what was seen, not of later"


def test_what_a_recording_cannot_hold_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"fps is 12\.5"):
        recorder(tmp_path, fps=12.5)
    with pytest.raises(RecordError, match="cannot be named 'arm/left'"):
        recorder(tmp_path, cameras=["arm/left"])
    (tmp_path / "recording.json").touch()
    with pytest.raises(RecordError, match=r"recording\.json is damaged"):
        recorder(tmp_path)


def test_an_episode_of_other_pictures_than_those_before_is_refused_before_anything_moves(
    tmp_path: Path, recorded: tuple[Path, list[KinematicRobot]]
) -> None:
    shutil.copytree(recorded[0], tmp_path / "again")
    (tmp_path / "again/episodes/.DS_Store").touch()
    with pytest.raises(RecordError, match=r"was \(32, 32, 3\), and is \(64, 64, 3\)"):
        recorder(tmp_path / "again").begin("x", {"workspace": np.zeros((64, 64, 3), np.uint8)})


@pytest.mark.parametrize(("instruction", "state"), [(b"bytes", np.zeros(4)), ("x", np.float64(0))], ids=str)
def test_no_episode_is_lost_in_silence(tmp_path: Path, instruction: Any, state: Any) -> None:
    recording, image = recorder(tmp_path), {"workspace": np.zeros((32, 32, 3), np.uint8)}
    recording.begin(instruction, image)
    recording.add(image, state, np.zeros(4))
    recording.end()
    assert list(recording.unrecorded) == [0]


def test_a_dataset_that_cannot_be_written_or_read_says_what_to_do(
    tmp_path: Path, recorded: tuple[Path, list[KinematicRobot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(recorded[0], folder)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("defi_client.recording.assemble.LeRobotWriter.finish", full)
        with pytest.raises(RecordError, match=r"No space left.*episodes are kept.*recording\.assemble"):
            assemble(folder)
    assert (folder / "dataset/meta/info.json").is_file(), "the one before"
    (folder / "episodes/000001/vectors.npz").write_bytes(b"")
    with pytest.raises(RecordError, match="000001 is damaged"):
        assemble(folder)


def test_an_episode_that_is_lost_is_named_and_the_others_kept(tmp_path: Path) -> None:
    recording = recorder(tmp_path, action_names=["only", "three", "names"])
    drive(recording, 3)
    with pytest.raises(RecordError, match=r"lacks 1 episodes.*action_names has 3 names for an array \(4,\)"):
        recording.close()


def test_a_computer_that_encodes_too_slowly_loses_the_episode_and_not_control(tmp_path: Path) -> None:
    recording, image = recorder(tmp_path, fps=1), {"workspace": np.zeros((32, 32, 3), np.uint8)}
    recording.begin("x", image)
    for _ in range(4000):
        recording.add(image, np.zeros(4), np.zeros(4))
    recording.end()
    assert "behind" in recording.unrecorded[0]


def test_the_readme_s_episode_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import defi_client

    readme = (Path(defi_client.__file__).parent / "README.md").read_text()
    _, code = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    module = ModuleType("my_robot")
    module.MyRobot = lambda: KinematicRobot(cameras=("front",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_robot", module)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with policy_server(towards(GOAL), {"cameras": ["front"]}) as server:
        exec(code.replace("ws://policy-server:8000", server.url), names)
    assert names["result"].steps == 30 and names["result"].limited["box"] == 0
    assert (tmp_path / "recordings/monday/dataset/meta/info.json").is_file()
