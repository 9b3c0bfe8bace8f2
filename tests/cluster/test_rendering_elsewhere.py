"""Files for `ray up`, SkyPilot and Slurm: accepted by their own readers, and scripts that do what they should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import render
import yaml
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config
from rendered import SHELLCHECK, VALUES, files
from rendering.checks import check
from rendering.values import ClusterValues

from defi_platform.config.loader import load_config
from defi_platform.errors import ConfigError

VALUES_OF_TRAIN = load_config(ClusterValues, VALUES / "shared.yaml").nodes["train"]


def shellcheck(script: str, *options: str) -> None:
    checked = subprocess.run(
        [SHELLCHECK, "--shell=bash", *options, "-"], input=script, text=True, capture_output=True
    )
    assert checked.returncode == 0, checked.stdout


@pytest.fixture(scope="module")
def ray_up() -> dict[str, Any]:
    (text,) = files("ray-up", "shared.yaml").values()
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


def test_ray_up_accepts_its_file_and_knows_roles_sizes_and_spot_nodes(ray_up: dict[str, Any]) -> None:
    types = ray_up["available_node_types"]
    head = types[ray_up["head_node_type"]]
    assert head["resources"] == {"CPU": 0} and head["labels"]["defi.max.train.GPU"] == "20"
    assert types["train"]["labels"] == {"defi.role": "train"}
    store = int(VALUES_OF_TRAIN.memory_gib * VALUES_OF_TRAIN.object_store * 2**30)
    assert types["train"]["resources"] == {"CPU": 180, "GPU": 8, "object_store_memory": store}
    assert types["train"]["docker"]["worker_run_options"] == [f"--shm-size={store + 2 * 2**30}b"]
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"decode-spot"}
    assert all(kind["node_config"]["IamInstanceProfile"] == {"Name": "defi"} for kind in types.values())
    assert not any(ray_up[f"{part}setup_commands"] for part in ("", "head_", "worker_")), (
        "all is in the image"
    )


def test_machines_are_described_as_ec2_takes_them(ray_up: dict[str, Any]) -> None:
    request = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for kind in ray_up["available_node_types"].values():
        config = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(config, request)
        assert not report.has_errors(), report.generate_report()


def test_ray_makes_no_security_group_of_its_own(
    ray_up: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those have port 22 open to everybody, which rules of the file do not take away.
    monkeypatch.setattr(aws_config, "_upsert_security_groups", lambda *_: pytest.fail("a group is made"))
    aws_config._configure_security_group(ray_up)
    groups = {
        tuple(kind["node_config"]["SecurityGroupIds"]) for kind in ray_up["available_node_types"].values()
    }
    assert groups == {("sg-00000000000000000",)}


def test_docker_is_given_each_option_once_and_may_pull_the_image(ray_up: dict[str, Any]) -> None:
    options = [
        *ray_up["docker"]["run_options"],
        *ray_up["available_node_types"]["train"]["docker"]["worker_run_options"],
    ]
    image = ray_up["docker"]["image"]
    command = docker_start_cmds("ubuntu", image, {}, "defi", options, "defi", "/root", "docker").split()
    names = [re.sub("^--net=", "--network=", word).split("=")[0] for word in command if word[:2] == "--"]
    assert len(names) == len(set(names)), "Docker refuses a network that is given twice"
    (login,) = ray_up["initialization_commands"]
    assert login.endswith(image.split("/")[0]) and "--region us-west-2" in login
    (text,) = files("ray-up", "shared.yaml", "image.name=docker.io/me/defi").values()
    assert yaml.safe_load(text)["initialization_commands"] == []


def test_ray_up_asks_for_tokens(ray_up: dict[str, Any]) -> None:
    assert ray_up["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    starts = [*ray_up["head_start_ray_commands"], *ray_up["worker_start_ray_commands"]]
    for command in starts:
        shellcheck(command)
        assert command == "ray stop" or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in starts[1]


def test_ray_up_starts_a_supervisor_for_each_job_with_the_head(
    ray_up: dict[str, Any], job_configs: Any
) -> None:
    supervised = [line for line in ray_up["head_start_ray_commands"] if "supervise" in line]
    assert len(supervised) == 5
    for line in supervised:
        command = re.search(r"nohup defi supervise --address http://127.0.0.1:8265 (.*?) >>", line)
        assert command and line.endswith("&")
        job_configs([word.strip("'") for word in command[1].split()])


def test_skypilot_tasks_start_ray_once_per_node_and_the_job_on_the_first() -> None:
    tasks = {name: yaml.safe_load(text) for name, text in files("skypilot", "aws.yaml").items()}
    assert len(tasks) == 7
    for task in tasks.values():
        for part in ("setup", "run"):
            shellcheck(task[part], "--exclude=SC1090,SC1091")
        assert "~/sky_templates/ray/start_cluster" in task["run"].splitlines()
        assert task["secrets"] == {"RAY_AUTH_TOKEN": None, "WANDB_API_KEY": None}
        assert task["resources"]["accelerators"] == "H100:8"


def test_skypilot_s_own_parser_accepts_the_tasks(tmp_path: Path) -> None:
    python = os.environ.get("SKY_PYTHON")
    if python is None:
        pytest.skip(
            "set SKY_PYTHON to the Python of a virtual environment with skypilot: it does not fit beside ours"
        )
    for name, text in files("skypilot", "aws.yaml", "skypilot.nodes=decode-spot", "skypilot.count=3").items():
        (tmp_path / name).write_text(text)
    program = (
        "import sys, sky\n"
        "for file in sys.argv[1:]:\n"
        "    task = sky.Task.from_yaml(file)\n"
        "    assert task.num_nodes == 3 and all(r.use_spot for r in task.resources), file\n"
    )
    files_ = [str(tmp_path / name) for name in files("skypilot", "aws.yaml")]
    secrets = {"RAY_AUTH_TOKEN": "t", "WANDB_API_KEY": "w"}
    ran = subprocess.run(
        [python, "-c", program, *files_],
        cwd=VALUES.parents[1],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"], **secrets},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture(scope="module")
def slurm_script() -> str:
    return files("slurm", "slurm.yaml", "slurm.setup=[]", "jobs.ingest.retries=1")["slurm-ingest.sh"]


def test_slurm_scripts_are_sound_and_ask_for_both_kinds_of_node() -> None:
    for name, text in files("slurm", "slurm.yaml").items():
        shellcheck(text, "--exclude=SC1090,SC1091")
        first, second = text.split("#SBATCH hetjob")
        assert "#SBATCH --gpus-per-node=8" in first and "--gpus" not in second
        assert "#SBATCH --time=24:00:00" in first and f"--job-name=defi-{name[6:-3]}" in first
        assert """RAY_OVERRIDE_LABELS='{"defi.role": "decode"}' srun --het-group=1 --nodes=2""" in second
    alike = files("slurm", "slurm.yaml", "slurm.nodes.train=3", "slurm.nodes.decode=0")["slurm-ingest.sh"]
    assert "hetjob" not in alike and "RAY_OVERRIDE_LABELS" not in alike, "no roles where all nodes are alike"
    assert 'srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=64 --exclude="$head"' in alike


def run_slurm(
    script: str, folder: Path, job: str, restarts: int = 0, signal_after_start: bool = False
) -> tuple[int, list[str]]:
    """Runs a batch script with stand-ins for Slurm's commands, Ray's and the job.

    Args:
        script: to run.
        folder: for the stand-ins and their log.
        job: shell lines of `defi`.
        restarts: times that Slurm has queued the job again.
        signal_after_start: sends what Slurm sends before the time limit, once the job runs.

    Returns: exit code, and the calls of the stand-ins.
    """
    log = folder / "calls"
    log.touch()
    programs = {
        "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" != show ] || echo localhost',
        "srun": 'echo "srun $*" >> "$CALLS"',
        "ray": 'echo "ray $*" >> "$CALLS"',
        "python": "echo 3",
        "defi": f'echo "defi $*" >> "$CALLS"; {job}',
    }
    for name, lines in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{lines}\n")
        (folder / name).chmod(0o755)
    (folder / "job.sh").write_text(script)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "CALLS": str(log),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "localhost",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    process = subprocess.Popen(["bash", str(folder / "job.sh")], env=env)
    if signal_after_start:
        deadline = time.monotonic() + 60
        while "started" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
    return process.wait(timeout=60), log.read_text().splitlines()


@pytest.mark.parametrize(
    ("job", "restarts", "code", "again"),
    [
        ("exit 0", 0, 0, False),
        ("exit 2", 0, 2, False),  # somebody has to change something
        ("exit 75", 0, 0, True),
        ("kill -9 $$", 0, 0, True),
        ("exit 75", 1, 75, False),  # all restarts are used up
    ],
)
def test_slurm_queues_a_job_again_unless_it_is_complete_or_somebody_has_to_act(
    slurm_script: str, tmp_path: Path, job: str, restarts: int, code: int, again: bool
) -> None:
    ended, calls = run_slurm(slurm_script, tmp_path, job, restarts)
    assert ended == code
    assert ("scontrol requeue 7" in calls) == again
    assert "defi ingest_videos --config datasets/videos/ingest_videos.yaml" in calls
    head = next(call for call in calls if "ray start --head" in call)
    assert "--nodelist=localhost" in head and "--cpus-per-task=64" in head and "--num-gpus=8" in head


def test_slurm_s_time_limit_stops_a_job_at_a_checkpoint_and_queues_it_again(
    slurm_script: str, tmp_path: Path
) -> None:
    job = 'trap \'echo stopped >> "$CALLS"; exit 0\' TERM; echo started >> "$CALLS"; while :; do sleep 0.05; done'
    ended, calls = run_slurm(slurm_script, tmp_path, job, signal_after_start=True)
    assert ended == 0
    assert calls.index("stopped") < calls.index("scontrol requeue 7")


@pytest.mark.parametrize(
    ("target", "overrides", "words"),
    [
        ("kuberay", ["nodes.train.gpu=8"], "no key 'nodes.train.gpu'"),
        ("kuberay", ["nodes.train.role=gpu"], "nodes.train.role is 'gpu'; it is decode or train"),
        ("kuberay", ["nodes.train.min=3"], "nodes.train: min is 3 and max 2"),
        ("kuberay", ["nodes.train.object_store=30"], "nodes.train.object_store is 30.0"),
        ("kuberay", ["jobs.pretrain.job=pretrian"], "did you mean 'pretrain'"),
        ("kuberay", ["jobs.pretrain.nodes=[trian]"], "did you mean 'train'"),
        (
            "kuberay",
            ["jobs.pretrain.shared=true"],
            "jobs.pretrain.nodes has no meaning on the shared cluster",
        ),
        ("kuberay", ["name=De_fi"], "cannot be the name of an object"),
        ("kuberay", ["jobs.pretrain-" + "x" * 50 + ".job=pretrain"], "47 characters at most"),
        ("kuberay", ["image.tag=null"], "image.tag has no value"),
        ("kuberay", ["kubernetes.mtls=true"], "--feature-gates=RayClusterMTLS=true"),
        ("kuberay", ["gcs.backend=rocksdb"], "gate GCSFaultToleranceEmbeddedStorage"),
        ("kuberay", ["gcs.redis_address=null"], "gcs.redis_address has no value"),
        ("kuberay", ["kubernetes.feature_gates=[RayClusterMTSL]"], "did you mean 'RayClusterMTLS'"),
        ("kuberay", ["service.nodes=[decode]"], "no type has the role train"),
        ("kuberay", ["env.RAY_AUTH_MODE=disabled"], "env.RAY_AUTH_MODE is set by what is rendered"),
        ("ray-up", ["env.DEFI_HOME=s3://other"], "env.DEFI_HOME is set by what is rendered"),
        ("kuberay", ["env.WANDB_API_KEY=abc"], "env.WANDB_API_KEY looks like a secret"),
        ("slurm", ["env.aws_secret_access_key=abc"], "looks like a secret"),
        ("ray-up", ["nodes.head=${nodes.train}"], "nodes.head: that name is taken"),
        ("kuberay", ["jobs.policy.job=pretrain"], "jobs.policy: that name is taken"),
        ("kuberay", ["name=" + "x" * 44], "service: '" + "x" * 44 + "-policy'"),
        ("kuberay", ["jobs.pretrain.overrides=[gfdm.train.stepz=1]"], "did you mean 'gfdm.train.steps'"),
        ("slurm", ["jobs.ingest.overrides=[--strict,data.decode.processes=none]"], "jobs.ingest: "),
        ("kuberay", ["service.overrides=[replica_gpu=1]"], "did you mean 'replica_gpus'"),
        ("kuberay", ["service.overrides=[port=9000]"], "service.overrides: port follows from"),
        ("kuberay", ["service.overrides=[replica_gpus=2]"], "a replica asks for 2 gpus"),
        ("ray-up", ["home=/shared"], "home is /shared; nodes of a cloud share no folder"),
        ("ray-up", ["aws.security_group=null"], "aws.security_group has no value"),
        ("ray-up", ["nodes.train.aws_type=null"], "nodes.train.aws_type has no value"),
        ("skypilot", ["skypilot.nodes=null"], "skypilot.nodes has no value"),
        ("skypilot", ["nodes.train.accelerator=null"], "nodes.train.accelerator has no value"),
        ("slurm", [], "slurm.nodes is empty"),
    ],
)
def test_values_that_cannot_work_are_refused_with_the_way_out(
    target: str, overrides: list[str], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(load_config(ClusterValues, VALUES / "aws.yaml", overrides), target)
    assert words.lower() in str(error.value).lower()


def test_the_commands_of_the_docs_write_the_files_that_the_docs_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (VALUES.parents[1] / "docs" / "deployment.md").read_text()
    pages = [page, *(file.read_text() for file in VALUES.iterdir())]
    commands = {
        line for text in pages for line in re.findall(r"python cluster/render.py +(\S.*output=\S+)", text)
    }
    assert len(commands) >= 6
    (tmp_path / "cluster").symlink_to(VALUES.parent)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert render.main(command.split()) == 0
    used = set(re.findall(r"build/cluster/\S+\.(?:yaml|sh)", page))
    assert len(used) >= 6
    assert [path for path in used if not (tmp_path / path).is_file()] == []


def test_the_command_writes_files_or_says_what_it_can_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render.main(["slurm", "--config", str(VALUES / "slurm.yaml"), f"output={tmp_path / 'here'}"]) == 0
    assert (tmp_path / "here" / "slurm-ingest.sh").read_text() == files("slurm", "slurm.yaml")[
        "slurm-ingest.sh"
    ]
    assert render.main(["grafana", f"output={tmp_path}"]) == 0
    assert (tmp_path / "dashboard.json").is_file()
    assert render.main(["table"]) == 0
    assert "| metric |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"output=.*: .*a folder that can be written to"):
        render.main(["grafana", f"output={tmp_path / 'dashboard.json'}"])
    with pytest.raises(ConfigError, match=r"'helm' is nothing .* kuberay, ray-up"):
        render.main(["helm"])
