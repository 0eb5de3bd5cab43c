"""Augmentations of pictures: exact where they are exact, one sample at a time in plain loops, and fair coins."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from softvq.errors import InputError
from softvq.losses import augment as module
from softvq.losses.augment import augment, crop, view
from softvq.randomness import generator, keys_of, uniform

NONE = {"color": False, "translation": 0.0, "cutout": 0.0, "probability": 1.0}


def pictures(batch=6, height=9, width=8, seed=0):
    return torch.rand(batch, 3, height, width, generator=generator(seed, "test")) * 2 - 1


def keys_for(batch, seed=0):
    return keys_of(seed, "test", torch.arange(batch))


def shift_of(draw, largest):
    return int(np.floor(draw * (2 * largest + 1))) - largest


def one_by_one(images, keys, *, translation, cutout, probability):
    """The same augmentation in float64 with a loop over samples and pixels."""
    results = []
    batch, _, height, width = images.shape
    colors, moves, cuts = np.split(uniform(keys, 10).double().numpy(), (4, 7), axis=1)
    for i in range(batch):
        x = images[i].double().numpy()
        if colors[i, 0] < probability:
            x = x + colors[i, 1] - 0.5
            grey = x.mean(0)
            x = np.stack([grey + 2 * colors[i, 2] * (channel - grey) for channel in x])
            x = x.mean() + (0.5 + colors[i, 3]) * (x - x.mean())
        if moves[i, 0] < probability:
            down = shift_of(moves[i, 1], round(translation * height))
            right = shift_of(moves[i, 2], round(translation * width))
            moved = np.zeros_like(x)
            for r in range(height):
                for c in range(width):
                    if 0 <= r - down < height and 0 <= c - right < width:
                        moved[:, r, c] = x[:, r - down, c - right]
            x = moved
        if cuts[i, 0] < probability:
            x = x.copy()
            spans = []
            for draw, size in ((cuts[i, 1], height), (cuts[i, 2], width)):
                side = round(cutout * size)
                start = int(np.floor(draw * (size + 1 - side % 2))) - side // 2
                spans.append(slice(max(start, 0), max(start + side, 0)))
            x[:, spans[0], spans[1]] = 0
        results.append(x)
    return torch.from_numpy(np.stack(results))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shares", [(0.125, 0.5), (0.3, 0.2), (1.0, 1.0)])
def test_equals_a_loop_over_samples_and_pixels(probability, shares):
    images, keys = pictures(16), keys_for(16)
    arguments = {"translation": shares[0], "cutout": shares[1], "probability": probability}
    found = augment(images, keys, color=True, **arguments)
    torch.testing.assert_close(found.double(), one_by_one(images, keys, **arguments), atol=2e-6, rtol=0)


def test_probability_zero_or_nothing_to_do_is_the_identity_to_the_bit():
    images, keys = pictures(), keys_for(6)
    for dtype in (torch.float32, torch.bfloat16):
        x = images.to(dtype)
        assert torch.equal(augment(x, keys, probability=0.0), x)
        assert torch.equal(augment(x, keys, **NONE), x)


def test_gradient_against_finite_differences():
    images, keys = pictures(4, 5, 6).requires_grad_(), keys_for(4)
    weights = pictures(4, 5, 6, seed=1)

    def loss(x):
        return (augment(x, keys, translation=0.4, cutout=0.3, probability=0.8) * weights).sum()

    (gradient,) = torch.autograd.grad(loss(images), images)
    direction = pictures(4, 5, 6, seed=2)
    with torch.no_grad():  # every change is affine in the picture, so that a wide step is exact
        difference = (loss(images + direction) - loss(images - direction)) / 2
    torch.testing.assert_close((gradient * direction).sum(), difference, atol=1e-4, rtol=1e-4)


def test_brightness_saturation_and_contrast_in_closed_form(monkeypatch):
    images, keys = pictures(3), keys_for(3)
    mean, grey = images.mean((1, 2, 3), keepdim=True), images.mean(1, keepdim=True)
    color = {**NONE, "color": True}
    for settings, expected in [
        ((0.75, 0.5, 0.5), images + 0.25),
        ((0.5, 0.0, 0.5), grey.expand_as(images)),
        ((0.5, 1.0, 0.5), 2 * images - grey),
        ((0.5, 0.5, 0.0), (images + mean) / 2),
    ]:
        monkeypatch.setattr(module, "uniform", lambda keys, count, s=settings: torch.tensor([[0.5, *s]] * len(keys)))
        torch.testing.assert_close(augment(images, keys, **color), expected, atol=1e-6, rtol=0)


def test_translation_moves_pixels_exactly_and_fills_with_grey(monkeypatch):
    images = pictures(2, 8, 8)
    extremes = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.0, 1 - 2**-24, 2**-24, 0.5, 0.5, 0.5]]).expand(2, 10)
    monkeypatch.setattr(module, "uniform", lambda keys, count: extremes)
    found = augment(images, keys_for(2), **{**NONE, "translation": 0.25})
    assert torch.equal(found[:, :, 2:, :-2], images[:, :, :-2, 2:])  # the extremes: two down, two to the left
    assert not found[:, :, :2].any()
    assert not found[:, :, :, -2:].any()


def test_translation_reaches_every_shift_alike():
    images = torch.zeros(4096, 3, 16, 16)
    images[:, :, 8, 8] = 1
    moved = augment(images, keys_for(4096), **{**NONE, "translation": 0.125})
    counts = moved[:, 0].sum(0)
    assert counts.sum() == 4096
    assert torch.equal(counts.nonzero().unique(), torch.arange(6, 11))
    expected = 4096 / 25
    assert ((counts[6:11, 6:11] - expected) ** 2 / expected).sum() < 51  # chi-squared with 24 degrees: 0.1%


def test_cutout_has_its_area_inside_and_less_only_at_the_border():
    ones = torch.ones(2000, 3, 20, 20)
    cut = augment(ones, keys_for(2000), **{**NONE, "cutout": 0.2}) == 0
    areas = cut[:, 0].sum((1, 2))
    assert torch.equal(cut[:, 0], cut[:, 1])
    assert areas.max() == 16
    border = cut[:, 0, 0].any(1) | cut[:, 0, -1].any(1) | cut[:, 0, :, 0].any(1) | cut[:, 0, :, -1].any(1)
    assert (areas[~border] == 16).all()
    assert areas.min() == 4  # the centre in a corner
    # a centre on any of 21 edges covers 4 x 21 - 2 x (2 + 1) places of a side on the average
    assert areas.float().mean().item() == pytest.approx((78 / 21) ** 2, rel=0.02)


def test_coins_are_fair_and_independent_of_each_other():
    keys = keys_for(4000)
    images = pictures(1, 8, 8).expand(4000, -1, -1, -1)
    happened = torch.stack(
        [
            (augment(images, keys, **{**NONE, **one, "probability": 0.3}) != images).any(3).any(2).any(1)
            for one in ({"color": True}, {"translation": 1.0}, {"cutout": 0.5})
        ]
    ).double()
    # a shift by nothing at all, one of 17 x 17, cannot be seen
    expected = torch.tensor([0.3, 0.3 * (1 - 1 / 289), 0.3], dtype=torch.float64)
    torch.testing.assert_close(happened.mean(1), expected, atol=0.03, rtol=0)
    correlation = torch.corrcoef(happened) - torch.eye(3)
    assert correlation.abs().max() < 0.06


def test_a_sample_does_not_depend_on_its_batch():
    images, keys = pictures(7, 12, 12), keys_for(7)
    for function in (lambda x, k: augment(x, k, probability=0.7), lambda x, k: view(x, k, 5)):
        whole = function(images, keys)
        assert torch.equal(torch.cat([function(images[:3], keys[:3]), function(images[3:], keys[3:])]), whole)
        assert torch.equal(function(images.flip(0), keys.flip(0)), whole.flip(0))


def test_type_is_kept_and_low_precision_changes_little():
    images, keys = pictures().bfloat16(), keys_for(6)
    found = augment(images, keys)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), augment(images.float(), keys), atol=0.02, rtol=0.01)
    assert view(images, keys, 4).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images.float(), keys), augment(images.float(), keys))
        assert augment(images.float(), keys).dtype == torch.float32


@pytest.mark.parametrize("name", ["translation", "cutout", "probability"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_outside_their_range_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} is {value}, expected 0 to 1"):
        augment(pictures(), keys_for(6), **{**NONE, name: value})


def test_views_of_larger_pictures_are_crops_or_averages():
    images = pictures(400, 8, 12)
    keys = keys_for(400)
    found = view(images, keys, 4)
    averages = images.unflatten(3, (4, 3)).mean(4).unflatten(2, (4, 2)).mean(3)
    shrunken = torch.isclose(found, averages, atol=1e-6).flatten(1).all(1)
    windows = images.unfold(2, 4, 1).unfold(3, 4, 1).permute(0, 2, 3, 1, 4, 5)
    cropped = (windows == found[:, None, None]).flatten(3).all(3)
    assert torch.equal(cropped.flatten(1).any(1), ~shrunken)
    assert 160 < shrunken.sum() < 240
    places = cropped.nonzero()[:, 1:]
    assert places.amin(0).tolist() == [0, 0]
    assert places.amax(0).tolist() == [4, 8]


def test_views_crop_half_of_the_time_and_everywhere_alike():
    images = pictures(1, 6, 6).expand(4000, -1, -1, -1)
    found = view(images, keys_for(4000), 3)
    shrunken = (found == F.avg_pool2d(images, 2)).flatten(1).all(1)
    assert shrunken.double().mean().item() == pytest.approx(0.5, abs=0.03)
    windows = images[0].unfold(1, 3, 1).unfold(2, 3, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    counts = (windows == found[:, None]).flatten(2).all(2).sum(0).double()
    assert counts.sum() == 4000 - shrunken.sum()
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 38  # chi-squared with 15 degrees: 0.1%


def test_crops_are_squares_of_the_picture_from_everywhere_alike():
    images = pictures(1, 5, 6).expand(4000, -1, -1, -1)
    found = crop(images, keys_for(4000), 3)
    windows = images[0].unfold(1, 3, 1).unfold(2, 3, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    counts = (windows == found[:, None]).flatten(2).all(2).sum(0).double()
    assert counts.sum() == 4000
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 31  # chi-squared with 11 degrees: 0.1%
    assert torch.equal(crop(images[:2], keys_for(4000)[1:3], 3), found[1:3])


def test_views_of_equal_and_smaller_pictures():
    images, keys = pictures(2, 4, 4), keys_for(2)
    assert view(images, keys, 4) is images
    ramp = torch.linspace(-1, 1, 4).expand(2, 3, 4, 4)
    expected = torch.cat([torch.tensor([-1.0]), torch.linspace(-5 / 6, 5 / 6, 6), torch.tensor([1.0])])
    torch.testing.assert_close(view(ramp, keys, 8), expected.expand(2, 3, 8, 8), atol=1e-6, rtol=0)
    assert view(pictures(2, 3, 30), keys, 8).shape == (2, 3, 8, 8)


def test_gradient_of_views_against_finite_differences():
    for size in (5, 14):
        images, weights = pictures(4, 9, 8).requires_grad_(), pictures(4, size, size, seed=1)
        (gradient,) = torch.autograd.grad((view(images, keys_for(4), size) * weights).sum(), images)
        direction = pictures(4, 9, 8, seed=2)
        ends = [(view(x, keys_for(4), size) * weights).sum() for x in (images + direction, images - direction)]
        difference = (ends[0] - ends[1]) / 2
        torch.testing.assert_close((gradient * direction).sum(), difference, atol=1e-4, rtol=1e-4)
