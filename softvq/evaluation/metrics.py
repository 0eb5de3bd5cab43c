"""Numbers that say how near a reconstruction is to its photograph, and how small the latents are."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError

__all__ = ["bits_per_pixel", "compression_ratio", "legacy_ssim", "mean_colour_psnr", "ms_ssim", "psnr", "ssim"]

SSIM_WINDOW_PX = 11
SSIM_DEVIATION_PX = 1.5
LEGACY_WINDOW_PX = 7
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli and Bovik 2003, table of section 3.3


def psnr(
    images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch"]:
    """Return the peak signal-to-noise ratio of each image, 10 log10(2^2 / mean squared error).

    Args:
        images: RGB; what lies outside [-1, 1] is clamped first, as it is when a picture is shown.
        targets: The same shape.

    Returns:
        Decibels, higher is nearer; infinite where image and target are equal.
    """
    error = (_clamped(images) - _clamped(targets)).square().mean((1, 2, 3))
    return 10 * torch.log10(4.0 / error)


def mean_colour_psnr(targets: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch"]:
    """Return the PSNR of each photograph's mean colour: what a tokenizer that has learned nothing else reaches.

    Args:
        targets: RGB in [-1, 1].

    Returns:
        Decibels; infinite for a picture of one colour.
    """
    targets = _clamped(targets)
    return psnr(targets.mean((2, 3), keepdim=True).expand_as(targets), targets)


def ssim(
    images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch"]:
    """Return the structural similarity of each image: Gaussian window of 11 px and deviation 1.5, mean of the channels.

    It compares mean intensities, so it depends on where black is: the pixels are taken to [0, 1], as is customary. As
    in the original definition only windows that lie whole inside the picture count; torchmetrics keeps or drops the
    others depending on its version, so they are dropped here.

    Args:
        images: RGB; what lies outside [-1, 1] is clamped first. Height and width from 11 px.
        targets: The same shape.

    Returns:
        At most 1, which means equal.

    Raises:
        InputError: If the pictures are smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    _check_size(images, SSIM_WINDOW_PX, "SSIM")
    a, b = (_clamped(images) + 1) / 2, (_clamped(targets) + 1) / 2
    _, everywhere = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    assert isinstance(everywhere, Tensor)
    border = SSIM_WINDOW_PX // 2
    return everywhere[..., border:-border, border:-border].mean((1, 2, 3))


