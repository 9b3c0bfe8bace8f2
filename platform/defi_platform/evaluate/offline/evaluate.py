"""The offline evaluation of one policy: asks its server about recorded observations and stores what it answers.

A policy is asked as a robot would ask it, through its server, so that what is measured is what would act: its pictures
are resized, its state normalised and its chunk computed there. An episode's answers are a file; an evaluation that was
interrupted goes on after them.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform import logs, storage
from defi_platform.cluster import ray_session
from defi_platform.config import DataConfig, OfflineConfig
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sources.records import Signals
from defi_platform.errors import ConfigError, CorpusError
from defi_platform.evaluate.episode import request_seed
from defi_platform.evaluate.offline.action_error import Predictions, Scale, mean_errors, scale_of
from defi_platform.evaluate.offline.dataset import Dataset, Episode, Pictures, open_dataset
from defi_platform.evaluate.offline.table import error_lines
from defi_platform.evaluate.policy.observation import client_keys, policy_observation
from defi_platform.evaluate.policy.training_run import part_of, training_config
from defi_platform.evaluate.policy_client import PolicyClient, check_same_policy, read_token
from defi_platform.evaluate.resume_guard import bind_settings
from defi_platform.progress import Progress
from defi_platform.storage.writable import check_writable

SUMMARY = "offline.json"
_EPISODES = "episodes"
ARMS = ("policy", "repeat_last", "mean_action")
"""The policy, one that goes on with the last action, and one that always gives the mean of the recorded actions."""


@dataclass(frozen=True)
class OfflineResult:
    """The result; `<output>/offline.json` holds the same."""

    output: str
    details: dict[str, Any]

    def summary(self) -> str:
        """A table of errors with 95 % intervals."""
        return "\n".join([*error_lines(self.details), self.output])


def evaluate_offline(config: OfflineConfig) -> OfflineResult:
    """Evaluates a policy on the held-out episodes of a dataset.

    Raises:
        ConfigError: a setting is out of range, the policy does not fit the dataset, or the output holds another
            evaluation.
        CorpusError: the dataset cannot be used.
        ServeError: the policy cannot be served or does not answer.
    """
    _check(config)
    keys = client_keys(config.observation_keys)
    dataset = open_dataset(storage.absolute(config.dataset))
    chosen = _chosen(config, dataset)
    check_writable(config.output)
    output = storage.absolute(config.output)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(config))
        identity = client.metadata.get("policy_digest") or config.policy_name
        if not identity:
            raise ConfigError(
                f"the policy server at {client.url} does not say which policy it serves; name it: policy_name=NAME."
            )
        settings = _settings(config, dataset, chosen) | {"policy": identity}
        bind_settings(storage.join(output, _EPISODES), settings, "an offline evaluation", output)
        asker = _Asker(config, client, keys, _cameras(config, dataset, client.metadata))
        found, left_out = _predictions(config, dataset, chosen, asker, storage.join(output, _EPISODES))
    if not found:
        reasons = "; ".join(sorted(set(left_out.values()))[:3])
        raise CorpusError(f"no episode of {dataset.root} can be evaluated on: {reasons}.")
    scale, of_others = _scale(dataset, chosen)
    details = {
        "dataset": dataset.root,
        "policy": dict(client.metadata) or {"name": config.policy_name},
        "action_names": list(dataset.action_names),
        "errors": {arm: mean_errors(_of_arm(arm, found, scale), scale) for arm in ARMS},
        "scale": {"mean": scale.mean.tolist(), "std": scale.std.tolist(), "of_other_episodes": of_others},
        "settings": settings,
        "left_out": {**dataset.left_out, **left_out},
        "wall_s": round(time.monotonic() - start, 1),
    }
    storage.write_text(storage.join(output, SUMMARY), json.dumps(details, indent=1))
    return OfflineResult(output, details)


# --------------------------------------------------------------------------- asking


@contextlib.contextmanager
def _client(config: OfflineConfig) -> Iterator[PolicyClient]:
    token = read_token(config.token_file)
    with contextlib.ExitStack() as stack:
        url = config.url
        if not url:
            # Imported here: with a url no models are needed.
            from defi_platform.serve.deployment.server import deploy
            from defi_platform.serve.deployment.startup_checks import check_policy_folder

            check_policy_folder(config.serve.policy)
            stack.enter_context(ray_session(config.ray))
            url = stack.enter_context(deploy(config.serve, guest=True)).url
        client = PolicyClient(url, token=token)
        stack.enter_context(client)
        yield client


class _Asker:
    """Asks the policy about the steps of an episode."""

    def __init__(self, config: OfflineConfig, client: PolicyClient, keys: Any, cameras: Mapping[str, str]):
        self._config, self._client, self._keys, self._cameras = config, client, keys, cameras
        self._digest = client.metadata.get("policy_digest")

    def about(
        self, pictures: Pictures, episode: Episode, signals: Signals, steps: Sequence[int]
    ) -> NDArray[np.float32]:
        """Predicted actions, (N, H, A).

        Args:
            pictures: reader of the dataset's.
            episode: whose steps they are.
            signals: of the episode.
            steps: the N steps.

        Raises:
            BadVideo: the episode's pictures cannot be read.
            ConfigError: the policy's actions are not the dataset's.
            ServeError: the policy does not answer.
        """
        length, dims = signals.actions.shape
        views = [pictures.at(episode, camera, steps, length) for camera in self._cameras]
        chunks = []
        for step, *seen in zip(steps, *views, strict=True):
            message = policy_observation(
                self._keys,
                dict(zip(self._cameras.values(), seen, strict=True)),
                None if signals.proprio is None else signals.proprio[step],
                prompt=episode.text,
                seed=request_seed(self._config.seed, episode.name, step),
            )
            actions, answer = self._client.infer(message)
            check_same_policy(self._digest, answer.get("policy_digest"), self._client.url)
            if actions.shape[1] != dims:
                raise ConfigError(
                    f"the policy at {self._client.url} gives {actions.shape[1]} action dims, {self._config.dataset} has "
                    f"{dims}. Evaluate it on a dataset of its own robot."
                )
            chunks.append(np.asarray(actions, np.float32))
        shortest = min(map(len, chunks))
        return np.stack([chunk[:shortest] for chunk in chunks])


def _predictions(
    config: OfflineConfig, dataset: Dataset, chosen: Sequence[Episode], asker: _Asker, folder: str
) -> tuple[list[_Answered], dict[str, str]]:
    """Answers for all chosen episodes, those of an earlier run included, and why others have none."""
    there = set(storage.names(folder))
    found, left_out = [], {}
    with Pictures() as pictures, Progress("offline", "episodes", len(chosen)) as progress:
        for episode in chosen:
            file = f"{episode.name}.npz"
            try:
                signals = dataset.signals(episode)
                # A step later than the first: there the baseline that repeats an action has none to repeat.
                steps = range(1, len(signals.actions), config.every)
                if not steps:
                    raise CorpusError("it has one step")
                if file in there:
                    predicted = _read(storage.join(folder, file))
                else:
                    predicted = asker.about(pictures, episode, signals, steps)
                    _write(storage.join(folder, file), predicted, steps)
                found.append(_Answered(predicted, signals.actions, steps))
            except (BadVideo, CorpusError) as error:
                left_out[episode.name] = str(error)
            progress.step(note=f"{len(left_out)} left out" if left_out else "")
    return found, left_out


@dataclass(frozen=True)
class _Answered:
    predicted: NDArray[np.float32]
    """(N, H, A)"""
    actions: NDArray[np.float32]
    """(n, A) of the whole episode."""
    steps: Sequence[int]

    def recorded(self, horizon: int) -> NDArray[np.float32]:
        """(N, H, A); NaN past the end."""
        ended = np.full((horizon, self.actions.shape[1]), np.nan, np.float32)
        padded = np.concatenate([self.actions, ended])
        return np.stack([padded[step : step + horizon] for step in self.steps])


def _of_arm(arm: str, found: Sequence[_Answered], scale: Scale) -> list[Predictions]:
    horizon = min(one.predicted.shape[1] for one in found)
    result = []
    for one in found:
        shape = (len(one.steps), horizon, one.actions.shape[1])
        if arm == "policy":
            predicted = one.predicted[:, :horizon]
        elif arm == "repeat_last":
            before = np.asarray(one.actions)[np.asarray(one.steps) - 1]
            predicted = np.broadcast_to(before[:, None], shape)
        else:
            predicted = np.broadcast_to(scale.mean.astype(np.float32), shape)
        result.append(Predictions(predicted, one.recorded(horizon)))
    return result


def _write(uri: str, predicted: NDArray[np.float32], steps: Sequence[int]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, predicted=predicted, steps=np.asarray(steps))
    storage.write_bytes(uri, buffer.getvalue())


def _read(uri: str) -> NDArray[np.float32]:
    with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as arrays:
        return np.asarray(arrays["predicted"], np.float32)


# --------------------------------------------------------------------------- choices and checks


def _chosen(config: OfflineConfig, dataset: Dataset) -> tuple[Episode, ...]:
    if config.episodes is not None:
        chosen = dataset.named(config.episodes)
    elif kept := _split(config):
        chosen = dataset.held_out_by(ProjectSplit(kept[0]), kept[1])
        logs.say(
            f"{config.dataset}: {len(chosen)} episodes that the project's split {kept[0]} holds out of {kept[1]}"
        )
        if not chosen:
            raise ConfigError(
                f"split {kept[0]} holds out none of the {len(dataset.episodes)} episodes of {dataset.root} (corpus {kept[1]}); "
                "name episodes, which the policy may have learned from."
            )
    else:
        share = _holdout(config)
        chosen = dataset.held_out(share)
    if not chosen:
        raise ConfigError(
            f"holdout is {share}, which leaves none of the {len(dataset.episodes)} episodes of {dataset.root} "
            "to evaluate on; raise it to what the policy was trained with, or name episodes."
        )
    return chosen[: config.max_episodes]


def _split(config: OfflineConfig) -> tuple[str, str] | None:
    """(`data.split`, name of the dataset) of the policy's training: as configured, else as the run that it lies in says."""
    if config.split is not None:
        if config.corpus is None:
            raise ConfigError(
                "split needs corpus, the name that this dataset has in the trainings (data.corpora.NAME)."
            )
        return config.split, config.corpus
    data, name = _training(config)
    return (str(data["split"]), name) if data.get("split") else None


