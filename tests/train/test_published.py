"""The configurations of the paper's runs against the table of published settings in docs/published.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from defi_models import presets
from defi_models.layers.action_head import ActionHead
from defi_models.layers.adapter import FeatureProjector
from defi_models.layers.latent_actions import LatentActionEncoder
from defi_models.layers.video_former import VideoFormer
from defi_models.pretrained.configuration import to_mapping
from defi_platform.config import FinetuneConfig, PretrainConfig
from defi_platform.config.loader import load_config
from defi_platform.config.loader import to_mapping as config_mapping

REPOSITORY = Path(__file__).resolve().parents[2]
SECTION = re.compile(r"^## (\w+): `(configs/paper/\w+\.yaml)`\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
ROW = re.compile(r"^\| (.+?) \| (.+?) \| (.+?) \| `(preset )?([\w.]+)` \|$", re.MULTILINE)
SECTIONS = {
    kind: (file, ROW.findall(text))
    for kind, file, text in SECTION.findall((REPOSITORY / "docs/published.md").read_text())
}
SCHEMAS: dict[str, type] = {"GFDM": PretrainConfig, "GIDM": PretrainConfig, "Policy": FinetuneConfig}


def value_of(cell: str) -> Any:
    """The value that a cell begins with; what is in brackets behind it explains it."""
    # YAML 1.1 reads 1e-4 as a text.
    found = yaml.safe_load(re.sub(r" \(.*\)$", "", cell))
    return float(found) if isinstance(found, str) and re.fullmatch(r"\d+e-\d+", found) else found


def test_the_table_has_every_model_and_no_row_that_is_not_read() -> None:
    assert set(SECTIONS) == set(SCHEMAS)
    page = (REPOSITORY / "docs/published.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| setting")]
    assert len(lines) == sum(len(rows) for _, rows in SECTIONS.values()) > 90


@pytest.mark.parametrize("kind", list(SCHEMAS))
def test_a_configuration_has_the_published_values_and_names_where_it_differs(kind: str) -> None:
    file, rows = SECTIONS[kind]
    config = OmegaConf.create(config_mapping(load_config(SCHEMAS[kind], REPOSITORY / file)))
    preset = OmegaConf.create(to_mapping(getattr(presets, kind.lower())("paper")))
    comment = " ".join(re.findall(r"^# (.*)$", (REPOSITORY / file).read_text(), re.MULTILINE))
    otherwise = comment.split("Ours otherwise:")[1]
    for setting, published, ours, is_preset, key in rows:
        found = OmegaConf.select(preset if is_preset else config, key)
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
        assert found == value_of(ours), f"{file}: {setting} ({key})"
        if isinstance(found, dict):
            assert list(found) == list(value_of(ours)), f"{file}: the order of {key}"
        if value_of(published) != value_of(ours):
            name = key.rsplit(".", 1)[-1]
            assert re.search(rf"\b{name}\b", otherwise), f"{file} does not say that {key} differs"


def test_the_table_has_what_the_released_code_does_beside_the_papers_tables() -> None:
    found = {
        (kind, key): value_of(published)
        for kind, (_, rows) in SECTIONS.items()
        for _, published, _, _, key in rows
    }
    released = {
        ("Policy", "train.schedule"): "as_run",
        ("Policy", "train.learning_rate"): 1e-4,
        ("Policy", "train.weight_decay"): 0.05,
        ("Policy", "train.betas"): [0.9, 0.9],
        ("Policy", "train.clip_grad_norm"): 0,
        ("Policy", "train.export_weights"): "raw",
        ("Policy", "acting.sigma_min"): 1.0,
        ("Policy", "adapter.head.sigma_min"): 0.001,
        ("Policy", "acting.steps"): 10,
        ("Policy", "acting.gripper"): "binary",
        ("Policy", "actions.execute_steps"): 10,
        ("Policy", "adapter.head.weight_std"): 0.02,
        ("Policy", "adapter.video_former.embedding_std"): 1,
        ("GIDM", "encoder.dropout"): 0,
        ("GIDM", "decoder.dropout"): 0,
        ("GIDM", "train.clip_grad_norm"): 0.1,
        ("GFDM", "data.corpora.calvin.sampling.stride"): 2,
        ("GFDM", "data.corpora.something.sampling.max_frames"): 100,
    }
    assert {key: found.get(key) for key in released} == released


def test_fresh_weights_are_spread_as_published() -> None:
    torch.manual_seed(0)
    former = VideoFormer(VideoFormer.Config(dim=64, depth=1), feature_dim=8, tokens_per_frame=4)
    projector = FeatureProjector(8, 768, (0, 5), presets.policy("paper").adapter.embedding_std)
    for embedding in (former.queries, former.time_embedding, projector.time_embedding):
        assert embedding.std().item() == pytest.approx(1.0, rel=0.1)
    config = LatentActionEncoder.Config(dim=24, blocks=1, heads=2)
    queries = LatentActionEncoder(config, feature_dim=768, text_dim=8).queries
    assert 0.99 < queries.abs().max() <= 1 and queries.std().item() == pytest.approx(3**-0.5, rel=0.05)
    head = ActionHead(ActionHead.Config(), video_dim=64, latent_action_dim=24, goal_dim=32)
    for name, parameter in head.named_parameters():
        if parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