def ms_ssim(
    images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch"]:
    """Return the multi-scale structural similarity of each image (Wang, Simoncelli and Bovik 2003), in float32.

        SSIM_5^w_5 prod_(i < 5) contrast_i^w_i,   each scale half as large as the one before (means of 2x2 pixels)

    At each scale it is the mean over the channels and over the windows that lie whole inside the picture. What is below
    0, as contrast of opposite sign is, counts as 0.

    Args:
        images: RGB; what lies outside [-1, 1] is clamped first, and taken to [0, 1]. Height and width from 176 px.
        targets: The same shape.

    Returns:
        0 to 1, which means equal.

    Raises:
        InputError: If the smallest scale would be smaller than the window of 11 px.
    """
    smallest = SSIM_WINDOW_PX * 2 ** (len(SCALE_WEIGHTS) - 1)
    _check_size(images, smallest, "MS-SSIM")
    a, b = (_clamped(images) + 1) / 2, (_clamped(targets) + 1) / 2
    offsets = torch.arange(SSIM_WINDOW_PX, device=a.device) - SSIM_WINDOW_PX // 2
    window = torch.exp(offsets.float().square() / (-2 * SSIM_DEVIATION_PX**2))
    window = window / window.sum()
    result = a.new_ones(len(a))
    for i, weight in enumerate(SCALE_WEIGHTS):
        luminance, contrast = _similarity(a, b, window, data_range=1.0)
        is_last = i == len(SCALE_WEIGHTS) - 1
        found = (luminance * contrast if is_last else contrast).mean((1, 2, 3))
        result = result * found.clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result


def legacy_ssim(
    images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch"]:
    """Return the SSIM that earlier tokenizers published, which is too high: use it only to compare with their tables.

    They take pixels to [0, 1] and then call the range 2, so that the constants which keep the quotients stable are four
    times too large. The window is 7 px square without weights, with the sample covariance (divisor n - 1), as
    scikit-image has it by default.

    Args:
        images: RGB; what lies outside [-1, 1] is clamped first. Height and width from 7 px.
        targets: The same shape.

    Returns:
        At most 1, which means equal; nearly always more than `ssim`.

    Raises:
        InputError: If the pictures are smaller than the window.
    """
    _check_size(images, LEGACY_WINDOW_PX, "SSIM")
    a, b = (_clamped(images) + 1) / 2, (_clamped(targets) + 1) / 2
    window = a.new_full((LEGACY_WINDOW_PX,), 1 / LEGACY_WINDOW_PX)
    places = LEGACY_WINDOW_PX**2
    luminance, contrast = _similarity(a, b, window, data_range=2.0, correction=places / (places - 1))
    return (luminance * contrast).mean((1, 2, 3))


def compression_ratio(
    height: int, width: int, num_latent_tokens: int, latent_dim: int, bytes_per_value: int = 2
) -> float:
    """Return how many times smaller the latents are than the raw RGB bytes: 3 H W / (L d bytes).

    >>> compression_ratio(256, 256, num_latent_tokens=64, latent_dim=32)
    48.0

    Args:
        height: Of the picture in pixels, >= 1.
        width: Of the picture in pixels, >= 1.
        num_latent_tokens: L, >= 1.
        latent_dim: d, values of one token, >= 1.
        bytes_per_value: How a value is stored; 2 is float16. No entropy coding is counted on either side.

    Returns:
        The ratio of bytes; a JPEG of the same picture is itself about 10.
    """
    return 3 * height * width / (num_latent_tokens * latent_dim * bytes_per_value)


def bits_per_pixel(height: int, width: int, num_latent_tokens: int, bits_per_token: float) -> float:
    """Return how many bits of latents there are for each pixel: L bits / (H W).

    >>> bits_per_pixel(256, 256, num_latent_tokens=64, bits_per_token=32 * 16)
    0.5

    Args:
        height: Of the picture in pixels, >= 1.
        width: Of the picture in pixels, >= 1.
        num_latent_tokens: L, >= 1.
        bits_per_token: The dimension times the bits of a value for continuous tokens, log2 of the codebook's size for
            codes, times the codes of a token where there are several. No entropy coding is counted.

    Returns:
        Bits; a raw RGB pixel has 24, so that 24 over this is the ratio of sizes.

    Raises:
        InputError: If a number is not above 0.
    """
    if min(height, width, num_latent_tokens) < 1 or not bits_per_token > 0:
        raise InputError(
            f"height, width, num_latent_tokens and bits_per_token are {height}, {width}, {num_latent_tokens} and "
            f"{bits_per_token}, expected numbers above 0"
        )
    return num_latent_tokens * bits_per_token / (height * width)


def _similarity(
    a: Tensor, b: Tensor, window: Tensor, *, data_range: float, correction: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the luminance and the contrast-structure term of SSIM wherever the separable window fits."""
    mean_a, mean_b, aa, bb, ab = _windowed(torch.stack([a, b, a * a, b * b, a * b]), window)
    variances = correction * (aa - mean_a.square() + bb - mean_b.square())
    covariance = correction * (ab - mean_a * mean_b)
    stable_luminance, stable_contrast = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + stable_luminance) / (mean_a.square() + mean_b.square() + stable_luminance)
    return luminance, (2 * covariance + stable_contrast) / (variances + stable_contrast)


def _windowed(x: Tensor, window: Tensor) -> Tensor:
    """Weigh the neighbours of each place along both sides; a convolution might take float32 for TF32."""
    for side in (-2, -1):
        length = x.shape[side] - len(window) + 1
        total = x.narrow(side, 0, length) * window[0]
        for i in range(1, len(window)):
            total = total.addcmul(x.narrow(side, i, length), window[i])
        x = total
    return x


def _check_size(images: Tensor, smallest: int, figure: str) -> None:
    if min(images.shape[2:]) < smallest:
        size = "x".join(map(str, images.shape[2:]))
        raise InputError(f"images are {size} px, expected at least {smallest} px a side for {figure}")


def _clamped(images: Tensor) -> Tensor:
    return images.detach().float().clamp(-1.0, 1.0)
