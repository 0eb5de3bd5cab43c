"""Numbers that say how near a reconstruction is to its photograph, and how small the latents are."""

import torch
from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError

__all__ = ["compression_ratio", "mean_colour_psnr", "psnr", "ssim"]

SSIM_WINDOW_PX = 11


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

    if min(images.shape[2:]) < SSIM_WINDOW_PX:
        size = "x".join(map(str, images.shape[2:]))
        raise InputError(f"images are {size} px, expected at least {SSIM_WINDOW_PX} px a side for SSIM")
    a, b = (_clamped(images) + 1) / 2, (_clamped(targets) + 1) / 2
    _, everywhere = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none", return_full_image=True)
    assert isinstance(everywhere, Tensor)
    border = SSIM_WINDOW_PX // 2
    return everywhere[..., border:-border, border:-border].mean((1, 2, 3))


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


def _clamped(images: Tensor) -> Tensor:
    return images.detach().float().clamp(-1.0, 1.0)
