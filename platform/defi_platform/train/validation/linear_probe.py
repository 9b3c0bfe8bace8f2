"""Linear probe: how much of the true action a linear map reads off GIDM's latent action.

It measures whether pretraining on video has learned actions. Both the latents before quantisation and the tokens
behind the codebook are read: the tokens are what a policy gets, and the latents say whether the encoder or the codebook
lacks something. The control is the same encoder with random weights, which has learned nothing; it is compared on
latents, since its tokens are hardly ever more than one code. N pairs, K latent action tokens, A action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from defi_platform.config import DataConfig, ProbeConfig
from defi_platform.data.loader.robot_signals import SignalReader
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import PairRule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.errors import CorpusError
from defi_platform.train.engine.seeds import seed_of
from defi_platform.train.validation.codebook_use import code_usage, position_counts
from defi_platform.train.validation.distractors import distract
from defi_platform.train.validation.ridge import Ridge, Rows, Score

if TYPE_CHECKING:
    from defi_models.gidm import GIDM

BATCH = 16
SPLITS = ("train", "validation")
"""The map is fitted on the first, and scored on the second."""
TRAINED, CONTROL = "latent_action", "random_encoder"
DID = {"background": (), "lighting": ("brightness",), "object": ("x", "y")}
"""What there is to be read of each distractor."""


def probe_data(probe: ProbeConfig, data: DataConfig) -> DataConfig:
    """The pretraining's data settings with the probe's labelled corpora."""
    return replace(data, corpora=probe.corpora, manifest=probe.manifest, holdout=probe.holdout, cache=None)


def samples_of(probe: ProbeConfig) -> range:
    """The samples of each split that a probe reads: whole batches."""
    return range(-(-probe.pairs // BATCH) * BATCH)


@dataclass
class Encoded:
    """Latents, tokens and codes of pairs of frames from one encoder, in parts."""

    latents: list[Tensor] = field(default_factory=list)
    """(n, K * latent_dim) each, before the codebook."""
    tokens: list[Tensor] = field(default_factory=list)
    """(n, K * latent_dim) each, behind it; [] where there is none."""
    counts: Tensor | None = None
    """(K, codes): how often each code was chosen at each position."""
    codes: list[Tensor] = field(default_factory=list)
    """(n, K) each."""
    did: list[Tensor] = field(default_factory=list)
    """(n, M) each: what the distractor did."""
    changed: list[Tensor] = field(default_factory=list)
    """(n,) each: share of the pixels that it changed."""

    @torch.no_grad()
    def add(self, encoder: GIDM, frames: Tensor, texts: Sequence[str]) -> None:
        """Encodes pairs.

        Args:
            encoder: in evaluation mode.
            frames: uint8 (n, 2, H, W, 3).
            texts: n of them.
        """
        actions = encoder.encode(frames, texts)
        self.latents.append(actions.latents.flatten(1).float().cpu())
        if actions.indices is None or encoder.codebook is None:
            return
        self.tokens.append(actions.tokens.flatten(1).float().cpu())
        self.codes.append(actions.indices.cpu())
        counts = position_counts(self.codes[-1], encoder.codebook.config.size)
        self.counts = counts if self.counts is None else self.counts + counts

    def features(self) -> dict[str, Tensor]:
        """`latents` (N, F) and, where there is a codebook, `tokens` (N, F)."""
        found = {"latents": torch.cat(self.latents)}
        return found | ({"tokens": torch.cat(self.tokens)} if self.tokens else {})


class Split:
    """The pairs of one split as the encoders see them, with their actions.

    Args:
        encoders: the models in evaluation mode, by `TRAINED` and `CONTROL`.
        distractors: kinds of those that the trained one is to see too.
        seed: of the distractors.
    """

    def __init__(self, encoders: Mapping[str, GIDM], distractors: Sequence[str], seed: int) -> None:
        self._encoders, self._seed = encoders, seed
        self.plain = {name: Encoded() for name in encoders}
        self.distracted = {kind: Encoded() for kind in distractors}
        self.actions: list[Tensor] = []
        self.episodes: list[tuple[str, str]] = []
        """(corpus, episode) of each pair."""

    def add(
        self,
        frames: Tensor,
        texts: Sequence[str],
        actions: Sequence[Tensor],
        episodes: Sequence[tuple[str, str]],
    ) -> None:
        """Encodes pairs, plain and with each distractor.

        Args:
            frames: uint8 (n, 2, H, W, 3), on CPU.
            texts: n of them.
            actions: n of them, (A,) each.
            episodes: (corpus, episode) of each pair.
        """
        for name, encoder in self._encoders.items():
            self.plain[name].add(encoder, frames, texts)
        for kind, encoded in self.distracted.items():
            first = len(self.actions)
            generators = [
                torch.Generator().manual_seed(seed_of(self._seed, "probe", number))
                for number in range(first, first + len(frames))
            ]
            changed = distract(frames, kind, generators)
            encoded.add(self._encoders[TRAINED], changed.frames, texts)
            encoded.did.append(changed.did)
            encoded.changed.append(changed.changed)
        self.actions += actions
        self.episodes += episodes

    def rows(self, features: Tensor, targets: Tensor | None = None) -> Rows:
        """Features with the actions, or with other targets."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.episodes))}
        episodes = np.array([numbers[name] for name in self.episodes])
        return Rows(features, torch.stack(self.actions) if targets is None else targets, episodes)


