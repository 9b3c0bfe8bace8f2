"""The linear probe: what it reads off latents and tokens, its intervals, its alarm and its distractors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from defi_platform.config import PretrainConfig, ProbeConfig
from defi_platform.config.data_checks import DISTRACTORS, check_probe
from defi_platform.config.loader import load_config
from defi_platform.errors import ConfigError, CorpusError
from defi_platform.train.validation.codebook_use import USAGE, code_usage, position_counts
from defi_platform.train.validation.distractors import KINDS, distract
from defi_platform.train.validation.linear_probe import CONTROL, DID, TRAINED, Split, report, summary_lines
from defi_platform.train.validation.ridge import Ridge, Rows, Score
from defi_platform.train.worker.reporter import Reporter

SIZE = 32


def rows(features: Tensor, targets: Tensor, per_episode: int = 10) -> Rows:
    return Rows(features, targets, np.arange(len(features)) // per_episode)


def r2(features: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor) -> dict[str, Any]:
    names = [f"a{number}" for number in range(targets.shape[1])]
    return Ridge(rows(features, targets)).score(rows(held, held_targets)).as_mapping(names, seed=0)


def test_actions_that_are_a_linear_map_of_the_latents_are_read_off_them() -> None:
    torch.manual_seed(0)
    latents, held = torch.randn(200, 8), torch.randn(100, 8)
    weights = torch.randn(8, 3) * torch.tensor([1.0, 100.0, 0.01])
    actions, held_actions = (x @ weights + 5 for x in (latents, held))
    found = r2(latents, actions, held, held_actions)
    assert found["r2"] > 0.99 and found["interval"][0] > 0.99
    noisy = actions + actions.std(dim=0) * torch.randn_like(actions)
    held_noisy = held_actions + held_actions.std(dim=0) * torch.randn_like(held_actions)
    found = r2(latents, noisy, held, held_noisy)
    assert found["r2"] == pytest.approx(0.5, abs=0.12)
    assert found["interval"][0] < found["r2"] < found["interval"][1]


def test_latents_that_know_nothing_of_the_actions_score_zero_at_best() -> None:
    torch.manual_seed(0)
    found = r2(torch.randn(200, 64), torch.randn(200, 3), torch.randn(100, 64), torch.randn(100, 3))
    assert -0.2 < found["r2"] < 0.1


def test_each_dimension_has_its_own_r2_and_one_that_never_moves_has_none() -> None:
    torch.manual_seed(0)
    latents, held = torch.randn(100, 4), torch.randn(50, 4)
    actions, held_actions = (
        torch.stack([x[:, 0], 0 * x[:, 0] + 3, torch.randn(len(x))], 1) for x in (latents, held)
    )
    found = r2(latents, actions, held, held_actions)["dimensions"]
    assert found["a0"]["r2"] > 0.99 and found["a0"]["interval"][0] > 0.99
    assert found["a1"] == {"r2": None, "interval": None}
    assert found["a2"]["r2"] < 0.1


def score_of(errors: Tensor, targets: Tensor, episodes: np.ndarray) -> Score:
    return Score(errors.double(), targets.double(), torch.ones(targets.shape[1], dtype=torch.bool), episodes)


def test_an_interval_counts_episodes_and_not_their_pairs() -> None:
    """Pairs that repeat within an episode add nothing: the interval is that of one pair per episode."""
    torch.manual_seed(0)
    targets, errors = torch.randn(20, 2), 0.7 * torch.randn(20, 2)
    alone = score_of(errors, targets, np.arange(20)).as_mapping("xy", 0)
    repeated = score_of(errors.repeat_interleave(9, 0), targets.repeat_interleave(9, 0), np.arange(180) // 9)
    for entry, other in ((alone, repeated.as_mapping("xy", 0)),):
        assert entry["r2"] == pytest.approx(other["r2"])
        assert entry["interval"] == pytest.approx(other["interval"])
    assert alone["interval"][1] - alone["interval"][0] > 0.1


def test_an_interval_is_that_of_resampled_rows_by_the_book() -> None:
    torch.manual_seed(1)
    targets, errors = torch.randn(30, 1), 0.5 * torch.randn(30, 1)
    score = score_of(errors, targets, np.arange(30))
    by_hand = []
    for draw in score.draws(3).astype(int):
        place = np.repeat(np.arange(30), draw)
        y, e = targets[place].double(), errors[place].double()
        by_hand.append(float(1 - e.square().sum() / (y - y.mean()).square().sum()))
    expected = np.percentile(by_hand, [2.5, 97.5])
    assert score.as_mapping("x", 3)["interval"] == pytest.approx(list(expected))


def test_too_few_episodes_have_no_interval() -> None:
    torch.manual_seed(0)
    found = score_of(torch.randn(40, 1), torch.randn(40, 1), np.arange(40) // 10).as_mapping("x", 0)
    assert found["interval"] is None and found["r2"] is not None


def test_the_penalty_is_chosen_on_other_episodes() -> None:
    """Latents that name the episode fit its actions and no other's: only a strong penalty holds up on other ones."""
    torch.manual_seed(0)
    episodes = torch.arange(200) % 19
    named = torch.randn(19, 40)[episodes]
    actions = torch.randn(19, 1)[episodes] + 0.01 * torch.randn(200, 1)
    by_episode, by_row = (Ridge(Rows(named, actions, of)) for of in (episodes.numpy(), np.arange(200)))
    assert by_episode.strength >= 100 * by_row.strength, "pairs by themselves would not show it"


