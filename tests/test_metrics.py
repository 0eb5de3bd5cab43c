import math

import pytest
import torch
import torch.nn.functional as F

from softvq.errors import InputError
from softvq.evaluation.metrics import compression_ratio, mean_colour_psnr, psnr, ssim
from softvq.randomness import generator


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "test")) * 2 - 1


def independent_ssim(a, b):
    """Wang et al. 2004 in float64 on [0, 1]: an 11x11 Gaussian of deviation 1.5, only where it fits whole."""
    a, b = ((x.double() + 1) / 2 for x in (a, b))
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    gauss = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = torch.outer(gauss, gauss) / gauss.sum() ** 2

    def local(x):
        patches = F.unfold(x.flatten(0, 1)[:, None], 11)  # [batch * channel, 121, places]
        return torch.einsum("npq,p->nq", patches, window.flatten())

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).mean(1).view(len(a), 3).mean(1).float()


@pytest.mark.parametrize(("difference", "decibels"), [(2.0, 0.0), (0.2, 20.0), (0.02, 40.0), (1.0, 6.0206)])
def test_psnr_of_a_constant_difference(difference, decibels):
    targets = torch.full((2, 3, 5, 7), -1.0)
    torch.testing.assert_close(psnr(targets + difference, targets), torch.full((2,), decibels), atol=1e-3, rtol=0)


def test_psnr_is_of_each_picture_and_infinite_for_equal_ones():
    targets = torch.zeros(2, 3, 4, 4)
    images = targets.clone()
    images[1] = 0.2
    found = psnr(images, targets)
    assert found[0] == math.inf
    assert found[1].item() == pytest.approx(20.0, abs=1e-4)


def test_psnr_clamps_what_cannot_be_shown():
    targets = torch.ones(1, 3, 4, 4)
    assert psnr(targets + 3, targets).item() == math.inf
    torch.testing.assert_close(psnr(targets - 9, targets), torch.zeros(1))


def test_psnr_of_low_precision_is_computed_in_float32():
    images, targets = noise(1, 3, 32, 32).bfloat16(), noise(1, 3, 32, 32, seed=1).bfloat16()
    assert torch.equal(psnr(images, targets), psnr(images.float(), targets.float()))


def test_mean_colour_psnr_closed_form():
    # Half a picture at -0.5 and half at 0.5: the mean colour is 0.5 off everywhere, 10 log10(4 / 0.25).
    targets = torch.full((1, 3, 4, 6), -0.5)
    targets[..., 3:] = 0.5
    torch.testing.assert_close(mean_colour_psnr(targets), torch.tensor([12.0412]), atol=1e-3, rtol=0)


def test_mean_colour_psnr_takes_the_mean_of_each_channel():
    assert mean_colour_psnr(torch.tensor([-0.5, 0.0, 0.5]).view(1, 3, 1, 1).expand(1, 3, 4, 4)).item() > 100


@pytest.mark.parametrize("size", [(11, 11), (24, 37)])
def test_ssim_against_an_independent_computation(size):
    images, targets = noise(3, 3, *size), noise(3, 3, *size, seed=1)
    images[1] = 0.8 * targets[1] + 0.1
    images[2] = targets[2].roll(1, -1)
    torch.testing.assert_close(ssim(images, targets), independent_ssim(images, targets), atol=1e-5, rtol=0)


def test_ssim_of_one_picture_keeps_the_batch():
    images, targets = noise(1, 3, 16, 16), noise(1, 3, 16, 16, seed=1)
    assert ssim(images, targets).shape == (1,)


def test_ssim_of_flat_grey_is_the_luminance_term_on_unit_range():
    # On [0, 1] white is 1 and middle grey 0.5; on [-1, 1] grey would be 0 and the figure quite another.
    expected = (2 * 0.5 + 1e-4) / (1 + 0.25 + 1e-4)
    found = ssim(torch.ones(1, 3, 12, 12), torch.zeros(1, 3, 12, 12))
    torch.testing.assert_close(found, torch.tensor([expected]), atol=1e-5, rtol=0)


def test_ssim_is_one_for_equal_pictures_and_clamps():
    targets = noise(2, 3, 16, 16)
    torch.testing.assert_close(ssim(targets, targets), torch.ones(2))
    beyond = targets.sign()
    torch.testing.assert_close(ssim(3 * beyond, beyond), torch.ones(2))


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(InputError, match="images are 10x32 px, expected at least 11 px"):
        ssim(noise(1, 3, 10, 32), noise(1, 3, 10, 32))


@pytest.mark.parametrize(
    ("arguments", "ratio"), [((256, 256, 64, 32), 48.0), ((256, 256, 32, 64), 48.0), ((512, 384, 64, 32), 144.0)]
)
def test_compression_ratio_counts_bytes(arguments, ratio):
    assert compression_ratio(*arguments) == ratio
    assert compression_ratio(*arguments, bytes_per_value=4) == ratio / 2