def linear_probe(
    encoders: Mapping[str, GIDM],
    manifest: Manifest,
    data: DataConfig,
    probe: ProbeConfig,
    rule: PairRule,
    seed: int,
) -> dict[str, Any]:
    """R2 of a linear map from latent actions to true actions, on held-out episodes; see docs/latent_actions.md.

    Args:
        encoders: the models in evaluation mode, by `TRAINED` and `CONTROL`; all see the same pairs.
        manifest: of the labelled corpora.
        data: their settings, as `probe_data` makes them.
        probe: number of pairs, target and distractors.
        rule: frame sampler of the pairs.
        seed: of the plan, the distractors and the resamples.

    Returns: what `report` returns.
    Raises: CorpusError when an episode is in both splits, no pair of one can be read, or corpora have actions of
        different widths.
    """
    splits: list[Split] = []
    names: tuple[str, ...] = ()
    skipped = 0
    for place, name in enumerate(SPLITS):
        plan = Plan.of(manifest, data, rule, seed, name)
        # Distractors of their own: one that was seen in training could be known by its looks.
        split = Split(encoders, probe.distractors, seed_of(seed, "probe", place))
        unread, named = _fill(split, plan, data, probe)
        if not split.actions:
            raise CorpusError(
                f"probe: none of the {unread} pairs of the {name} split could be read; see the quarantine table in "
                f"{data.manifest}."
            )
        splits.append(split)
        skipped += unread
        names = names or named
    return {"skipped_pairs": skipped} | report(splits[0], splits[1], names, seed_of(seed, "probe"))


def report(train: Split, held: Split, names: Sequence[str], seed: int) -> dict[str, Any]:
    """The probe's figures.

    Args:
        train: pairs to fit on.
        held: pairs to score, of other episodes.
        names: of the actions' dimensions.
        seed: of the resamples.

    Returns: by `latents` and `tokens`, the R2 of the trained and of the random encoder and their difference; `codes`,
        the use of the codebook; `distractors`, by kind; and what all of it was computed on.
    Raises: CorpusError when an episode is in both.
    """
    if both := set(train.episodes) & set(held.episodes):
        corpus, episode = min(both)
        raise CorpusError(
            f"probe: episode '{episode}' of corpus {corpus} is in both splits (in all, {len(both)} are), so its R2 "
            "would mean nothing. Ingest the corpus again, into another train.probe.manifest."
        )
    found: dict[str, Any] = {
        "pairs": {"train": len(train.actions), "validation": len(held.actions)},
        "episodes": {"train": len(set(train.episodes)), "validation": len(set(held.episodes))},
    }
    fits: dict[str, Ridge] = {}
    scores: dict[str, Score] = {}
    seen = {name: (train.plain[name].features(), held.plain[name].features()) for name in (TRAINED, CONTROL)}
    for kind in seen[TRAINED][0]:
        controlled = Ridge(train.rows(seen[CONTROL][0][kind])).score(held.rows(seen[CONTROL][1][kind]))
        fits[kind] = Ridge(train.rows(seen[TRAINED][0][kind]))
        scores[kind] = fits[kind].score(held.rows(seen[TRAINED][1][kind]))
        found[kind] = {
            TRAINED: scores[kind].as_mapping(names, seed),
            CONTROL: controlled.as_mapping(names, seed),
            "above_control": scores[kind].above(controlled, seed),
        }
    counts = {name: encoded.counts for name, encoded in held.plain.items() if encoded.counts is not None}
    if counts:
        found["codes"] = {name: code_usage(counted) for name, counted in counts.items()}
        found["codes"][CONTROL].pop("alarm", None)  # nobody trained it
    found["distractors"] = {
        kind: _distracted(kind, train, held, (fits, scores), seed) for kind in held.distracted
    }
    return found


