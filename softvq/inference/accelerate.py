"""`accelerate`: the fast path of tokenizers and generators on a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.generators.transformer import LatentTransformer
from softvq.inference.blocks import FusedBlocks
from softvq.inference.graphs import Captured
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.vit import ViTEncoder

__all__ = ["accelerate", "fuse"]

ALIGNED = 16
"""What the widths of float8 products are multiples of."""


def accelerate(model: ImageTokenizer | LatentTransformer, precision: Literal["bf16", "fp8"] = "bf16") -> None:
    """Make `encode` and `decode` of a tokenizer, or a generator's transformer, as fast as this GPU can.

    Blocks are computed by `FusedBlocks`, and all is recorded once for each batch size and replayed. Weights are rounded
    as of now: later changes of them are not seen. What is saved stays as it was.

    Args:
        model: On the GPU, in evaluation mode; changed in place. Call it from one thread at a time.
        precision: Of the blocks' products; fp8 rounds weights and activations, with a scale for each row, to 8 bits.

    Raises:
        InputError: If the model is not on a GPU, or one of its widths does not suit fp8.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise InputError(f"the model is on {device}; only on CUDA can it be accelerated, use compile elsewhere")
    fuse(model, precision)
    if isinstance(model, LatentTransformer):
        _put(model, "forward", Captured(model.forward))
        return
    autocast = torch.autocast("cuda", torch.bfloat16)
    _put(model, "encode", Captured(autocast(model.encode)))
    decode = Captured(autocast(model.decode))
    _put(model, "decode", lambda latents, size=None: decode(latents, size))


def fuse(model: ImageTokenizer | LatentTransformer, precision: Literal["bf16", "fp8"]) -> None:
    """Compute the blocks of a model by `FusedBlocks`, on any device, in place.

    Args:
        model: In evaluation mode.
        precision: See `accelerate`.

    Raises:
        InputError: If one of its widths does not suit fp8.
    """
    narrow = [
        size
        for block in model.modules()
        for layer in (block.modules() if hasattr(block, "attn") else ())
        if isinstance(layer, nn.Linear)
        for size in layer.weight.shape
        if size % ALIGNED
    ]
    if precision == "fp8" and narrow:
        raise InputError(f"a block has a width of {narrow[0]}, and fp8 needs multiples of {ALIGNED}; take bf16")
    if isinstance(model, LatentTransformer):
        _put(model, "run_blocks", FusedBlocks(model.blocks, precision))
        return
    for vit in (model.encoder, model.decoder):
        _put(vit.blocks, "forward", FusedBlocks(vit.blocks, precision))
    _put(model.encoder.patch_embed, "forward", partial(_embedded, model.encoder))


def _put(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Put a function in the place of a method of this one module, as `torch.nn.Module.compile` does."""
    setattr(module, name, function)


def _embedded(
    encoder: ViTEncoder, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch patch channel"]:
    """Return the embedded patches: a convolution that skips from patch to patch is a product, and faster as one."""
    size, layer = encoder.patch_size, encoder.patch_embed.proj
    rows, columns = images.shape[2] // size, images.shape[3] // size
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") and images.is_cuda else images.dtype
    patches = images.to(dtype).unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3).flatten(1, 2), layer.weight.flatten(1), layer.bias)
