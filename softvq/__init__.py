"""Photographs to 32 to 128 continuous tokens and back.

The names below are looked up when first used, so that `import softvq` is quick and imports no torch.

Shapes in signatures use one word per dimension:

    batch    images, or whatever is processed side by side
    token    latent tokens of one image, L
    dim      numbers in one latent token
    code     codewords of a codebook, K
    channel  colours of an image (3, RGB), or features of a map
    height   rows, in pixels or patches
    width    columns, in pixels or patches
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from softvq.errors import InputError, Interrupted, RunError
    from softvq.generators.generator import LatentGenerator
    from softvq.pipeline import GenerationPipeline
    from softvq.tokenizers.autoencoder import ImageTokenizer, TokenizerOutput
    from softvq.tokenizers.config import TokenizerConfig
    from softvq.tokenizers.presets import PRESETS, preset
    from softvq.tokenizers.quantizers import (
        GMMVQConfig,
        GumbelConfig,
        KLConfig,
        NoneConfig,
        ProductConfig,
        ResidualConfig,
        SoftVQConfig,
        VQConfig,
    )

__version__ = "0.1.0"

_HOMES = {
    "LatentGenerator": "softvq.generators.generator",
    "GenerationPipeline": "softvq.pipeline",
    "ResidualConfig": "softvq.tokenizers.quantizers",
    "ProductConfig": "softvq.tokenizers.quantizers",
    "GumbelConfig": "softvq.tokenizers.quantizers",
    "GMMVQConfig": "softvq.tokenizers.quantizers",
    "ImageTokenizer": "softvq.tokenizers.autoencoder",
    "InputError": "softvq.errors",
    "Interrupted": "softvq.errors",
    "KLConfig": "softvq.tokenizers.quantizers",
    "NoneConfig": "softvq.tokenizers.quantizers",
    "PRESETS": "softvq.tokenizers.presets",
    "RunError": "softvq.errors",
    "SoftVQConfig": "softvq.tokenizers.quantizers",
    "TokenizerConfig": "softvq.tokenizers.config",
    "TokenizerOutput": "softvq.tokenizers.autoencoder",
    "VQConfig": "softvq.tokenizers.quantizers",
    "preset": "softvq.tokenizers.presets",
}

__all__ = [
    "PRESETS",
    "GMMVQConfig",
    "GenerationPipeline",
    "GumbelConfig",
    "ImageTokenizer",
    "InputError",
    "Interrupted",
    "KLConfig",
    "LatentGenerator",
    "NoneConfig",
    "ProductConfig",
    "ResidualConfig",
    "RunError",
    "SoftVQConfig",
    "TokenizerConfig",
    "TokenizerOutput",
    "VQConfig",
    "load_image",
    "preset",
    "save_image",
]


def load_image(source: "Path | str | bytes", size: int | None = None) -> 'Float[Tensor, "3 height width"]':
    """Read an image file as a tokenizer takes it.

    Args:
        source: A JPEG, PNG or WebP file, or the bytes of one.
        size: Side in pixels of the square to scale to and cut from the middle; None keeps the whole image as it is.

    Returns:
        RGB in [-1, 1]; add the batch with `[None]`.

    Raises:
        InputError: If the image cannot be read.
    """
    from softvq.data.images import center_crop, read_image, to_tensor

    image = read_image(source)
    return to_tensor(image if size is None else center_crop(image, size))


def save_image(image: 'Float[Tensor, "3 height width"]', path: "Path | str") -> None:
    """Write an image to a JPEG, PNG or WebP file atomically.

    Args:
        image: RGB in [-1, 1]; what lies outside is clamped.
        path: The file to make or replace; its suffix decides the format.

    Raises:
        InputError: If the suffix is none of those formats'.
        RunError: If the file cannot be written; what was there before is untouched.
    """
    from softvq.data.images import SUFFIXES, to_image
    from softvq.errors import InputError
    from softvq.files import replacing

    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"the image is {list(image.shape)}, expected [3, height, width]; [0] takes one of a batch")
    if not str(path).lower().endswith(SUFFIXES):
        raise InputError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    with replacing(path) as temporary:
        to_image(image).save(temporary)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softvq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
