from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from defi_models.errors import ModelFolderError
from defi_models.gfdm import GFDM
from defi_models.gidm import GIDM
from defi_models.pretrained import replace_folder
from defi_models.pretrained.replace_folder import replaced_folder
from defi_models.pretrained.skip_init import skip_init


@pytest.fixture
def folder(gidm: GIDM, tmp_path: Path) -> Path:
    return gidm.save_pretrained(tmp_path / "gidm")


def edit_config(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | changes))


def test_a_folder_holds_config_weights_and_a_model_card(folder: Path) -> None:
    header = json.loads((folder / "config.json").read_text())
    assert header["model"] == "gidm" and header["preset"] == "nano"
    assert "parameters" in (folder / "README.md").read_text()


def test_a_loaded_model_has_every_tensor_bit_identical(gidm: GIDM, folder: Path) -> None:
    loaded = GIDM.from_pretrained(folder)
    assert not loaded.training and loaded.config == gidm.config
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in gidm.state_dict().items())


@pytest.mark.parametrize(
    ("name", "module", "former"),
    [
        ("gfdm", "gfdm", "ForwardDynamics"),
        ("gidm", "gidm", "InverseDynamics"),
        ("policy", "policy", "DeFIPolicy"),
    ],
)
def test_a_folder_exported_under_the_former_names_loads_by_the_lines_of_its_readme(
    name: str, module: str, former: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue(name)
    folder = model.save_pretrained(tmp_path / name)
    readme = folder / "README.md"
    lines = f'from defi_models.{module} import {former}\n\nmodel = {former}.from_pretrained("THIS_FOLDER")\n'
    current = readme.read_text().split("```python\n")[1].split("```")[0]
    readme.write_text(readme.read_text().replace(current, lines))
    loaded = []
    for code in (current, readme.read_text().split("```python\n")[1].split("```")[0]):
        scope: dict = {}
        exec(code.replace("THIS_FOLDER", str(folder)), scope)
        loaded.append(scope["model"])
    assert type(loaded[0]) is type(loaded[1]) is type(model)
    assert all(torch.equal(t, loaded[1].state_dict()[key]) for key, t in model.state_dict().items())


def test_weights_that_a_file_will_overwrite_are_not_drawn_at_random() -> None:
    before = torch.get_rng_state()
    with skip_init():
        torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(3, 4), torch.nn.Embedding(5, 6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.nn.Linear(3, 4)
    assert not torch.equal(torch.get_rng_state(), before)


def test_the_stored_precision_is_kept_and_another_one_can_be_asked_for(gfdm, tmp_path: Path) -> None:
    folder = gfdm.to(torch.bfloat16).save_pretrained(tmp_path / "gfdm")
    assert GFDM.from_pretrained(folder).dtype == torch.bfloat16
    assert GFDM.from_pretrained(folder, dtype=torch.float32).dtype == torch.float32


def test_saving_again_replaces_the_folder_and_leaves_nothing_behind(gidm: GIDM, folder: Path) -> None:
    (folder / "stale").write_text("old")
    gidm.save_pretrained(folder)
    assert not (folder / "stale").exists()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_everyone_may_read_a_saved_folder_that_the_umask_lets(gidm: GIDM, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        gidm.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o750


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two folders")
def test_a_replaced_folder_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    target.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    taken_away: list[Path] = []
    monkeypatch.setattr(Path, "rename", lambda path, to: taken_away.append(path))
    for number in (1, 2):
        with replaced_folder(link if number == 2 else target) as fresh:
            (fresh / "number").write_text(str(number))
        assert (target / "number").read_text() == str(number)
    assert not taken_away and link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def test_of_two_that_write_a_new_folder_at_once_the_slower_one_replaces_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, exists = tmp_path / "model", Path.exists
    with replaced_folder(target) as fresh:
        (fresh / "number").write_text("2")
        with replaced_folder(target) as faster:
            (faster / "number").write_text("1")
        # It was not there yet when this one looked.
        monkeypatch.setattr(Path, "exists", lambda path: path != target and exists(path))
    assert (target / "number").read_text() == "2" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace_folder, "_exchange", lambda one, other: False)
    for number in (1, 2):
        with replaced_folder(tmp_path / "model") as fresh:
            (fresh / f"{number}").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "2"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    with pytest.raises(NotADirectoryError, match="is a file"), replaced_folder(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_folder_whole(gidm: GIDM, folder: Path, monkeypatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    monkeypatch.setattr(gidm, "side_files", lambda: {"no/such/place": "x"})
    with pytest.raises(OSError):
        gidm.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_absent_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="nowhere does not exist"):
        GIDM.from_pretrained(tmp_path / "nowhere")


def test_a_folder_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"")
    with pytest.raises(ModelFolderError, match=r"config\.json.*video\.mp4"):
        GIDM.from_pretrained(tmp_path)


def test_a_model_of_another_kind_is_refused(folder: Path) -> None:
    with pytest.raises(ModelFolderError, match="'gidm' model; 'gfdm' is expected"):
        GFDM.from_pretrained(folder)


def test_truncated_weights_are_named_with_their_size(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(ModelFolderError, match=r"model\.safetensors \(10,000 bytes\)"):
        GIDM.from_pretrained(folder)


def test_absent_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"model\.safetensors does not exist"):
        GIDM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other", "config": {}}'])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"config\.json"):
        GIDM.from_pretrained(folder)


def test_an_unknown_config_field_names_the_nearest(folder: Path) -> None:
    header = json.loads((folder / "config.json").read_text())
    header["config"]["decodr"] = header["config"].pop("decoder")
    (folder / "config.json").write_text(json.dumps(header))
    with pytest.raises(ModelFolderError, match="no field 'decodr'"):
        GIDM.from_pretrained(folder)


def test_another_format_version_is_refused(folder: Path) -> None:
    edit_config(folder, version=99)
    with pytest.raises(ModelFolderError, match="version 99"):
        GIDM.from_pretrained(folder)


def test_missing_unknown_and_reshaped_tensors_are_listed(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = load_file(weights)
    for damaged, message in (
        ({k: v for k, v in whole.items() if k != "encoder.queries"}, "misses 1 tensor.*encoder.queries"),
        (whole | {"surplus": torch.ones(1)}, "unknown 1 tensor.*surplus"),
        (whole | {"encoder.queries": torch.ones(1, 2)}, r"other shapes.*encoder.queries is \(1, 2\)"),
    ):
        save_file(damaged, weights)
        with pytest.raises(ModelFolderError, match=message):
            GIDM.from_pretrained(folder)
