"""Photographs to 32 or 64 continuous tokens and back.

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
    from softvq.data.images import load_image, save_image
    from softvq.errors import InputError, Interrupted, RunError
    from softvq.tokenizers.autoencoder import ImageTokenizer, TokenizerConfig, TokenizerOutput
    from softvq.tokenizers.presets import PRESETS, preset
    from softvq.tokenizers.quantizers import KLConfig, NoneConfig, SoftVQConfig, VQConfig

__version__ = "0.1.0"

_HOMES = {
    "ImageTokenizer": "softvq.tokenizers.autoencoder",
    "InputError": "softvq.errors",
    "Interrupted": "softvq.errors",
    "KLConfig": "softvq.tokenizers.quantizers",
    "NoneConfig": "softvq.tokenizers.quantizers",
    "PRESETS": "softvq.tokenizers.presets",
    "RunError": "softvq.errors",
    "SoftVQConfig": "softvq.tokenizers.quantizers",
    "TokenizerConfig": "softvq.tokenizers.autoencoder",
    "TokenizerOutput": "softvq.tokenizers.autoencoder",
    "VQConfig": "softvq.tokenizers.quantizers",
    "load_image": "softvq.data.images",
    "preset": "softvq.tokenizers.presets",
    "save_image": "softvq.data.images",
}

__all__ = [
    "PRESETS",
    "ImageTokenizer",
    "InputError",
    "Interrupted",
    "KLConfig",
    "NoneConfig",
    "RunError",
    "SoftVQConfig",
    "TokenizerConfig",
    "TokenizerOutput",
    "VQConfig",
    "load_image",
    "preset",
    "save_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'softvq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
