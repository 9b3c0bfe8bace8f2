"""Frozen text encoders: how often they run, and that a text's features do not depend on the company it keeps."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import public_backbones
import pytest
import torch
import transformers
from model_samples import pixels
from torch import Tensor, nn

from defi_models import presets
from defi_models.encoders.clip_text import ClipText
from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.t5_text import T5Text
from defi_models.encoders.text_batches import ROWS, text_batches
from defi_models.encoders.text_cache import TextCache
from defi_models.gfdm import GFDM

CPU = torch.device("cpu")
TEXTS = [
    " ".join(public_backbones.WORDS[(number >> shift) % 8] for shift in (0, 3)) + " the" * (number % 5)
    for number in range(64)
]
"""A batch of 64 instructions, all different, of 2 to 6 words."""


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("text")
    public_backbones.save_clip(folder / "clip")
    public_backbones.save_t5(folder / "t5")
    return folder


@contextmanager
def runs_of(module: nn.Module) -> Iterator[list[int]]:
    """Rows of every pass through a module."""
    rows: list[int] = []

    def note(_module: nn.Module, _inputs: object, given: dict[str, Tensor], _output: object) -> None:
        rows.append(len(given["input_ids"]) if "input_ids" in given else 0)

    hook = module.register_forward_hook(note, with_kwargs=True)
    yield rows
    hook.remove()


def counted(texts: list[str]) -> list[tuple[Tensor, ...]]:
    return [(torch.zeros(256, dtype=torch.float32),) for _ in texts]


def test_the_cache_is_bounded_by_bytes_and_forgets_what_was_not_used_for_longest() -> None:
    cache = TextCache(max_bytes=4 * 1024)
    for text in ("a", "b", "c", "d"):
        cache.get("states", [text], CPU, torch.float32, counted)
    cache.get("states", ["a"], CPU, torch.float32, counted)
    cache.get("states", ["e"], CPU, torch.float32, counted)  # b goes
    assert (cache.encoded, cache.held_bytes) == (5, 4 * 1024)
    cache.get("states", ["a", "c", "d", "e"], CPU, torch.float32, counted)
    assert cache.encoded == 5
    cache.get("states", ["b"], CPU, torch.float32, counted)
    assert cache.encoded == 6


def test_a_batch_beyond_the_limit_is_held_until_the_next_one_comes() -> None:
    cache = TextCache(max_bytes=1024)
    assert len(cache.get("states", ["a", "b", "c", "a"], CPU, torch.float32, counted)) == 4
    assert cache.held_bytes == 3 * 1024
    cache.get("states", ["d"], CPU, torch.float32, counted)
    assert cache.held_bytes == 1024


def test_states_and_goals_are_limited_by_their_number_too() -> None:
    cache = TextCache()
    cache.max_texts = 2
    for kind in ("states", "goal", "states"):
        cache.get(kind, ["a"], CPU, torch.float32, counted)
    assert cache.encoded == 2
    cache.get("states", ["b"], CPU, torch.float32, counted)
    cache.get("goal", ["a"], CPU, torch.float32, counted)
    assert cache.encoded == 4


def test_other_weights_have_other_features(public: Path) -> None:
    encoder, other = T5Text.from_folder(public / "t5"), T5Text.from_folder(public / "t5")
    with torch.no_grad():
        other.model.shared.weight.mul_(1.5)
    expected = other.states(TEXTS[:2]).states
    for assign in (False, True):
        encoder.states(TEXTS[:2])
        nn.ModuleDict({"text": encoder}).load_state_dict({"another": torch.zeros(1)}, strict=False)
        assert encoder.cache.held_bytes > 0, "nothing of it was loaded"
        state = {f"text.{name}": value.clone() for name, value in other.state_dict().items()}
        nn.ModuleDict({"text": encoder}).load_state_dict(state, assign=assign)
        assert torch.equal(encoder.states(TEXTS[:2]).states, expected)
        encoder.to(torch.bfloat16).to(torch.float32)
        assert not torch.equal(encoder.states(TEXTS[:2]).states, expected), "rounded"


def test_threads_share_a_cache() -> None:
    cache = TextCache()
    cache.max_texts = 2

    def ask(first: int) -> None:
        for number in range(2000):
            cache.get("states", [str((first + number * 7) % 5)], CPU, torch.float32, counted)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, range(4)))
    finally:
        sys.setswitchinterval(before)
    assert cache.held_bytes == 2 * 1024
    copied = pickle.loads(pickle.dumps(cache))
    copied.get("states", ["new"], CPU, torch.float32, counted)
    assert copied.encoded == cache.encoded + 1


def test_64_new_texts_take_2_passes_of_clip_and_as_many_of_t5_as_their_lengths_need(public: Path) -> None:
    clip = ClipText.from_folder(public / "clip", max_tokens=8)
    with runs_of(clip.model.text_model) as passes, runs_of(clip.model.text_projection) as goals:
        clip.states(TEXTS)
        assert (passes, goals) == (
            [32, 32],
            [],
        )  # 128 passes before, one for the goal that GFDM does not read
        clip.goal(TEXTS)
        assert passes == [32, 32] and len(goals) == 64  # the same end-of-text states, projected
    t5 = T5Text.from_folder(public / "t5")
    with runs_of(t5.model.encoder) as passes:
        t5.states(TEXTS)
        t5.states(TEXTS)
    assert passes == [32, 32]  # 64 before


def test_gfdm_trains_without_a_goal_vector(public: Path) -> None:
    config = presets.gfdm("nano", text_copies=1)
    clip = ClipText.from_folder(public / "clip")
    model = GFDM(GFDM.Config(**vars(config) | {"text": clip.config}), text_encoder=clip).eval()
    batch = {"frames": pixels(2, config.frames), "text": ["open the drawer", "close"]}
    with runs_of(clip.model.text_model) as passes, runs_of(clip.model.text_projection) as goals:
        model(batch)
    assert (passes, goals) == ([2], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_the_same_bit_for_bit_in_any_company(public: Path, dtype: torch.dtype) -> None:
    def encoders() -> list[ClipText | T5Text]:
        clip = ClipText.from_folder(public / "clip", max_tokens=6)  # cuts the longest
        return [clip.to(dtype), T5Text.from_folder(public / "t5").to(dtype)]

    chosen = [0, 4, 9, 63]
    for together, apart in zip(encoders(), encoders(), strict=True):
        states = together.states(TEXTS)
        found = apart.states([TEXTS[number] for number in reversed(chosen)])
        length = found.states.shape[1]
        assert torch.equal(states.states[chosen[::-1], :length], found.states)
        if isinstance(together, ClipText) and isinstance(apart, ClipText):
            goals = together.goal(TEXTS)
            for number in chosen:
                apart.cache.clear()
                assert torch.equal(goals[number], apart.goal([TEXTS[number]])[0])


def test_the_goal_of_a_text_that_the_states_cut_reads_all_of_it(public: Path) -> None:
    clip = ClipText.from_folder(public / "clip", max_tokens=4)
    texts = ["open the drawer", "open the drawer press the red button"]
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(public / "clip")
    with runs_of(clip.model.text_model) as passes:
        goals = clip.goal(texts)
    assert passes == [1, 1]
    for text, goal in zip(texts, goals, strict=True):
        ids = clip.tokenizer([text], return_tensors="pt").input_ids
        assert torch.allclose(goal, theirs(input_ids=ids).text_embeds[0], atol=1e-6)


def test_a_pass_on_an_accelerator_has_one_number_of_rows() -> None:
    meta = torch.device("meta")
    batches = list(text_batches([[1, 2]] * 33 + [[1] * 9], [8, 16], 0, meta))
    assert [tuple(batch.ids.shape) for batch in batches] == [(ROWS, 8), (ROWS, 8), (ROWS, 16)]
    assert sorted(index for batch in batches for index in batch.indices) == list(range(34))
    on_cpu = list(text_batches([[1, 2], [3]], [8], 0, CPU))
    assert on_cpu[0].mask.sum(1).tolist() == [2, 1]


class Stored:
    """A store that holds the states of one text."""

    dtype = torch.float32

    def read(self, kind: str, texts: Sequence[str]) -> list[tuple[Tensor, ...] | None]:
        return [
            (torch.ones(12, 32), torch.ones(12, dtype=torch.bool))
            if (kind, text) == ("states", "x")
            else None
            for text in texts
        ]


def test_what_a_store_holds_is_not_encoded() -> None:
    encoder = HashedText(HashedText.Config())
    encoder.cache.store = Stored()
    found = encoder.states(["x", "open", "x"])
    assert encoder.cache.encoded == 1
    assert torch.equal(found.states[0], torch.ones(12, 32)) and torch.equal(found.states[0], found.states[2])
    encoder.goal(["x"])
    assert encoder.cache.encoded == 2