def _distracted(
    kind: str, train: Split, held: Split, plain: tuple[dict[str, Ridge], dict[str, Score]], seed: int
) -> dict[str, Any]:
    """Effect of a distractor on the read-out, and what of the distractor itself is read off the latents."""
    learnt, seen = train.distracted[kind], held.distracted[kind]
    fits, scores = plain
    features = learnt.features()
    found: dict[str, Any] = {"pixels_changed": float(torch.cat(seen.changed).mean())}
    for name, changed in seen.features().items():
        met = fits[name].score(held.rows(changed))
        refitted = Ridge(train.rows(features[name])).score(held.rows(changed))
        found[name] = {
            "r2": met.r2_of_all(),
            "lost": scores[name].above(met, seed),
            "r2_refitted": refitted.r2_of_all(),
            "lost_refitted": scores[name].above(refitted, seed),
        }
    if seen.codes:
        codes, before = torch.cat(seen.codes), torch.cat(held.plain[TRAINED].codes)
        counted = held.plain[TRAINED].counts
        assert counted is not None
        share = counted.double() / counted.sum(dim=1, keepdim=True)
        found["codes_kept"] = float((codes == before).double().mean())
        found["codes_kept_by_chance"] = float(share.square().sum(dim=1).mean())
    if what := DID[kind]:
        own = Ridge(train.rows(features["latents"], torch.cat(learnt.did)))
        score = own.score(held.rows(seen.features()["latents"], torch.cat(seen.did)))
        found["distractor"] = score.as_mapping(what, seed)
    return found


def _fill(split: Split, plan: Plan, data: DataConfig, probe: ProbeConfig) -> tuple[int, tuple[str, ...]]:
    """Adds the pairs of a plan. Returns: the number of those that could not be read, and the names of the actions."""
    reader, skipped = SignalReader(), 0
    names: tuple[str, ...] = ()
    for batch in local_batches(plan, data, Shard.single(0, len(samples_of(probe)), BATCH)):
        # A sample that stands in for a bad video is not the one that the plan names, so its actions are unknown.
        valid = [index for index, reason in enumerate(batch["skipped"]) if not reason]
        skipped += len(batch["skipped"]) - len(valid)
        actions, episodes = [], []
        for k in batch["sample"][valid].tolist():
            sample = plan.resolve(k)
            row = plan.manifest.row(sample.row)
            signals = reader.of_row(plan.manifest, sample.row)
            names = names or reader.action_names(plan.manifest, sample.row)
            actions.append(_target(signals.actions, sample.indices, probe.target))
            episodes.append((sample.corpus, row["episode_id"] or row["video_id"]))
            if actions[-1].shape != (len(names),):
                raise CorpusError(
                    f"probe: corpus {sample.corpus} has actions of {len(actions[-1])} numbers, another one of "
                    f"{len(names)}. Probe corpora with different actions in runs of their own."
                )
        if valid:
            split.add(batch["frames"][valid], [batch["text"][index] for index in valid], actions, episodes)
    return skipped, names


def _target(actions: np.ndarray, frames: Sequence[int], target: str) -> Tensor:
    """(A,): the mean action between two frames, or how far the last is from the first."""
    taken = np.asarray(actions[frames[0] : frames[1]], np.float32)
    return torch.from_numpy(taken[-1] - taken[0] if target == "change" else taken.mean(axis=0))


def summary_lines(found: dict[str, Any]) -> list[str]:
    """A report in a few lines for people."""
    lines = [
        "probe: {train} + {validation} pairs".format(**found["pairs"])
        + " of {train} + {validation} episodes".format(**found["episodes"])
    ]
    for kind in ("latents", "tokens"):
        if kind in found:
            own, control = found[kind][TRAINED], found[kind][CONTROL]
            lines.append(f"probe: R2 of {kind} {_worded(own)}; of a random encoder {_worded(control)}")
    for kind, one in found["distractors"].items():
        kept = f", {one['codes_kept']:.0%} of the codes kept" if "codes_kept" in one else ""
        read = f"; R2 of the distractor itself {_worded(one['distractor'])}" if "distractor" in one else ""
        lines.append(
            f"probe: with {kind}, R2 of latents {_number(one['latents']['r2'])}, "
            f"{_number(one['latents']['r2_refitted'])} refitted{kept}{read}"
        )
    if alarm := found.get("codes", {}).get(TRAINED, {}).get("alarm"):
        lines.append(f"probe: {alarm}")
    return lines


def _worded(entry: Mapping[str, Any]) -> str:
    interval = entry["interval"]
    return _number(entry["r2"]) + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
