"""Named architectures: the paper's sizes and token counts, and tiny ones for tests and small machines."""

import dataclasses
import re

from softvq.errors import InputError
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.quantizers import SoftVQConfig
from softvq.tokenizers.vit import ViTConfig

__all__ = ["PRESETS", "preset"]

VITS = {
    "tiny": ViTConfig(width=192, depth=3, num_heads=3),
    "s": ViTConfig(width=384, depth=12, num_heads=6),
    "b": ViTConfig(width=768, depth=12, num_heads=12),
    "l": ViTConfig(width=1024, depth=24, num_heads=16),
}
PRETRAINED = {
    "s": "vit_small_patch14_dinov2.lvd142m",
    "b": "vit_base_patch14_dinov2.lvd142m",
    "l": "vit_large_patch14_dinov2.lvd142m",
}
"""What training starts an encoder from, as in the paper; if it cannot be had, at random, and training says so."""

SIZES = {"tiny": ("tiny", "tiny"), "s": ("s", "s"), "b": ("b", "b"), "bl": ("b", "l"), "l": ("l", "l")}
"""Encoder and decoder of each size (arXiv:2412.10958: S 45 M, B 173 M, BL 391 M, L 608 M parameters)."""

TOKENS = {"tiny": (16, 32, 64), "s": (32, 64, 128), "b": (32, 64, 128), "bl": (32, 64, 128), "l": (32, 64, 128)}
LATENT_CHANNELS = {"tiny": 512}
"""Tokens times channels of an image; 2048 but for the sizes named here."""

PRESETS = tuple(f"softvq-{size}-{tokens}" for size in SIZES for tokens in TOKENS[size])


def preset(name: str, *, image_size: int = 256) -> TokenizerConfig:
    """Return the architecture called `name`, one of `PRESETS`, for example `softvq-b-64`.

    Args:
        name: `softvq-SIZE-TOKENS`. S, B, BL and L are the paper's: tokens x channels = 2048, four codebooks of 8192.
        image_size: Side in pixels, a multiple of 16 (of 8 for tiny); the paper has 256 and 512.

    Returns:
        The config, to build or to change with `dataclasses.replace`.

    Raises:
        InputError: If there is no such preset.
    """
    match = re.fullmatch(r"softvq-([a-z]+)-(\d+)", name)
    if match is None or name not in PRESETS:
        raise InputError(f"preset is {name!r}, expected one of {', '.join(PRESETS)}")
    size, tokens = match[1], int(match[2])
    encoder, decoder = SIZES[size]
    tiny = size == "tiny"
    return TokenizerConfig(
        encoder=dataclasses.replace(VITS[encoder], pretrained=PRETRAINED.get(encoder)),
        decoder=VITS[decoder],
        num_latent_tokens=tokens,
        latent_dim=LATENT_CHANNELS.get(size, 2048) // tokens,
        quantizer=SoftVQConfig(codebook_size=1024, num_codebooks=4) if tiny else SoftVQConfig(),
        image_size=image_size,
        patch_size=8 if tiny else 16,
    )
