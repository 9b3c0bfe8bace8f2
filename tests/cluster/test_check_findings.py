"""Checks of a cluster: for what each node answers, one line that passes or names the node and the fix."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

from defi_platform.data.decode.video_readers import CODECS, missing_codecs
from defi_platform.errors import ConfigError
from defi_platform.preflight import access, machine
from defi_platform.preflight.all_reduce import Bandwidth, bus_bytes, judge_bandwidth
from defi_platform.preflight.findings import CLIENT, Finding, has_failed, named, span
from defi_platform.preflight.folders import Access, Folder, WriteTest, judge_folder, try_reading, try_writing
from defi_platform.preflight.identity import judge_versions, make_identity
from defi_platform.preflight.job_needs import folders, listens, load_any

GIB = 2**30
GOOD = machine.Machine(8 * GIB, 8 * GIB, 100 * GIB, 50 * GIB, "/tmp", 1 << 20, ())


def the_line(findings: list[Finding], level: str) -> str:
    (found,) = findings
    assert found.level == level
    assert "\n" not in found.line()
    return found.text


# --- versions


def identity(**changes: Any) -> dict[str, Any]:
    return {**make_identity()(), "source": "abc", "error": "", **changes}


def test_equal_versions_pass_in_one_line() -> None:
    text = the_line(judge_versions({CLIENT: identity(), "a": identity(), "b": identity()}), "ok")
    assert f"Ray {ray.__version__}" in text and "2 nodes" in text


def test_another_python_or_torch_of_one_node_is_named() -> None:
    ours = identity()
    other = identity(python="3.12.1", packages={**ours["packages"], "torch": "2.0.0"})
    found = judge_versions({CLIENT: ours, "10.0.0.7": other, "10.0.0.8": ours})
    assert [f.level for f in found] == ["FAIL", "FAIL"]
    assert "node 10.0.0.7: Python 3.12" in found[0].text and "torch 2.0.0" in found[1].text


def test_another_patch_release_of_python_is_none_of_ours() -> None:
    assert (
        judge_versions({CLIENT: identity(python="3.11.1"), "a": identity(python="3.11.2")})[0].level == "ok"
    )


def test_an_image_without_the_package_is_named_with_the_way_out() -> None:
    bare = identity(error="ModuleNotFoundError: No module named 'defi_platform'", source="")
    text = the_line(judge_versions({CLIENT: identity(), "a": bare, "b": identity()}), "FAIL")
    assert "node a cannot import the platform" in text and "--working-dir" in text


def test_nodes_with_different_code_are_an_error_and_with_older_code_than_here_a_warning() -> None:
    apart = judge_versions({CLIENT: identity(), "a": identity(source="1"), "b": identity(source="2")})
    assert "different code" in the_line(apart, "FAIL")
    assert "abc" in the_line(judge_versions({CLIENT: identity(), "a": identity(source="1")}), "warn")


def test_identity_is_pickled_with_its_code_so_that_a_node_without_the_package_can_run_it() -> None:
    pickled = cloudpickle.dumps(make_identity())
    assert b"importlib" in pickled and b"No module" not in pickled
    assert cloudpickle.loads(pickled)()["ray"] == ray.__version__


# --- machines


def test_a_full_shared_memory_names_the_node_and_the_fix() -> None:
    full = dataclasses.replace(GOOD, shm_total=64 * 2**20, shm_free=2**20)
    text = the_line(machine.judge_shared_memory({"a": GOOD, "b": full}, {"a": GIB, "b": 2**20}), "FAIL")
    assert "node b: /dev/shm is full, 1 of 64 MiB free" in text and "--shm-size" in text


def test_an_object_store_larger_than_shared_memory_is_warned_of() -> None:
    text = the_line(machine.judge_shared_memory({"a": GOOD}, {"a": 9.0 * GIB}), "warn")
    assert "8.0 GiB, the object store 9.0" in text


@pytest.mark.parametrize(("limit", "level"), [(1 << 20, "ok"), (-1, "ok"), (20_000, "warn"), (1_024, "FAIL")])
def test_limits_of_files(limit: int, level: str) -> None:
    assert the_line(machine.judge_files({"a": dataclasses.replace(GOOD, files=limit)}), level)


def test_a_full_disk_is_an_error() -> None:
    assert "97% full" in the_line(
        machine.judge_disks({"a": dataclasses.replace(GOOD, disk_free=3 * GIB)}), "FAIL"
    )
    assert the_line(machine.judge_disks({"a": GOOD}), "ok")


@pytest.mark.parametrize(
    ("ahead", "level", "words"),
    [(0.1, "ok", "at most"), (-5.0, "warn", "5.0 s behind"), (300.0, "FAIL", "300.0 s ahead of")],
)
def test_clocks(ahead: float, level: str, words: str) -> None:
    assert words in the_line(machine.judge_clocks({"a": (ahead, 0.01)}), level)


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert the_line(machine.judge_clocks({"a": (3.0, 2.9)}), "ok")


def test_a_missing_decoder_is_named() -> None:
    found = machine.judge_decoders({"a": dataclasses.replace(GOOD, no_decoder=("av1",)), "b": GOOD})
    assert "node a: PyAV has no decoder for av1" in the_line(found, "FAIL")
    assert missing_codecs() == [], f"this PyAV has all of {CODECS}"


def test_fewer_gpus_than_ray_hands_out_are_an_error() -> None:
    two = dataclasses.replace(GOOD, gpus=("H100", "H100"))
    assert "2 GPUs" in the_line(machine.judge_gpus({"a": two}, {"a": 2.0}), "ok")
    assert "hands out 4 GPUs, torch sees 2" in the_line(machine.judge_gpus({"a": two}, {"a": 4.0}), "FAIL")
    broken = dataclasses.replace(GOOD, gpu_problem="no driver for CUDA 12.8 answers")
    assert "no driver" in the_line(machine.judge_gpus({"a": broken}, {"a": 1.0}), "FAIL")
    assert the_line(machine.judge_gpus({"a": GOOD}, {"a": 0.0}), "skip")


def test_this_machine_can_be_measured() -> None:
    here = machine.measure(with_gpus=False)
    assert here.shm_total > 0 and 0 < here.disk_free <= here.disk_total


# --- storage

RUN = Folder("s3://bucket/run", "train.output", True)


def test_a_store_that_one_node_alone_cannot_reach_is_said_to_be_that_nodes_problem() -> None:
    good = Access(write_mb_s=100, read_mb_s=200, list_ms=3)
    found = {CLIENT: good, "a": good, "b": Access(error="access is denied")}
    text = the_line(judge_folder(RUN, found, []), "FAIL")
    assert "from node b: access is denied" in text and "The others reach it" in text
    silent = the_line(judge_folder(RUN, {CLIENT: good, "a": good}, ["c"]), "FAIL")
    assert "from node c: no answer in time" in silent
    everywhere = {CLIENT: Access(error="x"), "a": Access(error="x")}
    assert "from all 2: x" in the_line(judge_folder(RUN, everywhere, []), "FAIL")


def test_speeds_are_given_from_slowest_to_fastest() -> None:
    found = {
        CLIENT: Access(write_mb_s=10, read_mb_s=20, list_ms=3),
        "a": Access(write_mb_s=11, read_mb_s=40, list_ms=3),
    }
    text = the_line(judge_folder(RUN, found, []), "ok")
    assert "read 20 to 40 MB/s, write 10 to 11 MB/s, list 3 ms" in text


def test_a_folder_that_is_another_one_on_some_node_is_an_error(tmp_path: Path) -> None:
    test = WriteTest(str(tmp_path / "run"))
    test.prepare()
    here = try_writing(test.folder, 1)
    assert here.marked and here.write_mb_s > 0 and not here.error
    elsewhere = try_writing(str(tmp_path / "other" / ".defi-check-1"), 1)
    assert not elsewhere.marked
    text = the_line(judge_folder(Folder("/run", "output", True), {CLIENT: here, "a": elsewhere}, []), "FAIL")
    assert "from node a another folder" in text
    test.delete()
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".defi-check-*"))


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "ot a directory" in try_writing(str(tmp_path / "file" / ".defi-check-1"), 1).error


def test_reading_takes_the_first_file_and_says_when_there_is_none(tmp_path: Path) -> None:
    assert not try_reading(str(tmp_path / "absent"), 1).present
    (tmp_path / "corpus").mkdir()
    assert try_reading(str(tmp_path / "corpus"), 1).present
    (tmp_path / "corpus" / "a.mp4").write_bytes(b"x" * 3_000_000)
    assert try_reading(str(tmp_path / "corpus"), 1).read_mb_s > 0
    some = Folder("/c", "data.corpora.a.path", False)
    both = {CLIENT: Access(present=True), "a": Access(present=False)}
    assert "another folder" in the_line(judge_folder(some, both, []), "FAIL")
    assert "nothing yet" in the_line(judge_folder(some, {CLIENT: Access(present=False)}, []), "warn")


# --- access


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param if "Authorization" not in self.headers else 200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("dashboard", "level"), [(401, "ok"), (200, "FAIL")], indirect=["dashboard"])
def test_a_dashboard_that_answers_without_the_token_is_an_error(dashboard: str, level: str) -> None:
    answer = access.answer_without_token(dashboard)
    the_line(access.judge_token({CLIENT: True, "a": True}, dashboard, answer, local=False), level)


def test_no_token_is_an_error_unless_only_this_machine_reaches_the_cluster() -> None:
    modes = {CLIENT: False, "a": False}
    assert "can run code" in the_line(access.judge_token(modes, "", "", local=False), "FAIL")
    assert the_line(access.judge_token(modes, "", "", local=True), "warn")
    assert access.is_local(["127.0.0.1", "::1"]) and not access.is_local(["127.0.0.1", "10.0.0.1"])


def test_a_dashboard_out_of_reach_is_warned_of() -> None:
    answer = access.answer_without_token("127.0.0.1:1")
    assert "does not answer" in the_line(
        access.judge_token({CLIENT: True}, "127.0.0.1:1", answer, True), "warn"
    )


def test_a_port_in_use_is_an_error_unless_the_policy_there_is_replaced() -> None:
    assert "in use" in the_line(access.judge_ports(8000, {"a": "it is in use", "b": ""}, ""), "FAIL")
    assert the_line(access.judge_ports(8000, {}, "0.0.0.0:8000"), "ok")
    assert the_line(access.judge_ports(None, {}, ""), "skip")


# --- network


def test_bandwidth_is_that_of_the_bus_and_errors_name_the_interface() -> None:
    assert bus_bytes(100, 4) == 150
    two = [Bandwidth(gb_s=2.0), Bandwidth(gb_s=2.5)]
    assert "2.00 to 2.50 GB/s" in the_line(judge_bandwidth("gloo", 2, two), "ok")
    assert "NCCL_SOCKET_IFNAME" in the_line(judge_bandwidth("nccl", 2, [Bandwidth(gb_s=0.1)] * 2), "warn")
    assert "GLOO_SOCKET_IFNAME" in the_line(judge_bandwidth("gloo", 2, [Bandwidth(error="timeout")]), "FAIL")
    assert the_line(judge_bandwidth("nccl", 2, None), "skip") and the_line(
        judge_bandwidth("gloo", 1, []), "skip"
    )


# --- the job's config


def test_a_config_file_is_that_of_the_job_it_is_named_like(repository: Path) -> None:
    job, config = load_any(str(repository / "configs" / "demo" / "pretrain_gidm.yaml"), [])
    assert job == "pretrain_gidm"
    assert {(folder.key, folder.writes) for folder in folders(config)} == {
        ("data.corpora.metaworld.path", False),
        ("data.manifest", True),
        ("data.split", True),
        ("train.output", True),
    }
    assert listens(config) is None
    job, config = load_any(str(repository / "configs" / "demo" / "serve_policy.yaml"), ["port=8123"])
    served = listens(config)
    assert job == "serve_policy" and served and served.port == 8123


def test_every_config_of_the_repository_is_that_of_some_job(repository: Path) -> None:
    for path in sorted((repository / "configs").rglob("*.yaml")):
        job, config = load_any(str(path), [])
        assert folders(config), path
        assert path.stem.startswith(job) or (path.parent.name, job) == ("eval", "evaluate_policy"), path


def test_a_file_of_no_job_says_what_is_wrong_for_the_likely_one(tmp_path: Path) -> None:
    path = tmp_path / "pretrain_gfdm.yaml"
    path.write_text("train: {outpt: x}")
    with pytest.raises(ConfigError, match=r"for pretrain_gfdm: .*train\.outpt.*--job"):
        load_any(str(path), [])


def test_lines_name_few_nodes_and_count_the_rest() -> None:
    assert named(list("abcdef")) == "nodes a, b, c, d and 2 more"
    assert named(["a", "b"], 2) == "all 2 nodes" and named(["a"], 1) == "node a"
    assert span([1.0, 1.2], "s", 1) == "1.0 to 1.2 s" and span([3.0]) == "3"
    assert has_failed([Finding("a", "FAIL", "")]) and not has_failed([Finding("a", "warn", "")])
    assert json.dumps(dataclasses.asdict(Finding("a", "ok", "b")))
