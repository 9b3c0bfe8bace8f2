"""Recording of demonstrations, evaluation in a simulator, and the page about the corpora."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from defi_platform.config.cluster import RayConfig
from defi_platform.config.data import DataConfig
from defi_platform.config.fields import PATH
from defi_platform.config.serve import InferenceConfig, ObservationKeysConfig, ServeConfig


@dataclass
class SimulatorConfig:
    """The process that a simulator runs in."""

    python: str | None = field(default=None, metadata=PATH)
    """Interpreter that has the simulator's packages; null: this one, or the benchmark's own in `environments`."""
    environments: str | None = field(default=None, metadata=PATH)
    """Folder of virtual environments, one per benchmark (jobs/install_benchmark.py); null: `environments` beside the
    output."""
    step_timeout_s: float = 60.0
    """Seconds in which a step or a picture must be finished; after them the process is killed as hung."""
    reset_timeout_s: float = 300.0
    """Seconds for the start of the process, and for the start of an episode."""
    memory_gb: float = 8.0
    """Memory of the process, in 10^9 bytes, above which it is killed."""
    retries: int = 3
    """Times that an episode is run again after its simulator failed; then it is left out, and the table says so."""


@dataclass
class RecordConfig:
    """Recording of a simulator's scripted experts as LeRobot v3.0 datasets (jobs/record_demos.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    benchmark: str = "metaworld"
    """One with an expert, by name, or module:Class of one from outside."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the benchmark's own."""
    tasks: list[str] = MISSING
    """Tasks, e.g. [drawer-close-v3], and groups of them by name, e.g. [MT10]."""
    episodes_per_task: int = 20
    """Successful episodes to record per task."""
    labelled_per_task: int = 5
    """Episodes per task that keep their actions and proprioception, in a separate dataset."""
    seed: int = 0
    """First seed of the initial states; episode n has seed + n."""
    cameras: list[str] | None = None
    """Cameras of the benchmark, one video each; null: the benchmark's default."""
    height: int | None = None
    """Pixels, even; null: the benchmark's default."""
    width: int | None = None
    """Pixels, even; null: the benchmark's default."""
    max_steps: int | None = None
    """Simulator steps after which an episode without success is dropped, counted and replaced; null: the task's horizon."""
    hold_steps: int = 8
    """Simulator steps recorded after the first success, so that a policy also learns to stay there."""
    noise: float = 0.0
    """Standard deviation of the Gaussian noise on the executed actions (in -1..1); labels are the expert's own actions."""
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    workers: int = 2
    """Simulator processes."""
    output: str = field(default=MISSING, metadata=PATH)
    """Folder that receives `video/` (frames and text only) and `labelled/` (with actions)."""


@dataclass
class StopRuleConfig:
    """A sequential test of the policy's success rate, whose answer ends the evaluation; off while p0 and p1 are null."""

    p0: float | None = None
    """The answer "at most p0" may end it."""
    p1: float | None = None
    """The answer "at least p1" may end it; more than p0."""
    alpha: float = 0.05
    """Probability, at most, of the answer "at least p1" where the rate is p0 or less; at any number of looks."""
    beta: float = 0.05
    """Probability, at most, of the answer "at most p0" where the rate is p1 or more."""


