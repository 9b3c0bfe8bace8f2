"""The generator of barcode videos: what the tests of exact frames stand on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from barcode_specs import FACTORS, Spec, all_specs, covering
from barcodes import number_of, picture, shown, truth, write
from PIL import Image

SIZES = [(24, 24), (48, 64), (120, 160), (160, 120)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_picture_tells_its_number_and_which_way_up_it_is(height: int, width: int) -> None:
    signs = [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)] + [
        (0, b, c, 0) for b in (1, -1) for c in (1, -1)
    ]
    for number in (0, 1, 2, 511, 682, 1023):
        for matrix in signs:
            seen = number_of(shown(picture(number, height, width), matrix))
            assert seen == (number if matrix == (1, 0, 0, 1) else -1)


def test_a_picture_is_read_at_other_sizes_and_not_from_a_mixture_of_two() -> None:
    image = Image.fromarray(picture(682, 120, 160))
    for width, height in ((32, 24), (200, 150), (333, 250)):
        assert number_of(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))) == 682
    assert number_of(picture(682, 48, 64) // 2 + picture(341, 48, 64) // 2) == -1
    assert number_of(np.full((48, 64, 3), 128, np.uint8)) == -1


def test_the_selection_has_every_two_values_that_meet_in_any_file() -> None:
    def met(specs: list[Spec]) -> set[tuple[object, ...]]:
        names = itertools.combinations(FACTORS, 2)
        return {(a, getattr(s, a), b, getattr(s, b)) for a, b in names for s in specs}

    specs = all_specs()
    chosen = covering(specs)
    assert met(chosen) == met(specs)
    assert len(chosen) < 80 < 5000 < len(specs)
    assert {value for s in chosen for value in (s.codec, s.container)} == {
        *FACTORS["codec"],
        *FACTORS["container"],
    }


@pytest.mark.parametrize(
    "spec",
    [
        Spec(b_frames=2, refresh="open", timing="mild"),
        Spec(codec="mpeg4", b_frames=2, container="avi"),
        Spec(codec="hevc", start="trim", timing="held", width=64),
        Spec(codec="av1", container="webm", start="late", timing="jumps", width=64, frames=20),
        Spec(matrix=(0, 1, -1, 0)),
    ],
    ids=str,
)
def test_a_file_has_the_pictures_of_its_spec_in_order(spec: Spec, tmp_path: Path) -> None:
    path = tmp_path / f"x{spec.suffix}"
    write(spec, path)
    found = truth(spec, path)
    assert found.numbers == list(range(spec.hidden, spec.frames))
    turned = not spec.matrix[0]
    assert found.shape == ((spec.width, spec.height) if turned else (spec.height, spec.width))
    assert found.times[0] == 0
    assert (np.diff(found.times) > 0).all()
