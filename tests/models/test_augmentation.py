from __future__ import annotations

import colorsys

import pytest
import torch
from model_samples import TEXTS, generators, pixels

from defi_models import presets
from defi_models.gidm import GIDM
from defi_models.inputs.augmentation import Augmentation, _from_hsv, _to_hsv

NOTHING = {"crop_area": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def smooth_frames(batch: int) -> torch.Tensor:
    """Coloured ramps, on which a crop moves every pixel a little."""
    ramp = torch.linspace(20, 230, 32)
    image = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), ramp.flip(0).expand(32, 32)], -1)
    return image.to(torch.uint8).expand(batch, 2, -1, -1, -1).clone()


def test_an_augmentation_of_nothing_changes_nothing() -> None:
    frames = pixels(2, 2)
    assert torch.equal(Augmentation(**NOTHING)(frames, generators(2)), frames)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "crop_area"])
def test_each_change_alone_changes_the_frames(name: str) -> None:
    frames = smooth_frames(1)
    changed = Augmentation(**(NOTHING | {name: 0.5}))(frames, generators(1))
    assert changed.shape == frames.shape and changed.dtype == torch.uint8
    assert not torch.equal(changed, frames)


def test_both_frames_of_a_pair_change_alike_and_samples_apart() -> None:
    changed = Augmentation()(smooth_frames(2), generators(2))
    assert torch.equal(changed[:, 0], changed[:, 1])
    assert not torch.equal(changed[0], changed[1])


def test_a_samples_augmentation_does_not_depend_on_the_rest_of_the_batch() -> None:
    frames = pixels(3, 2)
    together = Augmentation()(frames, generators(3))
    assert torch.equal(together[2:], Augmentation()(frames[2:], generators(1, 2)))


def test_a_crop_keeps_the_share_of_the_picture_it_says() -> None:
    changed = Augmentation(**(NOTHING | {"crop_area": 0.25}))(smooth_frames(1), generators(1))
    before, after = (
        frames[0, 0, :, :, 0].float().amax() - frames[0, 0, :, :, 0].float().amin()
        for frames in (smooth_frames(1), changed)
    )
    assert after / before == pytest.approx(0.5, abs=0.03)


def test_hue_saturation_and_value_are_those_of_pythons_colorsys_and_go_back() -> None:
    colours = torch.tensor(
        [[0.2, 0.4, 0.9], [0.9, 0.1, 0.1], [0.3, 0.8, 0.3], [0.5, 0.5, 0.5], [0.0, 0.0, 0.0]]
    )
    images = colours[:, :, None, None]
    ours = torch.stack([part.flatten() for part in _to_hsv(images)], dim=1)
    theirs = torch.tensor([colorsys.rgb_to_hsv(*colour) for colour in colours.tolist()])
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(_from_hsv(*_to_hsv(images)), images, atol=1e-6)


def test_gidm_augments_in_training_only(gidm: GIDM) -> None:
    model = GIDM(presets.gidm("nano", augmentation={"brightness": 0.5}))
    batch = {"frames": pixels(2, 2), "text": TEXTS[:2]}
    plain = model.eval()(batch, generators(2))["loss"]
    assert torch.equal(model.eval()(batch, generators(2, 5))["loss"], plain)
    assert not torch.equal(model.train()(batch, generators(2))["loss"], plain)


def test_features_encoded_ahead_are_refused_where_training_augments() -> None:
    model = GIDM(presets.gidm("nano", augmentation={})).train()
    features = model.encode_frames(pixels(1, 2))
    with pytest.raises(ValueError, match="augmentation to null"):
        model({"features": features, "text": TEXTS[:1]})
    model.eval()({"features": features, "text": TEXTS[:1]})