def test_a_feature_that_only_rounding_moves_in_training_is_left_alone() -> None:
    """Tokens of one code with the rounding of straight-through, and another code in the held-out pairs."""
    torch.manual_seed(0)
    actions, held_actions = torch.randn(100, 2), torch.randn(50, 2)
    tokens = 0.5 + 2e-7 * actions
    held = torch.where(torch.arange(50)[:, None] % 7 == 0, -0.4, 0.5).expand(50, 2)
    found = r2(tokens, actions, held, held_actions)
    assert found["r2"] == pytest.approx(0, abs=0.05) and found["interval"][0] > -0.3


class Encoder:
    """Stands in for GIDM: latents by a function of the frames, tokens by their signs."""

    def __init__(self, look: Callable[[Tensor], Tensor], threshold: float = 0.0) -> None:
        self._look, self._threshold = look, threshold
        self.codebook = SimpleNamespace(config=SimpleNamespace(size=2))

    def encode(self, frames: Tensor, texts: Sequence[str]) -> SimpleNamespace:
        assert frames.dtype == torch.uint8 and len(texts) == len(frames)
        latents = self._look(frames.float())[:, :, None]
        indices = (latents[..., 0] > self._threshold).long()
        return SimpleNamespace(latents=latents, tokens=indices[..., None].float(), indices=indices)


def robot_seen(frames: Tensor) -> Tensor:
    """How far the magenta pixels moved, (B, 2)."""
    mask = ((frames - torch.tensor([255.0, 0.0, 255.0])).abs().amax(-1) < 1).float()
    return _way(mask)


def scene_seen(frames: Tensor) -> Tensor:
    """How far the centre of all that is unlike the grey wall moved, and how the brightness changed: (B, 3)."""
    unlike = ((frames - 128).abs().sum(-1) > 30).float()
    light = frames.mean(dim=(2, 3, 4))
    return torch.cat([_way(unlike), (light[:, 1:] - light[:, :1]) / 64], dim=1)


def _way(mask: Tensor) -> Tensor:
    place = torch.arange(SIZE, dtype=torch.float32)
    weight = mask.sum(dim=(2, 3)).clamp_min(1e-3)
    x, y = (mask.sum(dim=2) * place).sum(-1) / weight, (mask.sum(dim=3) * place).sum(-1) / weight
    return torch.stack([x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]], dim=1) / SIZE