def _holdout(config: OfflineConfig) -> float:
    """`data.holdout` of the policy's training: as configured, else as the run that it lies in says, else the usual one."""
    usual = DataConfig().holdout
    return float(_training(config)[0].get("holdout", usual)) if config.holdout is None else config.holdout


def _training(config: OfflineConfig) -> tuple[Mapping[str, Any], str]:
    """(`data` of the policy's training, name of the dataset in it); empty where nobody knows, or it did not learn from it."""
    data = {} if config.url else part_of(training_config(config.serve.policy), "data")
    for name, corpus in part_of(data, "corpora").items():
        path = corpus.get("path") if isinstance(corpus, dict) else None
        if path and storage.absolute(path) == storage.absolute(config.dataset):
            return data, name
    return {}, ""


def _scale(dataset: Dataset, chosen: Sequence[Episode]) -> tuple[Scale, bool]:
    """Scale of the actions that the policy may have learned from, where there are others than the chosen ones."""
    names = {episode.name for episode in chosen}
    others = [episode for episode in dataset.episodes if episode.name not in names]
    actions = []
    for episode in others or chosen:
        try:
            actions.append(dataset.signals(episode).actions)
        except CorpusError:
            continue  # counted where it is evaluated on; a scale needs no single episode
    if not actions:
        raise CorpusError(f"no episode of {dataset.root} has readable actions.")
    return scale_of(actions), bool(others)


