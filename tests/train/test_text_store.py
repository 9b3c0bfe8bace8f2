"""The store of text features: what is read is what the encoder gives, and a run whose texts are there encodes none."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import manifest_of

from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.t5_text import T5Text
from defi_models.gfdm import GFDM
from defi_platform import storage
from defi_platform.config import DataConfig, FinetuneConfig, PretrainConfig, TrainConfig
from defi_platform.data.latents.text_store import TextStore
from defi_platform.errors import ConfigError
from defi_platform.train.recipes import text_store_use
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.recipes.text_store_use import TextStoreUse

TEXTS = ["open the drawer", "", "press the red button", "Öffne die Schublade", "close it"]
BFLOAT16 = torch.bfloat16


class Words:
    """A tokenizer: one token per letter."""

    pad_token_id = 0

    def __init__(self, offset: int = 3) -> None:
        self.offset = offset

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> Any:
        @dataclass
        class Encoded:
            input_ids: list[list[int]]

        ids = [[self.offset + ord(letter) % 60 for letter in text[: max_length - 1]] for text in texts]
        return Encoded([[*row, 1] for row in ids])

    def get_vocab(self) -> dict[str, int]:
        return {"a": self.offset}


def t5(seed: int = 0, offset: int = 3) -> T5Text:
    torch.manual_seed(seed)
    config = T5Text.Config(
        vocab_size=80, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, max_tokens=12
    )
    return T5Text(config, tokenizer=Words(offset))


@dataclass
class Rank:
    """One of several ranks that run one after the other."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    is_rank_zero: bool = True

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The value of this rank alone."""
        return value


@pytest.fixture(params=["disk", "elsewhere"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "disk" else f"memory://texts-{uuid.uuid4().hex}"


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_features_are_read_as_they_were_written(folder: str, dtype: torch.dtype) -> None:
    encoder = t5().to(dtype)
    store = TextStore(folder, encoder, dtype)
    entries = encoder.entries("states", TEXTS)
    store.write("states", TEXTS[:3], entries[:3])
    store.write("states", TEXTS[3:], entries[3:])
    assert store.missing("states", TEXTS) == TEXTS
    store.refresh()
    assert store.missing("states", [*TEXTS, "new"]) == ["new"]
    assert store.missing("goal", TEXTS[:1]) == TEXTS[:1]
    read = store.read("states", ["new", *reversed(TEXTS)])
    assert read[0] is None
    for text, found, wanted in zip(TEXTS, reversed(read[1:]), entries, strict=True):
        assert found is not None, text
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_another_encoder_tokenizer_or_precision_has_features_of_its_own(tmp_path: Path) -> None:
    encoder = t5()
    store = TextStore(str(tmp_path), encoder, torch.float32)
    store.write("states", TEXTS, encoder.entries("states", TEXTS))
    same = TextStore(str(tmp_path), t5(), torch.float32)
    assert same.missing("states", TEXTS) == []
    for other, dtype in ((t5(seed=1), torch.float32), (t5(offset=4), torch.float32), (t5(), BFLOAT16)):
        assert TextStore(str(tmp_path), other, dtype).missing("states", TEXTS) == TEXTS


def test_of_two_features_of_one_text_the_older_one_counts(tmp_path: Path) -> None:
    store = TextStore(str(tmp_path), t5(), torch.float32)
    for value in (1.0, 2.0):
        store.write("states", ["open"], [(torch.full((2, 8), value), torch.ones(2, dtype=torch.bool))])
    store.refresh()
    [entry] = store.read("states", ["open"])
    assert entry is not None and entry[0].mean() == 1.0


@pytest.mark.parametrize("gone", ["parquet", "bin"])
def test_a_shard_counts_when_both_of_its_files_are_there(tmp_path: Path, gone: str) -> None:
    encoder = t5()
    store = TextStore(str(tmp_path), encoder, torch.float32)
    store.write("states", TEXTS, encoder.entries("states", TEXTS))
    for file in tmp_path.rglob(f"*.{gone}"):
        file.unlink()
    store.refresh()
    assert store.missing("states", TEXTS) == TEXTS


@pytest.mark.parametrize("ending", ["bin", "parquet"])
@pytest.mark.parametrize(
    "damage", [lambda held: held[:100], lambda held: b"", lambda held: b"\xff" * len(held)]
)
def test_damaged_features_are_an_error_that_names_what_to_delete(
    folder: str, ending: str, damage: Callable[[bytes], bytes]
) -> None:
    encoder = t5()
    store = TextStore(folder, encoder, torch.float32)
    store.write("states", TEXTS, encoder.entries("states", TEXTS))
    shards = storage.join(store.folder, "shards")
    [name] = [name for name in storage.names(shards) if name.endswith(ending)]
    path = storage.join(shards, name)
    storage.write_bytes(path, damage(storage.read_bytes(path)))
    with pytest.raises(
        storage.StorageError, match=rf"data\.text_cache.*{name}.*Delete .*\.bin and .*\.parquet"
    ):
        TextStore(folder, t5(), torch.float32).read("states", TEXTS)


def test_ranks_share_the_work_and_a_second_run_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(precision="bf16")
    uses = [TextStoreUse(str(tmp_path), train) for _ in range(2)]
    monkeypatch.setattr(text_store_use, "SEEN_WITHIN_S", 0.0)
    with pytest.raises(storage.StorageError, match=r"2 text features .* are not to be seen"):
        uses[0].fill([(t5(), ("states",))], TEXTS, Rank(0, 2))  # type: ignore[arg-type]
    uses[1].fill([(t5(), ("states",))], TEXTS, Rank(1, 2))  # type: ignore[arg-type]
    assert [use.summary()["encoded"] for use in uses] == [3, 2]
    encoder = t5()
    again = TextStoreUse(str(tmp_path), train)
    again.fill([(encoder, ("states",))], TEXTS, Rank())  # type: ignore[arg-type]
    assert again.summary() == {"folder": str(tmp_path), "texts": 5, "encoded": 0}
    encoder.to(BFLOAT16)
    found = encoder.states(TEXTS)
    assert encoder.cache.encoded == 0 and found.states.dtype == BFLOAT16
    assert torch.equal(found.states, t5().to(BFLOAT16).states(TEXTS).states)


def recipe_with_texts(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> GFDMRecipe:
    @dataclass
    class Planned:
        manifest: Any

    rows = [{"corpus": "toy", "video_id": str(n), "text": text} for n, text in enumerate(TEXTS)]
    recipe = GFDMRecipe(config)
    monkeypatch.setattr(recipe, "plan", lambda _split: Planned(manifest_of(rows)))
    return recipe


def test_a_training_reads_the_texts_of_its_videos_from_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PretrainConfig(
        data=DataConfig(manifest=str(tmp_path / "manifest"), text_cache=str(tmp_path / "texts")),
        train=TrainConfig(output=str(tmp_path / "run")),
    )
    encoded = []
    for _ in range(2):
        recipe = recipe_with_texts(config, monkeypatch)
        model = recipe.build_without_cache()
        assert isinstance(model, GFDM)
        recipe.encode_texts(model, Rank())  # type: ignore[arg-type]
        encoded.append(recipe.summary({})["text_cache"]["encoded"])
        stored = model.encode_text(TEXTS)
        assert model.text_encoder.cache.encoded == 0
    assert encoded == [5, 0]
    assert torch.equal(stored, HashedText(HashedText.Config()).states(TEXTS).states)
    assert "gfdm: 5 texts, features of 5 encoded" in capsys.readouterr().out


def test_a_goal_is_made_of_the_states_that_were_just_stored(tmp_path: Path) -> None:
    passed: list[str] = []

    class Encoder(HashedText):
        """Goals from states, as CLIP has them."""

        def entries(self, kind: str, texts: Sequence[str]) -> list[Any]:
            def encode(wanted: list[str]) -> list[Any]:
                if kind == "goal":
                    return [(row[0],) for row in self.entries("states", wanted)]
                passed.extend(wanted)
                return [(torch.zeros(3),) for _ in wanted]

            return self.cache.get(kind, texts, self.device, self.dtype, encode)

    encoder = Encoder(HashedText.Config())
    TextStoreUse(str(tmp_path), TrainConfig()).fill([(encoder, ("states", "goal"))], TEXTS, Rank())  # type: ignore[arg-type]
    assert passed == TEXTS


def test_a_policy_stores_goals_of_gfdms_encoder_too(tmp_path: Path) -> None:
    config = FinetuneConfig(train=TrainConfig(output=str(tmp_path)), gfdm="gfdm", gidm="gidm")

    @dataclass
    class Parts:
        text_encoder: str = "clip"

    @dataclass
    class Policy:
        gfdm: Parts
        gidm_text: str = "t5"

    config.data.manifest = str(tmp_path)
    encoders = PolicyRecipe(config).text_encoders(Policy(Parts()))
    assert encoders == [("clip", ("states", "goal")), ("t5", ("states",))]


def test_zero_3_with_a_text_encoder_that_every_step_would_run_is_refused(tmp_path: Path) -> None:
    @dataclass
    class Model:
        text_encoder: Any

    train = TrainConfig(output=str(tmp_path), zero_stage=3)
    recipe = GFDMRecipe(PretrainConfig(data=DataConfig(manifest=str(tmp_path)), train=train))
    recipe.encode_texts(Model(t5()), Rank(0, 1))  # type: ignore[arg-type]
    recipe.encode_texts(Model(HashedText(HashedText.Config())), Rank(0, 2))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"zero_stage=3.*data\.text_cache=FOLDER"):
        recipe.encode_texts(Model(t5()), Rank(0, 2))  # type: ignore[arg-type]
