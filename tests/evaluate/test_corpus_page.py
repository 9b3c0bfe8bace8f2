"""The corpus page, made of a small corpus with damage in it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from markupsafe import Markup

from defi_platform.config import CorpusConfig, DataConfig, InspectConfig
from defi_platform.evaluate.html.corpus_page import CorpusSection, Mixture, inspect_corpora
from defi_platform.evaluate.html.page import Picture, Table, render

sys.path.append(str(Path(__file__).parents[1] / "data"))
from corpora import write_video


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