def pairs_of_a_robot(count: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A magenta square before a grey wall, and how far it goes."""
    random = np.random.default_rng(seed)
    frames = np.full((count, 2, SIZE, SIZE, 3), 128, np.uint8)
    start, end = random.integers(2, SIZE - 6, (2, count, 2))
    for number in range(count):
        for moment, (x, y) in enumerate((start[number], end[number])):
            frames[number, moment, y : y + 4, x : x + 4] = (255, 0, 255)
    ways = torch.from_numpy((end - start) / SIZE).float()
    return torch.from_numpy(frames), list(ways)


def split_of(encoder: Encoder, name: str, seed: int, count: int = 120) -> Split:
    silent = Encoder(lambda frames: 1e-3 * robot_seen(frames), threshold=1.0)
    split = Split(cast(Any, {TRAINED: encoder, CONTROL: silent}), DISTRACTORS, seed)
    frames, ways = pairs_of_a_robot(count, seed)
    split.add(frames, [""] * count, ways, [("toy", f"{name}_{number // 6}") for number in range(count)])
    return split


@pytest.fixture(scope="module")
def of_robot() -> dict[str, Any]:
    """The report on an encoder that follows the robot."""
    return report(split_of(Encoder(robot_seen), "a", 1), split_of(Encoder(robot_seen), "b", 2), ["x", "y"], 0)


@pytest.fixture(scope="module")
def of_scene() -> dict[str, Any]:
    """The report on an encoder that follows whatever is in the picture."""
    return report(split_of(Encoder(scene_seen), "a", 1), split_of(Encoder(scene_seen), "b", 2), ["x", "y"], 0)


def test_latents_are_read_where_the_tokens_of_the_control_are_all_the_same(of_robot: dict[str, Any]) -> None:
    assert of_robot["pairs"] == {"train": 120, "validation": 120}
    assert of_robot["episodes"] == {"train": 20, "validation": 20}
    assert of_robot["codes"][CONTROL]["codes_used"] == 1 and "alarm" not in of_robot["codes"][CONTROL]
    assert of_robot["tokens"][CONTROL]["r2"] == pytest.approx(0, abs=0.05)
    assert of_robot["latents"][CONTROL]["r2"] > 0.99, (
        "whose latents say as much as those of the trained encoder"
    )
    assert of_robot["latents"]["above_control"]["difference"] == pytest.approx(0, abs=0.01)
    assert 0.4 < of_robot["tokens"][TRAINED]["r2"] < 0.8, "signs of the way"
    assert of_robot["tokens"]["above_control"]["interval"][0] > 0.3
    assert set(of_robot["latents"][TRAINED]["dimensions"]) == {"x", "y"}


def test_a_code_that_follows_the_robot_keeps_its_meaning_under_distractors(of_robot: dict[str, Any]) -> None:
    found = of_robot["distractors"]
    assert set(found) == set(KINDS)
    assert found["background"]["latents"]["r2"] > 0.95 and found["background"]["codes_kept"] > 0.95
    assert found["object"]["latents"]["r2"] > 0.5, "the disc hides the robot now and then"
    assert found["object"]["distractor"]["r2"] < 0.15


def test_a_code_that_follows_the_scene_reports_the_distractor_instead(of_scene: dict[str, Any]) -> None:
    plain, found = of_scene["latents"][TRAINED]["r2"], of_scene["distractors"]
    assert plain > 0.95, "without distractors the robot is all that moves"
    assert found["object"]["distractor"]["r2"] > 0.5 > found["object"]["latents"]["r2_refitted"]
    assert found["object"]["latents"]["lost"]["interval"][0] > 0.3
    assert found["lighting"]["distractor"]["r2"] > 0.5
    assert found["background"]["latents"]["r2"] < 0.1 < 0.9 < found["background"]["latents"]["r2_refitted"]
    assert any("with object" in line for line in summary_lines(of_scene))


def test_an_episode_in_both_splits_is_refused() -> None:
    encoder = Encoder(robot_seen)
    with pytest.raises(CorpusError, match="episode 'a_0' of corpus toy is in both splits"):
        report(split_of(encoder, "a", 1, 12), split_of(encoder, "a", 2, 12), ["x", "y"], 0)


@pytest.mark.parametrize("kind", DISTRACTORS)
def test_a_distractor_depends_on_its_pair_alone_and_changes_what_it_says(kind: str) -> None:
    frames, _ = pairs_of_a_robot(4, 0)

    def drawn(first: int, last: int) -> Any:
        generators = [torch.Generator().manual_seed(number) for number in range(first, last)]
        return distract(frames[first:last], kind, generators)

    whole, part = drawn(0, 4), drawn(2, 4)
    assert torch.equal(whole.frames[2:], part.frames) and torch.equal(whole.did[2:], part.did)
    assert whole.did.shape == (4, len(DID[kind]))
    low, high = {"background": (0.3, 0.99), "lighting": (0.9, 1.0), "object": (0.01, 0.2)}[kind]
    assert low < float(whole.changed.mean()) <= high
    robot = (frames == torch.tensor([255, 0, 255], dtype=torch.uint8)).all(-1)
    if kind == "background":
        assert torch.equal(whole.frames[robot], frames[robot]), "what moves is left alone"
        still = ~robot.any(dim=1)
        assert torch.equal(whole.frames[:, 0][still], whole.frames[:, 1][still]), "the texture stands still"


def test_a_codebook_of_few_codes_one_code_or_constant_codes_raises_the_alarm() -> None:
    torch.manual_seed(0)
    sound = torch.randint(16, (64, 4))
    usage = code_usage(position_counts(sound, 16))
    assert set(usage) == set(USAGE) - {"alarm"}
    assert usage["codes_used"] == 16 and usage["constant_positions"] == 0
    assert sum(usage["code_counts"]) == 256 and usage["most_used_share"] < 0.15
    few = code_usage(position_counts(sound % 3, 16))
    assert "3 of 16 codes are in use" in few["alarm"]
    one = code_usage(position_counts(torch.where(sound < 15, 0, sound), 16))
    assert f"one code is {one['most_used_share']:.0%} of 256 tokens" in one["alarm"]
    constant = code_usage(position_counts(torch.tensor([[0, 4, 8, 12]]).expand(64, 4), 16))
    assert constant["codebook_fraction_used"] == 0.25, "which looks like a code in use"
    assert "each of the 4 tokens has the same code for every pair" in constant["alarm"]
    assert "alarm" not in code_usage(position_counts(sound[:2] % 3, 16)), "eight tokens cannot use 16 codes"


def test_an_untrained_codebook_is_no_alarm(capsys: pytest.CaptureFixture[str]) -> None:
    logged: list[dict[str, Any]] = []
    reporter = SimpleNamespace(
        log_metrics=logged.append, _is_rank_zero=True, _recipe=SimpleNamespace(kind="gidm")
    )
    for step in (0, 1):
        Reporter.log_validation(reporter, step, {"loss": 1.0, "alarm": "collapsed"})  # type: ignore[arg-type]
    assert ["alarm" in row for row in logged] == [False, True]
    assert capsys.readouterr().out == "gidm: step 1: collapsed\n"


def test_settings_of_the_probe_outside_their_choices_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.probe\.distractors is 'fog'; it is one of background, lighting"
    ):
        check_probe(ProbeConfig(manifest="m", distractors=["fog"]))
    with pytest.raises(ConfigError, match=r"train\.probe\.target is 'last'; it is one of mean, change"):
        check_probe(ProbeConfig(manifest="m", target="last"))
    assert set(KINDS) == set(DISTRACTORS) == set(DID)


def test_the_config_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "latent_actions.md"
    (tmp_path / "run.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)[0])
    config = load_config(PretrainConfig, tmp_path / "run.yaml", ["train.output=o", "data.manifest=m"])
    assert config.train.probe is not None and config.train.probe.pairs == 2048
    check_probe(config.train.probe)
