"""What a discriminator sees instead of the pictures themselves: changed at random, in ways gradients pass through.

Differentiable augmentation (DiffAugment, arXiv:2006.10738) and the view of a picture larger than the discriminator's
input. Every draw belongs to its sample's key, so that a picture is changed alike on any rank and in any batch.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.randomness import fold_in, uniform

__all__ = ["augment", "crop", "view"]

VIEW = 3  # the stream of a sample's key that `view` draws from


def augment(
    images: Float[Tensor, "batch 3 height width"],
    keys: Int64[Tensor, " batch"],
    *,
    color: bool = True,
    translation: float = 0.125,
    cutout: float = 0.5,
    probability: float = 1.0,
) -> Float[Tensor, "batch 3 height width"]:
    """Change colours, shift, and blank a square, each in a random `probability` of the samples (arXiv:2006.10738).

    Colour: a summand in (-0.5, 0.5), then a factor in (0, 2) of the distance of every pixel to its grey, then one in
    (0.5, 1.5) of the distance of every value to the picture's mean. The result may leave [-1, 1].

    Args:
        images: RGB in [-1, 1], 0 being grey.
        keys: One for each sample; the same key makes the same change, which is what pairs of pictures want.
        color: Change brightness, saturation and contrast.
        translation: Largest shift in whole pixels as a share of the side, 0 to 1; what comes in is grey. 0 leaves it
            out. The paper has 0.125.
        cutout: Side of the square made grey as a share of the picture's, 0 to 1. Its centre lies anywhere in the
            picture, so that a part of it may fall outside. 0 leaves it out. The paper has 0.5.
        probability: Of each of the three to happen to a sample, 0 to 1.

    Returns:
        Pictures of the same shape and type; samples to which nothing happens are bitwise what they were.

    Raises:
        InputError: If a share or the probability is outside [0, 1].
    """
    for name, value in {"translation": translation, "cutout": cutout, "probability": probability}.items():
        if not 0 <= value <= 1:
            raise InputError(f"{name} is {value}, expected 0 to 1")
    draws = uniform(keys, 10)
    if color:
        images = _color(images, draws[:, :4], probability)
    if translation > 0:
        images = _translate(images, draws[:, 4:7], translation, probability)
    if cutout > 0:
        images = _cut_out(images, draws[:, 7:], cutout, probability)
    return images


def view(
    images: Float[Tensor, "batch 3 height width"], keys: Int64[Tensor, " batch"], size: int
) -> Float[Tensor, "batch 3 size size"]:
    """Fit pictures to `size`: larger ones by the toss of a coin cropped at random or shrunk, smaller ones enlarged.

    A crop shows the texture as it is, the shrunken picture shows the whole.

    Args:
        images: RGB in any range.
        keys: One for each sample; the same key makes the same choice.
        size: Side of the result in pixels, >= 1.

    Returns:
        Pictures of the same type: as they are where they already fit; where no side is below `size`, each with
        probability 1/2 a crop or the average over areas; else interpolated linearly, with both sides on their own.
    """
    height, width = images.shape[2:]
    if height == width == size:
        return images
    if min(height, width) < size:
        return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    draws = uniform(fold_in(keys, VIEW), 3)
    whole = F.interpolate(images, size=(size, size), mode="area")
    return torch.where(_per_sample(draws[:, 0] < 0.5), _window(images, draws[:, 1:], size), whole)


def crop(
    images: Float[Tensor, "batch 3 height width"], keys: Int64[Tensor, " batch"], size: int
) -> Float[Tensor, "batch 3 size size"]:
    """Cut a square out of each picture, anywhere in it alike.

    Args:
        images: RGB in any range, no side below `size`.
        keys: One for each sample; the same key makes the same choice.
        size: Side of the squares in pixels, >= 1.

    Returns:
        Pixels as they are.
    """
    return _window(images, uniform(fold_in(keys, VIEW), 2), size)


def _window(images: Tensor, draws: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    window = torch.arange(size, device=images.device)
    rows = _integer(draws[:, 0], height - size + 1)[:, None] + window
    columns = _integer(draws[:, 1], width - size + 1)[:, None] + window
    return _gather(images, rows, columns)


def _color(images: Tensor, draws: Tensor, probability: float) -> Tensor:
    brightness, saturation, contrast = (_per_sample(draws[:, i]) for i in range(1, 4))
    changed = images.float() + (brightness - 0.5)
    grey = changed.mean(dim=1, keepdim=True)
    changed = grey + 2 * saturation * (changed - grey)
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = mean + (0.5 + contrast) * (changed - mean)
    return torch.where(_per_sample(draws[:, 0] < probability), changed.to(images.dtype), images)


def _translate(images: Tensor, draws: Tensor, share: float, probability: float) -> Tensor:
    height, width = images.shape[2:]
    moved = draws[:, 0] < probability
    rows = _sources(draws[:, 1], moved, height, round(share * height))
    columns = _sources(draws[:, 2], moved, width, round(share * width))
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    # taken modulo the size they are a permutation: in the gradient no two values are added, in whatever order
    return torch.where(inside, _gather(images, rows % height, columns % width), 0)


def _sources(draws: Tensor, moved: Tensor, size: int, largest: int) -> Tensor:
    """Return which pixel comes to each place, [batch, size]; some lie outside."""
    shift = torch.where(moved, _integer(draws, 2 * largest + 1) - largest, 0)
    return torch.arange(size, device=draws.device) - shift[:, None]


def _cut_out(images: Tensor, draws: Tensor, share: float, probability: float) -> Tensor:
    height, width = images.shape[2:]
    rows = _covered(draws[:, 1], height, round(share * height))
    columns = _covered(draws[:, 2], width, round(share * width))
    square = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(square & _per_sample(draws[:, 0] < probability), 0, images)


def _covered(draws: Tensor, size: int, side: int) -> Tensor:
    """Return which places a side of the square covers, [batch, size]; its centre is a pixel or an edge of one."""
    start = _integer(draws, size + 1 - side % 2) - side // 2
    places = torch.arange(size, device=draws.device) - start[:, None]
    return (places >= 0) & (places < side)


def _integer(draws: Tensor, count: int) -> Tensor:
    """Map draws below 1 to 0 ... count - 1, all alike."""
    return (draws * count).long()


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pick rows [batch, h] and columns [batch, w] of every sample."""
    batch, channels, _, width = images.shape
    picked = images.gather(2, rows[:, None, :, None].expand(batch, channels, -1, width))
    return picked.gather(3, columns[:, None, None, :].expand(batch, channels, rows.shape[1], -1))


def _per_sample(values: Tensor) -> Tensor:
    return values[:, None, None, None]
