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
from kinematic_robot import KinematicRobot, towards
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
        assert np.allclose(signals.actions, np.stack(robot.executed), atol=1e-6)
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


def test_an_episode_that_is_lost_is_named_and_the_others_kept(tmp_path: Path) -> None:
    recording = recorder(tmp_path, action_names=["only", "three", "names"])
    drive(recording, 3)
    with pytest.raises(RecordError, match=r"lacks 1 episodes.*action_names has 3 names for 4 numbers"):
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