@dataclass
class EvaluateConfig:
    """Closed-loop rollouts against a served policy (jobs/evaluate_policy.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    serve: ServeConfig = field(default_factory=lambda: ServeConfig(model=InferenceConfig(deterministic=True)))
    """The policy to serve for the evaluation; unused when `url` is set. Its `model.deterministic` is on here: actions do
    not depend on how many workers ask at the same time."""
    url: str | None = None
    """ws://host:port (wss:// for TLS; vla-eval+ws:// for a model server of vla-eval) of a policy that is already served;
    null: serve one for the evaluation."""
    token_file: str | None = field(default=None, metadata=PATH)
    """File with the token that the server asks for (serve.security.tokens); null: none."""
    benchmark: str = "metaworld"
    """Its name, or module:Class of one from outside."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the benchmark's own."""
    tasks: list[str] = MISSING
    """Tasks, e.g. [drawer-close-v3], and groups of them by name, e.g. [MT10]; [all] for all."""
    arms: list[str] = field(default_factory=lambda: ["policy", "random", "expert"])
    """Policies to compare: policy | random | expert."""
    episodes_per_task: int | None = 10
    """Episodes per task and arm; null: all initial states of each task, where a benchmark has a fixed number of them."""
    seed: int | None = None
    """First seed of the initial states; every arm gets the same ones. Choose it apart from the recording's seeds. null:
    10,000, or 0 where the benchmark has a fixed number of initial states."""
    max_steps: int | None = None
    """Simulator steps after which a task, or subtask of a chain, counts as failed; null: as the benchmark says."""
    cameras: list[str] | None = None
    """Cameras of the benchmark that the policy looks through, as in the recording; null: the benchmark's default."""
    height: int | None = None
    """Pixels, even where videos are written; null: the benchmark's default."""
    width: int | None = None
    """Pixels, even where videos are written; null: the benchmark's default."""
    policy_name: str | None = None
    """Name of the policy, where its server does not identify it."""
    observation_keys: ObservationKeysConfig = field(default_factory=ObservationKeysConfig)
    """Keys under which a foreign server expects images, state and prompt; unset: ours."""
    policy_cameras: dict[str, str] = field(default_factory=dict)
    """Camera of the benchmark -> the name by which the policy knows it, where they differ."""
    execute_steps: int | None = None
    """Actions of a chunk that are executed before the next observation is sent; null: as many as the policy says."""
    video_every: int = 2
    """Simulator steps per frame of the episode videos; 0 writes none."""
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)
    stop_rule: StopRuleConfig = field(default_factory=StopRuleConfig)
    workers: int = 2
    """Simulator processes; episodes are the same with any number."""
    output: str = field(default=MISSING, metadata=PATH)
    """Folder that receives results, episode videos and the report."""


@dataclass
class CompareConfig:
    """Comparison of evaluations on the initial states that all policies met (jobs/compare_evaluations.py)."""

    outputs: list[str] = MISSING
    """Folders of two or more evaluations; each is compared with the first. On the command line: just their paths."""
    arms: list[str] | None = None
    """Policy under test of each output; null: `policy` of all. An output may be named twice, with two arms."""
    ignore: list[str] = field(default_factory=list)
    """Parts of the protocol that may differ because they are what is compared, e.g. [execute_steps, view.height]."""
    confidence: float = 0.95
    """Level of the intervals; 1 minus it is that of the tests."""
    power: float = 0.8
    """Probability with which the smallest visible difference would be found."""
    json: bool = False
    """Print JSON instead of tables; on the command line: --json."""
    fail_if_worse: bool = False
    """Exit with code 1 when a policy is significantly worse than the first; on the command line: --fail-if-worse."""


@dataclass
class ExportEvaluationConfig:
    """Results of an evaluation for other tools: vla-eval, Rerun (jobs/export_evaluation.py)."""

    evaluation: str = field(default=MISSING, metadata=PATH)
    """Output folder of jobs/evaluate_policy.py."""
    output: str = field(default=MISSING, metadata=PATH)
    """JSON file to write; for `rerun` a local folder."""
    layout: str = "results"
    """results | leaderboard | rerun: a results file of vla-eval, an entry for its leaderboard.json, or a recording (.rrd)
    per episode for Rerun's viewer, which needs the extra `rerun`."""
    arm: str = "policy"
    """Policy under test whose episodes are exported."""
    episodes: int = 20
    """Recordings for Rerun, those of failed episodes first."""
    model: str | None = None
    """Key of the leaderboard's entry, such as a BibTeX key."""
    display_name: str | None = None
    """Of the method, for the leaderboard; null: as `model`."""
    curated_by: str | None = None
    """For the leaderboard: the name on GitHub of who stands for the entry, with or without "@"."""
    finetuned: bool = True
    """For the leaderboard: trained on this benchmark's data; false: one checkpoint for all benchmarks."""


