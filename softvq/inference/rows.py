"""What lies between two matrix products of a transformer, in one pass over memory each; numbers are float32 inside.

On a GPU these are kernels, elsewhere plain torch, which the kernels are tested against.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["FP8", "Activation", "Rows", "activate", "add_norm", "attend"]

FP8 = torch.float8_e4m3fn
FP8_MAX, FP8_TINY = 448.0, 1e-12
SHORT = 64
"""Tokens up to which all of an image's fit into one program, which the library's kernels are too large for."""
Activation = Literal["none", "gelu", "gelu_tanh"]
Rows = tuple[Tensor, Tensor | None]
"""Values `[row, width]`; and of float8 ones, by what each row is to be multiplied, `[row, 1]`."""


def add_norm(
    stream: Float[Tensor, "row width"],
    update: tuple[Float[Tensor, "row width"], Float[Tensor, "batch width"]] | None,
    modulation: tuple[Float[Tensor, "batch width"], Float[Tensor, "batch width"]] | None,
    *,
    plus: float,
    eps: float,
    dtype: torch.dtype,
    in_place: bool,
) -> tuple[Float[Tensor, "row width"], Rows | None]:
    """Add a branch to the residual stream, and normalise the sum for the next branch.

        stream = stream + gate * branch
        rows = layer_norm(stream) * (plus + scale) + shift

    Args:
        stream: Tokens of all images, those of an image one after the other.
        update: A branch and its gate, or nothing to add.
        modulation: Scale and shift; without them nothing is normalised.
        plus: 1 for adaLN, whose scales lie around 0; 0 for a norm's own weights.
        eps: Added to the variance.
        dtype: Of the rows: bfloat16, or float8 with a scale for each row.
        in_place: Whether the sum may overwrite the stream.

    Returns:
        The sum, of the stream's type, and the rows.
    """
    # an image's vectors may lie in a larger matrix, or be the same for all: their stride says so
    batch = modulation[0].shape[0] if modulation is not None else update[1].shape[0] if update is not None else 1
    tokens = stream.shape[0] // batch
    out = stream if in_place or update is None else torch.empty_like(stream)
    if stream.is_cuda:
        from softvq.inference import triton_kernels  # there is no triton without a GPU

        options = {"tokens": tokens, "plus": plus, "eps": eps, "dtype": dtype}
        found = triton_kernels.add_norm(stream, out, update, modulation, **options)
        return out, None if found is None else _rows(found, dtype)
    if update is not None:
        branch, gate = update
        out.copy_(stream.float() + branch.float() * gate.float().repeat_interleave(tokens, dim=0))
    if modulation is None:
        return out, None
    scale, shift = (vectors.float().repeat_interleave(tokens, dim=0) for vectors in modulation)
    return out, _stored(F.layer_norm(out.float(), out.shape[1:], eps=eps) * (plus + scale) + shift, dtype)


def activate(hidden: Float[Tensor, "row width"], kind: Activation, dtype: torch.dtype) -> Rows:
    """Return an activation of each number, in bfloat16 or, with a scale for each row, in float8.

    Args:
        hidden: What a matrix product gave.
        kind: `none` changes nothing but the type.
        dtype: Of the result.

    Returns:
        As many rows.
    """
    if kind == "none" and hidden.dtype == dtype:
        return hidden, None
    if hidden.is_cuda:
        from softvq.inference import triton_kernels

        return _rows(triton_kernels.activate(hidden, kind, dtype), dtype)
    values = hidden.float()
    if kind != "none":
        values = F.gelu(values, approximate="tanh" if kind == "gelu_tanh" else "none")
    return _stored(values, dtype)


def attend(packed: Float[Tensor, "row _three_widths"], tokens: int, heads: int) -> Float[Tensor, "row width"]:
    """Let the tokens of each image attend to one another.

        softmax(queries keys^T / sqrt(dim)) values

    Args:
        packed: Queries, keys and values of all heads, side by side; bfloat16 on a GPU.
        tokens: Of an image.
        heads: How many.

    Returns:
        What each token gathers, heads side by side.
    """
    if packed.is_cuda and tokens <= SHORT:
        from softvq.inference import triton_kernels

        return triton_kernels.attend(packed, tokens, heads)
    queries, keys, values = packed.unflatten(0, (-1, tokens)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(len(packed), -1)


def _rows(found: tuple[Tensor, Tensor], dtype: torch.dtype) -> Rows:
    return found[0], found[1] if dtype == FP8 else None


def _stored(values: Tensor, dtype: torch.dtype) -> Rows:
    if dtype != FP8:
        return values.to(dtype), None
    scales = values.abs().amax(dim=1, keepdim=True).clamp(min=FP8_TINY) / FP8_MAX
    return (values / scales).to(FP8), scales
