import importlib.util
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from softvq.errors import InputError
from softvq.evaluation.metrics import bits_per_pixel, compression_ratio, legacy_ssim, ms_ssim, psnr, ssim
from softvq.randomness import generator

HAS_SKIMAGE = importlib.util.find_spec("skimage") is not None  # compared with where there is one


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "test")) * 2 - 1


def pairs(height, width):
    """Pictures of nothing in common, of less contrast, of a step aside, and smooth ones with noise."""
    images, targets = noise(4, 3, height, width), noise(4, 3, height, width, seed=1)
    images[1] = 0.8 * targets[1] + 0.1
    images[2] = targets[2].roll(1, -1)
    targets[3] = torch.linspace(-1, 1, width)
    images[3] = targets[3] + 0.1 * noise(3, height, width, seed=2)
    return images, targets


def unit(images):
    """The pixels as float64 arrays of [height, width, 3] in [0, 1]."""
    return ((images.double().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


def windows(x, size):
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))


def reference_ssim(a, b, window, data_range, correction=1.0):
    """Luminance and contrast of every place where the window fits, in float64 and by its definition."""
    size = len(window)
    mean_a, mean_b = ((windows(x, size) * window).sum((-2, -1)) for x in (a, b))
    centred_a = windows(a, size) - mean_a[..., None, None]
    centred_b = windows(b, size) - mean_b[..., None, None]
    var_a, var_b = ((x * x * window).sum((-2, -1)) * correction for x in (centred_a, centred_b))
    covariance = (centred_a * centred_b * window).sum((-2, -1)) * correction
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)


def gaussian():
    weights = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    return np.outer(weights, weights) / weights.sum() ** 2


def test_psnr_is_ten_logarithms_of_the_mean_square():
    images, targets = pairs(20, 31)
    expected = [10 * np.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(unit(images), unit(targets), strict=True)]
    np.testing.assert_allclose(psnr(images, targets), expected, atol=1e-4)
    if HAS_SKIMAGE:
        from skimage.metrics import peak_signal_noise_ratio

        theirs = [peak_signal_noise_ratio(b, a, data_range=1) for a, b in zip(unit(images), unit(targets), strict=True)]
        np.testing.assert_allclose(psnr(images, targets), theirs, atol=1e-4)


def test_ssim_is_its_definition_in_numpy():
    images, targets = pairs(20, 31)
    expected = [
        np.mean(np.prod(reference_ssim(a, b, gaussian(), 1.0), 0))
        for a, b in zip(unit(images), unit(targets), strict=True)
    ]
    np.testing.assert_allclose(ssim(images, targets), expected, atol=2e-5)
    if HAS_SKIMAGE:
        from skimage.metrics import structural_similarity

        options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        theirs = [
            structural_similarity(a, b, channel_axis=-1, **options)
            for a, b in zip(unit(images), unit(targets), strict=True)
        ]
        np.testing.assert_allclose(ssim(images, targets), theirs, atol=2e-5)


def test_legacy_ssim_is_that_of_earlier_tokenizers():
    images, targets = pairs(20, 31)
    uniform = np.full((7, 7), 1 / 49)
    expected = [
        np.mean(np.prod(reference_ssim(a, b, uniform, 2.0, correction=49 / 48), 0))
        for a, b in zip(unit(images), unit(targets), strict=True)
    ]
    np.testing.assert_allclose(legacy_ssim(images, targets), expected, atol=2e-5)
    if HAS_SKIMAGE:
        from skimage.metrics import structural_similarity

        theirs = [
            structural_similarity(a, b, data_range=2.0, channel_axis=-1)
            for a, b in zip(unit(images), unit(targets), strict=True)
        ]
        np.testing.assert_allclose(legacy_ssim(images, targets), theirs, atol=2e-5)


def test_legacy_ssim_is_inflated():
    images, targets = (0.2 * x for x in pairs(24, 24))  # of little contrast, where the constants weigh most
    assert (legacy_ssim(images, targets) > ssim(images, targets) + torch.tensor([0.2, 0.005, 0.2, 0.01])).all()


def by_torchmetrics(a, b):
    """MS-SSIM of torchmetrics' SSIM of each scale, without the border that its own MS-SSIM keeps at the last one."""
    result = 1.0
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        options = {"data_range": 1.0, "reduction": "none"}
        _, contrast = structural_similarity_index_measure(a, b, return_contrast_sensitivity=True, **options)
        result *= contrast.clamp(min=0) ** weight
        a, b = torch.nn.functional.avg_pool2d(a, 2), torch.nn.functional.avg_pool2d(b, 2)
    _, whole = structural_similarity_index_measure(a, b, return_full_image=True, **options)
    return result * whole[..., 5:-5, 5:-5].mean((1, 2, 3)).clamp(min=0) ** 0.1333


@pytest.mark.parametrize("size", [(176, 176), (181, 240)])
def test_ms_ssim_is_that_of_torchmetrics(size):
    images, targets = pairs(*size)
    a, b = ((x.double().clamp(-1, 1) + 1) / 2 for x in (images, targets))
    found = ms_ssim(images, targets)
    assert found.dtype == torch.float32
    assert found[2] < found[1] < 1
    torch.testing.assert_close(found.double(), by_torchmetrics(a, b), atol=2e-5, rtol=0)
    kept = multiscale_structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", normalize="relu")
    torch.testing.assert_close(found.double(), kept, atol=2e-3, rtol=0)


def test_ms_ssim_of_flat_pictures_is_the_luminance_term_to_its_weight():
    expected = ((2 * 0.5 + 1e-4) / (1 + 0.25 + 1e-4)) ** 0.1333
    found = ms_ssim(torch.ones(1, 3, 176, 176), torch.zeros(1, 3, 176, 176))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-4, rtol=0)


def test_ms_ssim_is_one_for_equals_and_zero_for_the_negative():
    targets = noise(1, 3, 176, 176)
    torch.testing.assert_close(ms_ssim(targets, targets), torch.ones(1))
    assert ms_ssim(-targets, targets).item() == 0
    torch.testing.assert_close(ms_ssim(3 * targets.sign(), targets.sign()), torch.ones(1))


def test_low_precision_is_computed_in_float32():
    images, targets = (x.bfloat16() for x in pairs(176, 176))
    for figure in (ms_ssim, legacy_ssim):
        assert torch.equal(figure(images, targets), figure(images.float(), targets.float()))


def test_small_pictures_are_refused():
    with pytest.raises(InputError, match="images are 175x300 px, expected at least 176 px a side for MS-SSIM"):
        ms_ssim(noise(1, 3, 175, 300), noise(1, 3, 175, 300))
    with pytest.raises(InputError, match="images are 32x6 px, expected at least 7 px a side for SSIM"):
        legacy_ssim(noise(1, 3, 32, 6), noise(1, 3, 32, 6))


def test_bits_per_pixel_of_continuous_tokens_and_of_codes():
    assert bits_per_pixel(256, 256, num_latent_tokens=64, bits_per_token=32 * 16.0) == 0.5
    assert bits_per_pixel(256, 256, 256, math.log2(16384)) == pytest.approx(256 * 14 / 65536)
    assert 24 / bits_per_pixel(512, 384, 64, 32 * 16.0) == compression_ratio(512, 384, 64, 32)


@pytest.mark.parametrize("arguments", [(0, 8, 1, 1.0), (8, 8, 0, 1.0), (8, 8, 1, 0.0), (8, 8, 1, math.nan)])
def test_bits_per_pixel_of_nothing_are_refused(arguments):
    with pytest.raises(InputError, match="expected numbers above 0"):
        bits_per_pixel(*arguments)