@dataclass
class TuneConfig(EvaluateConfig):
    """Measurement of what an evaluation needs, by the same config (jobs/tune_evaluation.py)."""

    measure_s: float = 8.0
    """Seconds of each measurement."""
    turns: int = 3
    """Times that every number of workers and clients is measured, in turns."""
    most_workers: int | None = None
    """Simulators side by side, at most; null: as many as CPUs are free beside the policy."""
    clients: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    """Numbers of clients that ask the policy at once; what comes together is answered in one batch."""
    check_episodes: int = 2
    """Real episodes of each worker, after a first one that does not count, that the prediction is held against; 0: none."""


@dataclass
class InspectConfig:
    """One HTML page about the corpora (jobs/inspect_corpus.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: int = 0
    """Seed of the plan whose mixture is shown."""
    samples: int = 10_000
    """Samples of the plan that are counted."""
    videos_per_corpus: int = 12
    """Videos of the contact sheet per corpus."""
    frames_per_video: int = 6
    """Frames of each of those videos."""
    output: str = field(default=MISSING, metadata=PATH)
    """Folder that receives corpora.html."""


@dataclass
class OfflineConfig:
    """Actions of a policy held against recorded ones, without a simulator (jobs/evaluate_offline.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    """The policy to serve for the evaluation; unused when `url` is set."""
    url: str | None = None
    """ws://host:port (wss:// for TLS) of a policy that is already served; null: serve one for the evaluation."""
    token_file: str | None = field(default=None, metadata=PATH)
    """File with the token that the server asks for (serve.security.tokens); null: none."""
    policy_name: str | None = None
    """Name of the policy, where its server does not identify it."""
    observation_keys: ObservationKeysConfig = field(default_factory=ObservationKeysConfig)
    """Keys under which a foreign server expects images, state and prompt; unset: ours."""
    dataset: str = field(default=MISSING, metadata=PATH)
    """Folder of a LeRobot v2.1 or v3.0 dataset with actions: local, s3:// or any fsspec URL."""
    episodes: list[int] | None = None
    """Numbers of the episodes to evaluate on; null: those that the policy's training has held out."""
    split: str | None = field(default=None, metadata=PATH)
    """data.split of the policy's training; null: as the run of the policy's folder says, else `holdout`."""
    corpus: str | None = None
    """Name of this dataset in that training (data.corpora.NAME), with `split`."""
    holdout: float | None = None
    """data.holdout of the policy's training, where it learned from this dataset without a split of its project; null: as the
    run of the policy's folder says, else 0.1."""
    max_episodes: int | None = None
    """Episodes at most, the first of them; null: all."""
    every: int = 10
    """Steps from one observation to the next."""
    policy_cameras: dict[str, str] = field(default_factory=dict)
    """Camera of the dataset -> the name by which the policy knows it; empty: all of them, by their own names."""
    seed: int = 10_000
    """From which the seeds of requests follow."""
    output: str = field(default=MISSING, metadata=PATH)
    """Folder that receives offline.json and the predicted actions."""


@dataclass
class InstallConfig:
    """Installation of a benchmark's simulator (jobs/install_benchmark.py)."""

    benchmark: str = MISSING
    """Its name; may stand alone on the command line."""
    python: str | None = None
    """Interpreter that its environment is made of: a path or command; null: the first that its packages run on."""
    environments: str = field(default="${home:}/environments", metadata=PATH)
    """Folder of virtual environments, one per benchmark, as `simulator.environments` of an evaluation."""
    clones: dict[str, str] = field(default_factory=dict)
    """Name -> folder of a repository's clone, for packages that are on no index; the job says which it needs."""
