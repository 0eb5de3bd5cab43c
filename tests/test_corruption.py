"""What training hides from a tokenizer: how much, of which samples, and that what is hidden has no influence."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from softvq.errors import InputError
from softvq.randomness import fold_in, keys_of, normal, uniform
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.corruption import CorruptionConfig, noisy, patch_mask, token_counts
from tests import family

PATCH = 8
DETERMINISTIC = sorted(set(family.QUANTIZERS) - {"kl", "gumbel", "gumbel-hard"})


def keys(count: int = 4000, first: int = 0) -> Tensor:
    return keys_of(3, "model", torch.arange(first, first + count))


def build(name: str = "softvq", **changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    config = dataclasses.replace(family.recipe(family.QUANTIZERS[name]).model, **changes)
    return ImageTokenizer(config).eval()


def pictures(count: int = 8) -> Tensor:
    return family.pictures(family.recipe(family.QUANTIZERS["softvq"], batch_size=count), 0).images


@pytest.mark.parametrize(("share", "patches", "hidden"), [(0.5, 16, 8), (0.25, 256, 64), (0.3, 16, 4), (0.99, 16, 15)])
def test_a_fixed_share_hides_exactly_that_many_patches(share: float, patches: int, hidden: int) -> None:
    mask = patch_mask(keys(500), patches, (share, share))
    assert mask.shape == (500, patches)
    assert (mask.sum(dim=1) == hidden).all()


def test_shares_are_spread_evenly_over_the_range_and_places_over_the_picture() -> None:
    mask = patch_mask(keys(), 64, (0.25, 0.75))
    counts = mask.sum(dim=1)
    assert (int(counts.min()), int(counts.max())) == (16, 47)  # rounded down
    histogram = torch.bincount(counts)[16:].double()
    expected = torch.full_like(histogram, 4000 / 32)
    assert float(((histogram - expected) ** 2 / expected).sum()) < 61.1  # chi-square, 31 degrees, p = 0.001
    places = mask.double().mean(dim=0)  # each place is hidden in half of the images, less half a patch
    torch.testing.assert_close(places, torch.full_like(places, 31.5 / 64), rtol=0, atol=5 * 0.5 / math.sqrt(4000))


def test_a_negative_share_hides_nothing_of_some_images() -> None:
    counts = patch_mask(keys(), 256, (-0.1, 0.6)).sum(dim=1)
    # shares below 1 / 256 round down to no patch: a stretch of 0.1 + 1 / 256 of the range of 0.7
    expected = (0.1 + 1 / 256) / 0.7
    assert float((counts == 0).double().mean()) == pytest.approx(expected, abs=5 * math.sqrt(expected / 4000))
    assert int(counts.max()) <= int(0.6 * 256)
    assert not patch_mask(keys(50), 256, (-0.5, 0.0)).any()


def test_images_are_masked_differently_and_alike_in_any_batch() -> None:
    whole = patch_mask(keys(16), 64, (0.2, 0.8))
    halves = torch.cat([patch_mask(keys(8), 64, (0.2, 0.8)), patch_mask(keys(8, first=8), 64, (0.2, 0.8))])
    assert torch.equal(whole, halves)
    assert len(whole.unique(dim=0)) == 16


def test_noise_is_mixed_in_as_the_equation_says() -> None:
    latents = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(6, 1, 1)
    t = uniform(fold_in(keys(6), 0), 1, 1)
    e = normal(fold_in(keys(6), 1), 4, 5)
    deviation = torch.stack([sample.std(correction=0) for sample in latents]).view(6, 1, 1)
    assert ((t > 0) & (t < 1)).all()
    torch.testing.assert_close(noisy(latents, keys(6), 2.0), (1 - t) * latents + t * 2.0 * deviation * e)


def test_without_strength_latents_shrink_alone() -> None:
    latents = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    t = uniform(fold_in(keys(6), 0), 1, 1)
    torch.testing.assert_close(noisy(latents, keys(6), 0.0), (1 - t) * latents)


def test_noise_has_mean_zero_and_the_deviation_of_the_latents_times_strength() -> None:
    latents = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1)).expand(4000, -1, -1) * 3 + 1
    t = uniform(fold_in(keys(), 0), 1, 1)
    noise = (noisy(latents, keys(), 0.5) - (1 - t) * latents) / t
    deviation = 0.5 * float(latents[0].std(correction=0))
    assert float(noise.mean()) == pytest.approx(0, abs=5 * deviation / math.sqrt(noise.numel()))
    assert float(noise.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * noise.numel()))


def test_noise_belongs_to_the_sample() -> None:
    latents = torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(2))
    whole = noisy(latents, keys(8), 1.0)
    halves = torch.cat([noisy(latents[:4], keys(4), 1.0), noisy(latents[4:], keys(4, first=4), 1.0)])
    assert torch.equal(whole, halves)
    others = torch.cat([latents[:1], -7 * latents[1:]])
    assert torch.equal(noisy(others, keys(8), 1.0)[0], whole[0])


def test_the_deviation_takes_no_gradient() -> None:
    latents = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2)).requires_grad_()
    noisy(latents, keys(3), 1.0).sum().backward()
    t = uniform(fold_in(keys(3), 0), 1, 1)
    torch.testing.assert_close(latents.grad, (1 - t).expand_as(latents))


@pytest.mark.parametrize(
    ("least", "most", "counts"),
    [(16, 64, [16, 32, 64]), (1, 4, [1, 2, 4]), (64, 64, [64]), (3, 64, [3, 6, 12, 24, 48, 64]), (1, 1, [1])],
)
def test_token_counts_double_up_to_all(least: int, most: int, counts: list[int]) -> None:
    assert token_counts(least, most) == counts


@pytest.mark.parametrize("ratio", [(0.5, 0.2), (-1.5, 0.5), (0.0, 1.0), (0.0, math.nan), (math.nan, 0.5)])
def test_impossible_shares_are_refused(ratio: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"mask_ratio is .*expected two rising numbers from -1 to below 1"):
        CorruptionConfig(mask_ratio=ratio)


@pytest.mark.parametrize("strength", [-0.1, 101.0, math.inf, math.nan])
def test_impossible_strengths_are_refused(strength: float) -> None:
    with pytest.raises(InputError, match=r"latent_noise is .*expected 0 to 100"):
        CorruptionConfig(latent_noise=strength)


@pytest.mark.parametrize("least", [0, 5, -1])
def test_impossible_numbers_of_tokens_are_refused(least: int) -> None:
    model = family.recipe(family.QUANTIZERS["softvq"]).model
    with pytest.raises(InputError, match=rf"min_latent_tokens is {least}, expected 1 to num_latent_tokens \(4\)"):
        dataclasses.replace(model, min_latent_tokens=least)


def as_pixels(mask: Tensor, config: TokenizerConfig) -> Tensor:
    side = config.image_size // config.patch_size
    squares = mask.reshape(-1, 1, side, side).float()
    return torch.nn.functional.interpolate(squares, scale_factor=config.patch_size, mode="nearest").bool()


@pytest.mark.parametrize("name", ["softvq", "kl", "none"])
def test_pixels_of_hidden_patches_have_no_influence(name: str) -> None:
    tokenizer, images = build(name), pictures()
    mask = patch_mask(keys(8), 16, (0.3, 0.7))
    hidden = as_pixels(mask, tokenizer.config)
    others = torch.where(hidden, torch.randn_like(images) * 100, images)
    with torch.no_grad():
        ours, theirs = tokenizer.encode_pre(images, mask), tokenizer.encode_pre(others, mask)
        unmasked = tokenizer.encode_pre(images), tokenizer.encode_pre(others)
    assert torch.equal(ours, theirs)
    assert not torch.allclose(*unmasked, atol=1e-3)


def test_pixels_of_visible_patches_have_influence_and_hidden_positions_too() -> None:
    tokenizer, images = build("none"), pictures(1)
    first, second = torch.zeros(2, 1, 16, dtype=torch.bool)
    first[0, 0] = second[0, 15] = True
    with torch.no_grad():
        one, two = tokenizer.encode_pre(images, first), tokenizer.encode_pre(images, second)
        brighter = images.clone()
        brighter[..., -PATCH:, -PATCH:] += 0.5  # the last patch, which `first` shows
        seen, unseen = tokenizer.encode_pre(brighter, first), tokenizer.encode_pre(brighter, second)
    assert not torch.allclose(one, two, atol=1e-4)
    assert not torch.allclose(one, seen, atol=1e-4)
    assert torch.equal(two, unseen)


def test_a_mask_of_nothing_is_no_mask() -> None:
    tokenizer, images = build(), pictures()
    with torch.no_grad():
        nothing = torch.zeros(8, 16, dtype=torch.bool)
        assert torch.equal(tokenizer.encode_pre(images, nothing), tokenizer.encode_pre(images))


def test_gradients_of_hidden_pixels_are_zero() -> None:
    tokenizer, images = build("none"), pictures().requires_grad_()
    mask = patch_mask(keys(8), 16, (0.5, 0.5))
    tokenizer.encode_pre(images, mask).square().sum().backward()
    hidden = as_pixels(mask, tokenizer.config).expand_as(images)
    assert images.grad is not None
    assert (images.grad[hidden] == 0).all()
    assert (images.grad[~hidden] != 0).double().mean() > 0.9


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_with_all_flags_off_training_computes_what_use_does(name: str) -> None:
    tokenizer, images = build(name), pictures()
    with torch.no_grad():
        output = tokenizer(images, keys(8))
        latents = tokenizer.encode_raw(images)
        torch.testing.assert_close(output.latents, latents, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.images, tokenizer.decode_raw(latents), rtol=1e-4, atol=1e-5)
    assert output.masked is None


@pytest.mark.parametrize("name", ["softvq", "kl", "gumbel"])
def test_corruption_of_a_sample_is_the_same_in_any_batch(name: str) -> None:
    tokenizer, images = build(name), pictures()
    corruption = CorruptionConfig(mask_ratio=(0.2, 0.6), latent_noise=0.5)
    with torch.no_grad():
        whole = tokenizer(images, keys(8), corruption=corruption)
        part = tokenizer(images[4:], keys(4, first=4), corruption=corruption)
    assert whole.masked is not None
    assert torch.equal(whole.masked[4:], part.masked)
    torch.testing.assert_close(whole.images[4:], part.images, rtol=1e-4, atol=1e-5)


def test_noise_reaches_the_decoder_and_not_the_latents_that_are_returned() -> None:
    tokenizer, images = build("none"), pictures()
    with torch.no_grad():
        output = tokenizer(images, keys(8), corruption=CorruptionConfig(latent_noise=1.0))
        latents = tokenizer.encode_raw(images)
        assert torch.equal(output.latents, latents)
        expected = tokenizer.decode_raw(noisy(latents, fold_in(keys(8), 2), 1.0))
        torch.testing.assert_close(output.images, expected)
        assert not torch.allclose(output.images, tokenizer.decode_raw(latents), atol=1e-3)
