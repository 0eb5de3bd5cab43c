"""What each token paints: how pixels change when one token after another is put to its mean."""

import colorsys
from collections.abc import Callable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["owner_picture", "token_attribution", "token_colours", "token_maps"]

GOLDEN_ANGLE = 0.381966  # of the whole circle: numbers that follow one another get hues far apart
SHADES = ((0.55, 1.0), (0.85, 0.95), (0.75, 0.7))  # saturation and value; more than hue tells 64 tokens apart


@torch.inference_mode()
def token_attribution(
    tokenizer: ImageTokenizer,
    latents: Float[Tensor, "batch token dim"],
    baseline: Float[Tensor, "token dim"],
    batch_size: int = 16,
    before_batch: Callable[[], None] = lambda: None,
) -> Float[Tensor, "batch token height width"]:
    """Return how much each token changes each pixel.

    Token t of an image is replaced by `baseline[t]`, all others stay, and what is decoded then is compared with what
    is decoded without. Tokens work together, so the maps of an image need not sum to anything.

    Args:
        tokenizer: In evaluation mode.
        latents: Normalised, all tokens of each image, on the tokenizer's device.
        baseline: What tells nothing about the image, such as the mean of each token over many images.
        batch_size: Images decoded at once, >= 1.
        before_batch: Called before each; what it raises ends the work.

    Returns:
        The mean over the three colours of the absolute change, on the CPU, >= 0, for pixels from -1 to 1: entry
        `[image, token, y, x]` is zero where the decoder does not use the token, and everywhere for a token that
        equals the baseline. Height and width are the config's `image_size`.
    """
    batch, tokens, _ = latents.shape
    whole = torch.cat([tokenizer.decode(part) for part in latents.split(batch_size)])
    maps = []
    for places in torch.arange(batch * tokens, device=latents.device).split(batch_size):
        before_batch()
        image, token = places // tokens, places % tokens
        changed = latents[image]
        changed[torch.arange(len(places), device=latents.device), token] = baseline[token]
        maps.append((tokenizer.decode(changed) - whole[image]).abs().mean(1).float().cpu())
    return torch.cat(maps).unflatten(0, (batch, tokens))


def token_colours(count: int) -> Float[Tensor, "{count} 3"]:
    """Return a colour in [0, 1] for each token, none like its neighbours'."""
    return torch.tensor(
        [colorsys.hsv_to_rgb(i * GOLDEN_ANGLE % 1, *SHADES[i % len(SHADES)]) for i in range(count)]
    ).reshape(count, 3)


def token_maps(attribution: Float[Tensor, "token height width"]) -> list[Image.Image]:
    """Draw a heat map for each token: black where it changes nothing, its colour where it changes most.

    Args:
        attribution: Of one image, as `token_attribution` gives it.

    Returns:
        As many RGB images, each brightest at its own token's largest change, whatever that of others. Brightness goes
        with the square root, so that small changes are seen.
    """
    largest = attribution.amax((1, 2), keepdim=True)
    shares = attribution / torch.where(largest > 0, largest, 1.0)
    return [
        _picture(share.sqrt()[..., None] * colour)
        for share, colour in zip(shares, token_colours(len(shares)), strict=True)
    ]


def owner_picture(attribution: Float[Tensor, "token height width"]) -> Image.Image:
    """Draw each pixel in the colour of the token that changes it most; black where none does.

    Args:
        attribution: Of one image, as `token_attribution` gives it.

    Returns:
        An RGB image of the same height and width.
    """
    most = attribution.max(0)
    return _picture(token_colours(len(attribution))[most.indices] * (most.values > 0)[..., None])


def _picture(colours: Tensor) -> Image.Image:
    return Image.fromarray((255 * colours).round().to(torch.uint8).numpy())
