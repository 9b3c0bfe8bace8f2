"""The corpus page, made of a small corpus with damage in it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup

from defi_platform.config import CorpusConfig, DataConfig, InspectConfig
from defi_platform.evaluate.html.corpus_bytes import bytes_once
from defi_platform.evaluate.html.corpus_page import CorpusSection, Mixture, inspect_corpora
from defi_platform.evaluate.html.corpus_signals import signal_section, spread
from defi_platform.evaluate.html.page import Picture, Table, render

sys.path.append(str(Path(__file__).parents[1] / "data"))
from corpora import write_lerobot, write_video


@pytest.fixture(scope="module")
def page(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two corpora of 3 : 1, one of them with a truncated file."""
    folder = tmp_path_factory.mktemp("inspected")
    for name, count in (("kitchen", 3), ("<lab>", 2)):
        for number in range(count):
            write_video(folder / name / f"{number}.mp4", range(12 + number))
    whole = (folder / "<lab>" / "0.mp4").read_bytes()
    (folder / "<lab>" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    data = DataConfig(
        corpora={
            "kitchen": CorpusConfig(path=str(folder / "kitchen"), weight=3.0),
            "lab": CorpusConfig(path=str(folder / "<lab>")),
        },
        manifest=str(folder / "manifest"),
        holdout=0.0,
    )
    config = InspectConfig(data=data, output=str(folder), samples=400, videos_per_corpus=2)
    return Path(inspect_corpora(config)).read_text()


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert "<script" not in page


def test_every_picture_has_a_text_for_those_who_do_not_see_it(page: str) -> None:
    pictures = re.findall(r"<img [^>]{0,200}", page)
    assert len(pictures) >= 4, "two strips per corpus"
    assert all(re.search(r'alt="[^"]+"', one) for one in pictures)
    assert all('role="img" aria-label="' in one for one in re.findall(r"<svg [^>]*", page))


def test_the_mixture_as_drawn_is_the_one_asked_for(page: str) -> None:
    mixture = page.split('<section id="mixture">')[1].split("</section>")[0]
    assert mixture.count("75.00 %") == 4, "asked for and realised, for clips and for pairs"


def test_the_damaged_file_is_in_quarantine_with_its_reason_and_no_name_breaks_the_page(page: str) -> None:
    quarantine = page.split('<section id="quarantine">')[1]
    assert "cut.mp4" in quarantine
    assert re.search(r"<h3>(unreadable|short|corrupt) \(1 shown\)", quarantine)
    assert "<lab>" not in page


def test_text_of_corpora_is_escaped() -> None:
    made = render(
        "corpora.html.j2",
        lead="<b>",
        overview=Table(["<x>"], [["<script>"]]),
        samples=1,
        mixtures=[Mixture("m", error="<i>")],
        corpora=[CorpusSection("a & b", [Picture('"caption"', '" onload="')], Markup("<svg></svg>"), [])],
        reasons=Table([], []),
        rejections=[],
    )
    assert "<script>" not in made and "&lt;script&gt;" in made and 'href="#a-b"' in made
    assert "<b>" not in made and "<i>" not in made and '" onload="' not in made
    assert "<svg></svg>" in made, "charts are markup"


# --------------------------------------------------------------------------- actions and states


def test_entries_of_signals_are_described_with_what_is_odd_about_them() -> None:
    steps = np.linspace(0, 20, 400, dtype=np.float32)
    roll = np.mod(steps, 2 * np.pi).astype(np.float32) - np.float32(np.pi)
    spiky = np.sin(steps)
    spiky[7] = 500.0
    values = np.stack([roll, np.full_like(roll, 2.0), spiky, 100 * roll], axis=1)
    section = signal_section("States", [values[:200], values[200:]], ["roll", "still", "<x>", "y"], whole=9)
    cells = dict(zip(section.entries.head, zip(*section.entries.rows, strict=True), strict=True))
    inside = sum(int(one) for one in cells["jumps by 2 pi"] if one)
    assert cells["jumps by 2 pi"][0] == "3" and inside == 3, "of angles, and no others"
    assert cells["constant"] == ("", "yes", "", "")
    assert cells["outliers"] == ("", "", "1", "")
    assert section.remarks[0] == "400 steps of 2 episodes out of 9, evenly spread"
    assert any(remark.startswith("0 roll: angles that jump") for remark in section.remarks)
    assert len(section.histograms) == 1 and "&lt;x&gt;" in section.histograms[0]


def test_of_a_large_corpus_whole_episodes_are_looked_at() -> None:
    assert spread([10, 20, 5], most=100) == [0, 1, 2]
    assert spread([10] * 100, most=50) == [0, 25, 50, 74, 99]


def test_bytes_that_videos_share_count_once() -> None:
    uris = [
        "a.mp4", "a.mp4", "b.mp4",  # episodes of one file, or windows of a video
        "s.tar#range=512,10", "s.tar#range=2048,30",
        "x.tfrecord#rlds=12,100,image_0", "x.tfrecord#rlds=12,100,image_1",
        "e.hdf5#hdf5=front", "e.hdf5#hdf5=wrist",
        "c/training#calvin=0,9,rgb_static", "c/training#calvin=0,9,rgb_gripper", "c/training#calvin=5,14,rgb_static",
        "c/training#calvin=2,3,rgb_static",
    ]  # fmt: skip
    sizes = [1000, 1000, 500, 10, 30, 100, 100, 70, 70, 20, 20, 20, 4]
    assert bytes_once(uris, sizes) == 1000 + 500 + 10 + 30 + 100 + 70 + 2 * 15


def test_the_page_shows_actions_and_states(ray_cluster: None, tmp_path: Path) -> None:
    write_lerobot(tmp_path / "robot", [12] * 3)
    data = DataConfig(
        corpora={"robot": CorpusConfig(path=str(tmp_path / "robot"))},
        manifest=str(tmp_path / "m"),
        holdout=0.0,
    )
    page = Path(inspect_corpora(InspectConfig(data=data, output=str(tmp_path), samples=50))).read_text()
    section = page.split('<section id="corpus-robot">')[1].split("</section>")[0]
    assert "<h3>Actions</h3>" in section and "<h3>States</h3>" in section
    assert "36 steps of 3 episodes" in section and "2, 3: one value in every step." in section
    size = (tmp_path / "robot").rglob("*.mp4")
    assert f"{sum(file.stat().st_size for file in size) / 1e6:,.1f} MB" in page
