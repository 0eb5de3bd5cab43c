"""Pictures to latents where torchvision and `datasets` have them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.data.images import center_crop, read_image, to_tensor, upright_rgb
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["ToTokens", "tokenize_images"]

MAX_VALUE = 2.0  # a resize overshoots [-1, 1] a little; values from 0 to 255 are far outside


class ToTokens:
    """A picture to its latents, as the last transform of a `torchvision.transforms.v2.Compose`.

    In a `DataLoader` with workers the tokenizer has to be on the CPU, and each worker takes a thread; on a GPU tokenize
    whole batches instead, with `ImageTokenizer.encode` or `softvq cache-latents`.

    Args:
        tokenizer: In evaluation mode.
    """

    def __init__(self, tokenizer: ImageTokenizer) -> None:
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, picture: Image.Image | Tensor) -> Float[Tensor, "*batch token dim"]:
        """Return normalised latents.

        Args:
            picture: A PIL image, made upright RGB and cut to the model's square as files are everywhere in softvq; RGB
                uint8 from 0 to 255, `[3, height, width]` or a batch, cut like it; or floats from -1 to 1 of the
                model's size.

        Returns:
            `[token, dim]`, or a batch of them, float32, on the tokenizer's device.

        Raises:
            InputError: If the picture is none of these.
        """
        images = _as_images(picture, self.tokenizer.config.image_size)
        latents = self.tokenizer.encode(images.to(self.tokenizer.latent_mean.device))
        return latents if isinstance(picture, Tensor) and picture.ndim == 4 else latents[0]


def tokenize_images(
    tokenizer: ImageTokenizer, column: str = "image"
) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, Any]]:
    """Return a function for `datasets.Dataset.map(..., batched=True)` that adds a column `latents`.

    Args:
        tokenizer: In evaluation mode.
        column: Of the pictures, as `datasets.Image` gives them: PIL images, or undecoded with their bytes.

    Returns:
        A function of a batch of rows; latents are float16, `[token][dim]` for each row.
    """
    # not a function made here: `datasets` takes a fingerprint of what it is given, which is slow of such
    return functools.partial(_tokenized, tokenizer, column)


@torch.no_grad()
def _tokenized(tokenizer: ImageTokenizer, column: str, rows: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    if column not in rows:
        raise InputError(f"there is no column {column!r}, only {', '.join(rows)}; name that of the pictures")
    pictures, size = rows[column], tokenizer.config.image_size
    if pictures is None or isinstance(pictures, Image.Image | Mapping):
        raise InputError(f"column {column!r} came as a single row; call map with batched=True")
    images = [_as_images(each, size, f"column {column!r}, row {row} of a batch") for row, each in enumerate(pictures)]
    latents = tokenizer.encode(torch.cat(images).to(tokenizer.latent_mean.device))
    return {"latents": latents.half().cpu().numpy()}


def _as_images(picture: object, size: int, name: str = "picture") -> Float[Tensor, "batch 3 height width"]:
    if isinstance(picture, Mapping) and isinstance(picture.get("bytes"), bytes):
        picture = read_image(picture["bytes"], name=name)
    if picture is None or isinstance(picture, Mapping):  # a path would let a table name any file of this machine
        raise InputError(f"{name}: holds no picture; leave such rows out, or cast the column to datasets.Image()")
    if isinstance(picture, Image.Image):
        return to_tensor(center_crop(upright_rgb(picture, name), size))[None]
    if not isinstance(picture, Tensor) or picture.ndim not in (3, 4) or picture.shape[-3] != 3 or not picture.numel():
        kind = f"a tensor {list(picture.shape)}" if isinstance(picture, Tensor) else f"of type {type(picture).__name__}"
        raise InputError(f"{name}: is {kind}, expected a PIL image, or one [3, height, width] or a batch")
    images = picture if picture.ndim == 4 else picture[None]
    if images.dtype == torch.uint8:
        whole = [Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()) for image in images]
        return torch.stack([to_tensor(center_crop(image, size)) for image in whole])
    if not images.is_floating_point():
        raise InputError(f"{name}: is {images.dtype}, expected uint8 from 0 to 255 or floats from -1 to 1")
    if images.shape[2:] != (size, size):
        given = f"{images.shape[2]}x{images.shape[3]}"
        raise InputError(f"{name}: floats are {given}, expected {size}x{size}; only PIL images and uint8 are cut to it")
    if not images.abs().amax() <= MAX_VALUE:
        largest = f"{float(images.abs().amax()):g}"
        raise InputError(
            f"{name}: floats reach {largest}, expected -1 to 1; uint8 tensors need no change, and "
            "v2.ToDtype(torch.float32, scale=True) with v2.Normalize([0.5], [0.5]) after it makes others so"
        )
    return images
