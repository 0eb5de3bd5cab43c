"""Pictures as a page takes them: addresses that need no file, differences, errors."""

import base64
import io

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.data.images import to_image

__all__ = ["ERROR_FULL_SCALE", "difference_picture", "error_picture", "picture_address", "thumbnail_address"]

THUMBNAIL_PX = 128
ERROR_FULL_SCALE = 0.25
"""Mean absolute error, as a share of black to white, from which the error map is at its brightest."""
STOPS = torch.tensor(
    [[11, 13, 32], [63, 29, 92], [142, 43, 97], [217, 84, 62], [247, 163, 63], [252, 246, 196]], dtype=torch.float32
)
"""Colours of the error map, evenly from no error on; their lightness rises all the way."""


def picture_address(picture: Float[Tensor, "3 height width"] | Image.Image) -> str:
    """Return a picture in [-1, 1], or an RGB image, as the address of a PNG that is in the address itself."""
    return _address(to_image(picture) if isinstance(picture, Tensor) else picture, "png", compress_level=1)


def thumbnail_address(picture: Float[Tensor, "3 height width"]) -> str:
    """Return a small JPEG of a picture in [-1, 1], 128 px at most, in its address."""
    image = to_image(picture)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return _address(image, "jpeg", quality=85)


def difference_picture(
    image: Float[Tensor, "3 height width"], target: Float[Tensor, "3 height width"]
) -> Float[Tensor, "3 height width"]:
    """Return image minus target, in [-1, 1] with grey where they are equal: twice as strong as in the pictures."""
    return (image - target).clamp(-1, 1)


def error_picture(image: Float[Tensor, "3 height width"], target: Float[Tensor, "3 height width"]) -> Image.Image:
    """Draw the mean over the colours of the absolute error.

    Args:
        image: In [-1, 1].
        target: The same shape.

    Returns:
        An RGB image, dark where they are equal and brightest from `ERROR_FULL_SCALE` on, whatever the picture, so that
        two maps can be compared.
    """
    error = (image - target).abs().mean(0).div(2 * ERROR_FULL_SCALE).clamp(0, 1).cpu()
    place = error * (len(STOPS) - 1)
    low = place.floor().long().clamp(max=len(STOPS) - 2)
    share = (place - low)[..., None]
    colours = STOPS[low] * (1 - share) + STOPS[low + 1] * share
    return Image.fromarray(colours.round().to(torch.uint8).numpy())


def _address(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
