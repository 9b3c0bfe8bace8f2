"""The store of text features: what is read is what the encoder gives, and a run whose texts are there encodes none."""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from corpora import manifest_of, write_lerobot, write_video
from ray import cloudpickle

from defi_models.encoders.hashed_text import HashedText
from defi_models.encoders.t5_text import T5Text
from defi_models.gfdm import GFDM
from defi_platform import storage
from defi_platform.config import (
    CorpusConfig,
    DataConfig,
    FinetuneConfig,
    ModelConfig,
    PretrainConfig,
    ProbeConfig,
    TrainConfig,
)
from defi_platform.data.latents import text_store
from defi_platform.data.latents.text_store import TextStore
from defi_platform.errors import ConfigError
from defi_platform.train.recipes import text_store_use
from defi_platform.train.recipes.gfdm import GFDMRecipe
from defi_platform.train.recipes.gidm import GIDMRecipe
from defi_platform.train.recipes.policy import PolicyRecipe
from defi_platform.train.recipes.text_store_use import TextStoreUse, read_only
from defi_platform.train.validation import async_task
from defi_platform.train.worker import run_results

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

    def together(self, request: Callable[[], Any]) -> Any:
        """The answer of this rank alone."""
        return request()


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


def test_evaluations_read_features_of_their_own_precision_and_write_none(tmp_path: Path) -> None:
    use = TextStoreUse(str(tmp_path), TrainConfig(precision="bf16"))
    trained = t5()
    use.fill([(trained, ("states",))], TEXTS, Rank(), evaluated=TEXTS[:2])  # type: ignore[arg-type]
    assert use.summary()["encoded"] == 5 + 2 and trained.cache.store.dtype == BFLOAT16  # type: ignore[union-attr]
    written = files_of(tmp_path)
    evaluated = t5()
    read_only(str(tmp_path), [(evaluated, ("states",))])
    found = evaluated.states(TEXTS[:2]).states
    assert evaluated.cache.encoded == 0 and torch.equal(found, t5().states(TEXTS[:2]).states)
    evaluated.states(["new"])
    assert evaluated.cache.encoded == 1 and files_of(tmp_path) == written
    read_only(str(tmp_path / "absent"), [(evaluated, ("states",))])
    assert not (tmp_path / "absent").exists()


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_neither_probe_nor_asynchronous_validation_encodes_what_the_run_has_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        write_video(tmp_path / "videos" / f"{number}.mp4", range(number * 30, number * 30 + 8))
    labelled = {"robot": CorpusConfig(path=str(write_lerobot(tmp_path / "robot", [8, 8, 8, 8])))}
    cut = dict(height=32, width=32, pair_interval_s=0.3, holdout=0.5)
    config = PretrainConfig(
        model=ModelConfig(preset="nano"),
        data=DataConfig(
            corpora={"videos": CorpusConfig(path=str(tmp_path / "videos"))},
            manifest=str(tmp_path / "manifest"),
            text_cache=str(tmp_path / "texts"),
            **cut,  # type: ignore[arg-type]
        ),
        train=TrainConfig(
            output=str(tmp_path / "run"),
            steps=1,
            global_batch=1,
            micro_batch=1,
            probe=ProbeConfig(labelled, str(tmp_path / "probed"), pairs=16, holdout=0.5, distractors=[]),
            threads=1,
        ),
    )
    encoded: list[str] = []
    encode = HashedText._encode_states

    def counted(self: HashedText, texts: list[str]) -> list[Any]:
        encoded.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(HashedText, "_encode_states", counted)
    recipe = GIDMRecipe(config)
    recipe.prepare()
    recipe.encode_texts(recipe.build(), Rank())  # type: ignore[arg-type]
    assert {"task 0", "task 1"} < set(encoded) and len(encoded) == len(set(encoded))
    written = files_of(tmp_path / "texts")

    def loaded(recipe: GIDMRecipe, _checkpoint: object) -> Any:
        torch.manual_seed(0)
        return recipe.build().eval()

    for module, name in ((async_task, "load_model"), (run_results, "export_model")):
        monkeypatch.setattr(module, name, loaded)
    monkeypatch.setattr(async_task, "_wait_for_checkpoint", lambda *_: None)
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    for name in ("write_curves", "write_run_card"):
        monkeypatch.setattr(run_results, name, lambda *_: None)
    report = cloudpickle.loads(async_task.validate_checkpoint(cloudpickle.dumps(recipe), 1))
    rows, facts = [{"split": "validation"}], {"steps": 1, "samples": 1, "wall_s": 1.0}
    summary = run_results.write_results(recipe, rows, facts, {}, torch.device("cpu"), "")
    assert summary["probe"] == report.figures["probe"]
    assert len(encoded) == len(set(encoded)) and files_of(tmp_path / "texts") == written


def test_what_killed_writers_left_goes_after_a_day(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = t5()
    store = TextStore(folder, encoder, torch.float32)
    store.write("states", TEXTS, encoder.entries("states", TEXTS))
    shards = storage.join(store.folder, "shards")
    whole = storage.names(shards)
    half = [f"{time.time_ns():020d}-abcdef01.bin", f".{time.time_ns():020d}-abcdef01.parquet.8a7b"]
    for name in half:
        storage.write_bytes(storage.join(shards, name), b"1")
    store.remove_leftovers()
    assert storage.names(shards) == sorted([*whole, *half])
    monkeypatch.setattr(text_store, "LEFTOVER_S", 0.0)
    store.remove_leftovers()
    assert storage.names(shards) == whole


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(uri: str, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", uri)

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    with pytest.raises(storage.StorageError, match=r"cannot be written to .*No space left.*data\.text_cache"):
        TextStoreUse(str(tmp_path), TrainConfig()).fill([(t5(), ("states",))], TEXTS, Rank())  # type: ignore[arg-type]


def recipe_with_texts(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> GFDMRecipe:
    @dataclass
    class Planned:
        manifest: Any

        def resolve_many(self, samples: Sequence[int]) -> list[Any]:
            return [SimpleNamespace(text=TEXTS[k % len(TEXTS)]) for k in samples]

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
    assert "gfdm: 5 texts and 5 of evaluations, features of 5 encoded" in capsys.readouterr().out


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
