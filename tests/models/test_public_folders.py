from __future__ import annotations

import json
from pathlib import Path

import public_backbones
import pytest
import torch
import transformers
from model_samples import generators, pixels

from defi_models.encoders.clip_text import ClipText
from defi_models.encoders.dino import DinoPatches
from defi_models.encoders.t5_text import T5Text
from defi_models.errors import ModelFolderError
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("public")
    public_backbones.save_clip(folder / "clip")
    public_backbones.save_t5(folder / "t5")
    public_backbones.save_dino(folder / "dino")
    public_backbones.save_svd(folder / "svd")
    return folder


def copied(source: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, target))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_clip_text_is_what_transformers_computes(public: Path) -> None:
    encoder = ClipText.from_folder(public / "clip", max_tokens=6)
    theirs = transformers.CLIPModel.from_pretrained(public / "clip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(public / "clip")
    tokens = tokenizer(["open the drawer"], padding="max_length", max_length=6, return_tensors="pt")
    expected = theirs.text_model(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    found = encoder.states(["open the drawer"])
    short = tokenizer(["open the drawer"], return_tensors="pt")
    pooled = theirs.text_projection(theirs.text_model(input_ids=short["input_ids"]).pooler_output)
    assert torch.allclose(found.states, expected, atol=1e-6) and found.mask.sum() == 4
    assert torch.allclose(encoder.goal(["open the drawer"]), pooled, atol=1e-6)


def test_t5_text_does_not_depend_on_the_other_texts(public: Path) -> None:
    encoder = T5Text.from_folder(public / "t5")
    together = encoder.states(["open", "press the red button"])
    alone = encoder.states(["open"])
    theirs = transformers.T5EncoderModel.from_pretrained(public / "t5")
    expected = theirs(input_ids=torch.tensor([[3, 1]])).last_hidden_state
    assert together.mask.sum(1).tolist() == [2, 5]
    assert torch.equal(together.states[:1, :2], alone.states)
    assert torch.allclose(alone.states, expected, atol=1e-6)


def test_dino_patches_are_the_normalised_patch_tokens_without_registers(public: Path) -> None:
    encoder = DinoPatches.from_folder(public / "dino", image_size=28)
    images = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = ((images / 255.0 - mean) / std).movedim(-1, 1)
    theirs = transformers.Dinov2WithRegistersModel.from_pretrained(public / "dino").eval()
    expected = theirs(pixel_values=values).last_hidden_state[:, 5:]
    assert torch.allclose(encoder(images), expected, atol=1e-5) and expected.shape[1] == 4


def test_a_gfdm_from_an_svd_folder_trains_saves_and_samples(public: Path, tmp_path: Path) -> None:
    text = ClipText.from_folder(public / "clip")
    model = GFDM.from_svd(public / "svd", text, height=64, width=64)
    batch = {"frames": pixels(1, 4), "text": ["open the drawer"]}
    model.train()(batch, generators(1))["loss"].backward()
    model.eval().save_pretrained(tmp_path / "gfdm")
    loaded = GFDM.from_pretrained(tmp_path / "gfdm")
    first, words = pixels(1), ["close the window"]
    assert torch.equal(
        loaded.features(first, words, generators(1)), model.features(first, words, generators(1))
    )
    assert loaded.sample(first, words, steps=2).shape == (1, 4, 64, 64, 3)


def test_a_gidm_with_dino_and_t5_saves_and_loads_with_its_tokenizer(public: Path, tmp_path: Path) -> None:
    dino, t5 = DinoPatches.from_folder(public / "dino", image_size=28), T5Text.from_folder(public / "t5")
    from defi_models import presets

    config = presets.gidm("nano", encoder={"dim": 32}, decoder={"blocks": 1})
    config = GIDM.Config(patches=dino.config, text=t5.config, encoder=config.encoder, decoder=config.decoder)
    model = GIDM(config, patch_encoder=dino, text_encoder=t5).eval()
    loaded = GIDM.from_pretrained(model.save_pretrained(tmp_path / "gidm"))
    batch = {"frames": pixels(2, 2), "text": ["open the drawer", "press"]}
    assert torch.equal(loaded(batch)["loss"], model(batch)["loss"])


def test_t5_states_of_one_length_are_the_same_states_with_padding(public: Path) -> None:
    encoder = T5Text.from_folder(public / "t5", max_tokens=9)
    short = encoder.states(["open", "open the drawer"])
    encoder.pad_to_max = True
    padded = encoder.states(["open", "open the drawer"])
    length = short.states.shape[1]
    assert padded.states.shape[:2] == padded.mask.shape == (2, 9) and length < 9
    assert torch.equal(padded.states[:, :length], short.states) and torch.equal(
        padded.mask[:, :length], short.mask
    )
    assert not padded.mask[:, length:].any()


def test_a_backbone_without_a_tokenizer_says_so_when_text_is_encoded(public: Path) -> None:
    encoder = T5Text(T5Text.from_folder(public / "t5").config)
    with pytest.raises(ModelFolderError, match="has no tokenizer"):
        encoder.states(["open"])


@pytest.mark.parametrize("part", ["unet", "vae", "scheduler"])
def test_an_svd_folder_without_a_part_names_it(public: Path, tmp_path: Path, part: str) -> None:
    import shutil

    folder = copied(public / "svd", tmp_path / "svd")
    shutil.rmtree(folder / part)
    with pytest.raises(ModelFolderError, match=f"{part} does not exist"):
        GFDM.from_svd(folder, ClipText.from_folder(public / "clip"))


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_truncated_svd_weights_are_named(public: Path, tmp_path: Path, part: str) -> None:
    folder = copied(public / "svd", tmp_path / "svd")
    truncate(folder / part / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelFolderError, match=rf"{part}.*diffusion_pytorch_model\.safetensors"):
        GFDM.from_svd(folder, ClipText.from_folder(public / "clip"))


@pytest.mark.parametrize(("name", "encoder"), [("clip", ClipText), ("t5", T5Text), ("dino", DinoPatches)])
def test_truncated_backbone_weights_are_named(public: Path, tmp_path: Path, name: str, encoder) -> None:
    folder = copied(public / name, tmp_path / name)
    truncate(folder / "model.safetensors")
    with pytest.raises(ModelFolderError, match=r"model\.safetensors"):
        encoder.from_folder(folder)


def test_a_backbone_of_another_size_than_its_config_is_refused(public: Path, tmp_path: Path) -> None:
    folder = copied(public / "dino", tmp_path / "dino")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelFolderError, match=r"misses .* encoder\.layer\.2"):
        DinoPatches.from_folder(folder)


def test_a_clip_without_its_projection_is_refused(public: Path, tmp_path: Path) -> None:
    text = transformers.CLIPModel.from_pretrained(public / "clip").text_model
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(ModelFolderError, match=r"text_projection\.weight"):
        ClipText.from_folder(tmp_path / "text")


def test_a_text_encoder_of_the_wrong_width_is_refused_with_both_numbers(public: Path, tmp_path: Path) -> None:
    public_backbones.save_clip(tmp_path / "clip", width=16)
    with pytest.raises(ModelFolderError, match="cross_attention_dim is 64, but 2 copies of 16"):
        GFDM.from_svd(public / "svd", ClipText.from_folder(tmp_path / "clip"))


def test_another_scheduler_than_svds_is_refused(public: Path, tmp_path: Path) -> None:
    folder = copied(public / "svd", tmp_path / "svd")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("EulerDiscreteScheduler", "DDIMScheduler"))
    with pytest.raises(ModelFolderError, match="DDIMScheduler; EulerDiscreteScheduler is expected"):
        GFDM.from_svd(folder, ClipText.from_folder(public / "clip"))
