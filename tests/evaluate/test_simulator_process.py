"""A simulator's process: whatever it does, its owner goes on, names what happened, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from faulty_benchmark import FAULT_AT, Counter
from hypothesis import given
from hypothesis import strategies as st

from defi_platform.config import EvaluateConfig, SimulatorConfig
from defi_platform.errors import SimulatorError, SimulatorFault
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.episode import Rollout
from defi_platform.evaluate.simulation import wire
from defi_platform.evaluate.simulation.process import SimulatorProcess
from defi_platform.evaluate.simulator import Simulator

FAULTY = "faulty_benchmark:Faulty"
TIGHT = SimulatorConfig(step_timeout_s=30.0, memory_gb=0.2)
IMPATIENT = SimulatorConfig(step_timeout_s=1.0)


def opened(
    benchmark: str = FAULTY, limits: SimulatorConfig = TIGHT, view: View | None = None
) -> SimulatorProcess:
    return SimulatorProcess(benchmark, view or Counter.default_view, {}, limits=limits)


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 60
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE and psutil.Process(pid).ppid() != os.getpid():
            return True  # dead, and whoever inherited it has not looked yet
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("hang", "hang", r"no progress in 1 s; at File .*faulty_benchmark.py.* in _do_hang"),
        (
            "abort",
            "abort",
            r"ended by SIGABRT; at File .* in _do_abort; its last output: physics has diverged",
        ),
        ("segfault", "abort", r"ended by SIGSEGV; at File .*ctypes"),
        ("exit", "abort", "ended with exit code 3"),
        ("killed", "memory", "killed from outside, as the system does when memory runs out"),
        ("leak", "memory", r"0\.\d+ GB in use, simulator.memory_gb is 0.2"),
        ("leak_for_ever", "memory", r"0\.[2-9]\d? GB in use"),
        ("error", "error", r"ZeroDivisionError: the quaternion has no length \(faulty_benchmark.py, line"),
        ("lost_context", "render", "RuntimeError: no current context"),
        ("black_picture", "render", "camera left gives zeros only: its rendering context is lost"),
        ("garbage", "protocol", "b'MuJoCo warning: .* is no start of a frame"),
    ],
)
def test_each_failure_has_its_name_and_leaves_no_process(task: str, kind: str, message: str) -> None:
    simulator = opened(limits=IMPATIENT if task == "hang" else TIGHT)
    pid = simulator.pid
    simulator.reset(task, 0)
    with pytest.raises(SimulatorFault, match=message) as fault:
        did = simulator.expert(10, through=True)
        simulator.observe(did.steps[-1].state)
    assert fault.value.kind == kind
    assert fault.value.message.startswith(f"{FAULTY}, ") and "\n" not in fault.value.message
    assert not psutil.pid_exists(pid), "dead, and not a zombie either"


def test_a_picture_of_another_type_is_named() -> None:
    with opened() as simulator:
        _, state = simulator.reset("wrong_picture", 0)
        with pytest.raises(
            SimulatorFault, match=r"camera right gives float32 \(32, 24, 3\) in the place of uint8"
        ):
            simulator.observe(state)


def test_what_a_simulator_prints_is_in_nobodys_way() -> None:
    with opened() as simulator:
        simulator.reset("chatter", 0)
        assert len(simulator.expert(10, through=True).steps) == 10


def test_a_slow_simulator_is_not_a_hung_one() -> None:
    with opened(limits=SimulatorConfig(step_timeout_s=1.5)) as simulator:
        simulator.reset("slow", 0)
        simulator.advance(np.ones((FAULT_AT, 1)), through=True)
        simulator.expert(5, through=True)  # steps of 0.4 s


def test_children_of_a_simulator_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIDS_FILE", str(tmp_path / "pids"))
    simulator = opened(limits=IMPATIENT)
    simulator.reset("hang_with_child", 0)
    with pytest.raises(SimulatorFault, match="hang"):
        simulator.expert(10, through=True)
    assert all(is_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


OWNER = """
import sys
sys.path.insert(0, {folder!r})
from test_simulator_process import opened
from defi_platform.config import SimulatorConfig
simulator = opened(limits=SimulatorConfig())
simulator.reset("hang_with_child", 0)
simulator.expert(10, through=True)
"""


def test_a_simulator_in_native_code_dies_with_its_owner(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = OWNER.format(folder=str(Path(__file__).parent))
    owner = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PIDS_FILE": str(pids)})
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert all(is_gone(int(pid)) for pid in pids.read_text().split())


def test_descriptors_are_given_back() -> None:
    gc.collect()
    before, times = len(os.listdir("/proc/self/fd")), 3
    for _ in range(times):
        with opened():
            pass
    # Less than one for each: this process may be opening something else as well.
    assert len(os.listdir("/proc/self/fd")) < before + times


def test_an_interpreter_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(
        SimulatorError, match=r"interpreter /none/python of calvin .*install_benchmark.py calvin"
    ):
        SimulatorProcess("calvin", Counter.default_view, {}, "/none/python")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('exec {python} -I -S "$@"', "cannot run .*: it has no package '(numpy|msgpack)'"),
        ("exit 1", "it ends with exit code 1"),
        ("echo cannot execute binary file; exit 126", "its last output: cannot execute binary file"),
    ],
    ids=["no packages", "no python", "of another machine"],
)
def test_an_interpreter_that_will_not_do_says_why(script: str, message: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n" + script.format(python=sys.executable) + "\n")
    python.chmod(0o755)
    with pytest.raises(SimulatorError, match=message):
        SimulatorProcess(FAULTY, Counter.default_view, {}, str(python))


def test_another_interpreter_gets_our_packages_and_nothing_that_lies_beside_them(tmp_path: Path) -> None:
    # Its own packages are the two that it needs; those of this interpreter would be another Python's.
    python = tmp_path / "python"
    places = ":".join({str(Path(module.__file__).parents[1]) for module in (np, wire.msgpack)})
    python.write_text(
        f'#!/bin/sh\ntest -z "$PYTHONPATH" && PYTHONPATH={places} exec {sys.executable} -S "$@"\n'
    )
    python.chmod(0o755)
    with SimulatorProcess(FAULTY, Counter.default_view, {}, str(python)) as simulator:
        simulator.reset("nothing", 3)
        assert [step.state[0] for step in simulator.expert(3).steps] == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("WideState", r"ValueError: the state has shape \(3,\) in the place of \(1,\), see state_names"),
        ("Diverged", "ValueError: the state is not finite: sum"),
        ("NoSubtask", r"ValueError: chain\('chain', 3\) is empty"),
        ("NoSteps", "a subtask whose horizon is no step"),
    ],
)
def test_what_a_benchmark_must_not_give_is_its_own_fault(name: str, message: str) -> None:
    with (
        opened(f"faulty_benchmark:{name}") as simulator,
        pytest.raises(SimulatorFault, match=message) as fault,
    ):
        simulator.reset("chain", 3)
        simulator.expert(3)
    assert fault.value.kind == "error"


def test_states_are_of_their_own_steps_though_a_benchmark_has_one_array_for_all() -> None:
    with opened("faulty_benchmark:OneArray") as simulator:
        simulator.reset("chain", 3)
        assert [step.state[0] for step in simulator.expert(3).steps] == [4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoJson", r"NoJson: protocol\(\) gives what JSON cannot hold \(Object of type PosixPath"),
        (
            "NoLibrary",
            r"NoLibrary cannot be imported here \(libGL.so.1: cannot open shared object file\)\. Install",
        ),
    ],
)
def test_a_benchmark_that_cannot_begin_says_why(name: str, message: str) -> None:
    with pytest.raises(SimulatorError, match=message):
        opened(f"faulty_benchmark:{name}")


def test_packages_that_are_not_installed_are_named() -> None:
    with pytest.raises(SimulatorError, match=r"not installed here \(no module 'no_such_simulator'\)"):
        opened("faulty_benchmark:Uninstalled")


def test_frames_of_a_long_chunk_arrive_in_order_though_the_memory_holds_fewer() -> None:
    view = View(("left",), 1024, 1024)
    with opened(view=view, limits=SimulatorConfig()) as simulator:
        simulator.reset("nothing", 0)
        did = simulator.expert(24, frame_every=2, first_step=0, through=True)
    assert [frame["left"][0, 0, 0] for frame in did.frames] == [1 + step for step in range(0, 24, 2)]
    assert len(did.steps) == 24


def test_metaworld_without_its_rendering_context_is_a_fault_of_rendering() -> None:
    simulator = opened("faulty_benchmark:LostContext", SimulatorConfig(), View(("workspace",), 32, 32))
    _, state = simulator.reset("reach-v3", 0)
    simulator.observe(state)
    simulator.advance(np.zeros((1, 4)))
    with pytest.raises(SimulatorFault, match=r"^render: .* its rendering context is lost"):
        simulator.observe(state)


def test_a_worker_goes_on_with_a_fresh_process(tmp_path: Path) -> None:
    config = EvaluateConfig(
        benchmark=FAULTY,
        options={"trace": str(tmp_path / "trace")},
        tasks=["twice"],
        arms=["expert"],
        video_every=0,
        output=str(tmp_path / "run"),
    )
    worker = Simulator(config, "")
    for _ in range(2):
        with pytest.raises(SimulatorFault, match="physics has diverged"):
            worker.work(Rollout("expert", "twice", 0))
    row = worker.work(Rollout("expert", "twice", 0)).row
    assert row["success"] and row["steps"] == 5


@given(st.binary(max_size=64))
def test_bytes_that_are_no_frame_are_refused_or_waited_on(data: bytes) -> None:
    buffer = bytearray(data)
    with contextlib.suppress(wire.WireError):
        assert wire.unpack(buffer) is None or data.startswith(b"DSIM")
    frame = wire.pack({"values": np.arange(3, dtype=np.int16), "text": "é", "none": None})
    message = wire.unpack(bytearray(frame + data))
    assert (
        message is not None
        and message["values"].dtype == np.int16
        and message["values"].tolist() == [0, 1, 2]
    )
    assert wire.unpack(bytearray(frame[:-1])) is None
    with pytest.raises(wire.WireError):
        wire.unpack(bytearray(frame[:8] + b"\xc1" * (len(frame) - 8)))