def _cameras(config: OfflineConfig, dataset: Dataset, greeting: Mapping[str, Any]) -> dict[str, str]:
    """Camera of the dataset -> name that the policy knows it by.

    Raises:
        ConfigError: the policy looks through one that the dataset does not have, or does not say which.
    """
    present = sorted({camera for episode in dataset.episodes for camera in episode.cameras})
    unknown = [camera for camera in config.policy_cameras if camera not in present]
    if unknown:
        raise ConfigError(
            f"policy_cameras: {dataset.root} has no camera '{unknown[0]}', but {', '.join(present)}."
        )
    names = dict(config.policy_cameras) or {camera: camera for camera in present}
    wanted = greeting.get("cameras")
    if wanted is None:
        return names
    if list(wanted) == ["*"] and len(names) == 1:
        return names
    chosen = {camera: name for camera, name in names.items() if name in wanted}
    missing = sorted(set(map(str, wanted)) - set(chosen.values()))
    if missing:
        raise ConfigError(
            f"the policy looks through {', '.join(map(str, wanted))}; {dataset.root} has {', '.join(present)}. Say which is "
            f"which: policy_cameras={{{present[0]}: {missing[0]}}}."
        )
    return chosen


def _settings(config: OfflineConfig, dataset: Dataset, chosen: Sequence[Episode]) -> dict[str, Any]:
    """Settings that decide an answer."""
    return {
        "dataset": dataset.root,
        "every": config.every,
        "seed": config.seed,
        "policy_cameras": dict(config.policy_cameras),
        "episodes": [episode.name for episode in chosen],
    }


def _check(config: OfflineConfig) -> None:
    least: dict[str, int] = {"every": 1, "seed": 0, "max_episodes": 1}
    for name, value in least.items():
        given = getattr(config, name)
        if given is not None and given < value:
            raise ConfigError(f"{name} is {given}; it must be {value} or more.")
    if config.holdout is not None and not 0 < config.holdout <= 1:
        raise ConfigError(f"holdout is {config.holdout}; it is a share above 0 and at most 1.")
    if config.episodes is not None and not config.episodes:
        raise ConfigError("episodes is empty; name at least one, or leave it out.")
