"""Stacks of transformer blocks, computed with few passes over memory between their matrix products."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from softvq.generators.transformer import ModulatedBlock
from softvq.inference.rows import FP8, FP8_MAX, FP8_TINY, Activation, Rows, activate, add_norm, attend

__all__ = ["FusedBlocks", "Product"]

Modulation = tuple[Tensor, Tensor, Tensor]
"""Scale, shift and gate of one branch, `[batch, width]` each."""


@dataclasses.dataclass(frozen=True, slots=True)
class Product:
    """A linear layer whose weights were rounded once."""

    weight: Tensor
    """`[out, in]`, bfloat16 or float8."""
    scales: Tensor | None
    """By what each row of float8 weights is to be multiplied, `[1, out]`."""
    bias: Tensor | None
    """`[out]`, bfloat16."""

    @classmethod
    def of(cls, layer: nn.Linear, dtype: torch.dtype) -> "Product":
        """Round the weights of a layer, to bfloat16, or to float8 with a scale for each output."""
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach().to(torch.bfloat16)
        if dtype != FP8:
            return cls(weight.to(dtype), None, bias)
        scales = weight.float().abs().amax(dim=1).clamp(min=FP8_TINY) / FP8_MAX
        return cls((weight.float() / scales[:, None]).to(FP8), scales[None].contiguous(), bias)

    def __call__(self, rows: Rows) -> Float[Tensor, "row out"]:
        """Return the product in bfloat16."""
        values, scales = rows
        if self.scales is None or scales is None:
            return F.linear(values, self.weight, self.bias)
        if not values.is_cuda:
            found = (values.float() * scales) @ (self.weight.float() * self.scales.mT).mT
            return (found if self.bias is None else found + self.bias).to(torch.bfloat16)
        by_row = F.ScalingType.RowWise
        return F.scaled_mm(
            values, self.weight.mT, scales, by_row, self.scales, by_row,
            bias=self.bias, output_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    def activated(self, rows: Rows, kind: Activation, dtype: torch.dtype) -> Rows:
        """Return the activation of the product."""
        if kind == "gelu_tanh" and dtype != FP8 and rows[0].is_cuda and self.bias is not None:
            # cuBLAS has this one at the end of its product, which saves two passes over the widest tensor there is
            return torch._addmm_activation(self.bias, rows[0], self.weight.mT, use_gelu=True), None
        return activate(self(rows), kind, dtype)


class FusedBlocks:
    """Computes what a stack of blocks computes, its products in bfloat16 or float8.

    The residual stream is float32 between products of bfloat16; beside the rounding to float8 bfloat16 is enough.

    Args:
        blocks: Of a generator's transformer or of a ViT, in evaluation mode.
        precision: Of weights and of what they are multiplied with.
    """

    def __init__(self, blocks: Iterable[nn.Module], precision: Literal["bf16", "fp8"]) -> None:
        self._dtype = FP8 if precision == "fp8" else torch.bfloat16
        self._blocks = [_Fused(block, self._dtype) for block in blocks]

    def __call__(
        self, tokens: Float[Tensor, "batch token width"], vector: Float[Tensor, "batch width"] | None = None
    ) -> Float[Tensor, "batch token width"]:
        """Return the tokens, changed.

        Args:
            tokens: As the first block takes them.
            vector: As `ModulatedBlock` takes it; none for a ViT.

        Returns:
            What the last block returns, of the type of `tokens`.
        """
        batch, count, width = tokens.shape
        kind = torch.bfloat16 if self._dtype == FP8 else torch.float32
        stream, update, mine = tokens.to(kind).reshape(-1, width), None, False
        for block in self._blocks:
            how: Any = {"plus": block.plus, "eps": block.eps, "dtype": self._dtype}
            first, second = block.modulations(batch, vector)
            stream, rows = add_norm(stream, update, first[:2], **how, in_place=mine)
            assert rows is not None
            mine = mine or update is not None
            update = block.attend(rows, count, self._dtype), first[2]
            stream, rows = add_norm(stream, update, second[:2], **how, in_place=mine)
            assert rows is not None
            update, mine = (block.fc2(block.fc1.activated(rows, block.kind, self._dtype)), second[2]), True
        stream, _ = add_norm(stream, update, None, plus=0.0, eps=0.0, dtype=self._dtype, in_place=mine)
        return stream.view(batch, count, width).to(tokens.dtype)


class _Fused:
    """One block's products and where its modulations come from."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, ModulatedBlock | Block)
        attn: Any = block.attn
        mlp: Any = block.mlp
        norms: tuple[Any, Any] = (block.norm1, block.norm2)
        self.qkv, self.proj = Product.of(attn.qkv, dtype), Product.of(attn.proj, dtype)
        self.fc1, self.fc2 = Product.of(mlp.fc1, dtype), Product.of(mlp.fc2, dtype)
        self.heads: int = attn.num_heads
        self.norms = None if isinstance(attn.q_norm, nn.Identity) else (attn.q_norm, attn.k_norm)
        self.kind: Activation = "gelu_tanh" if mlp.act.approximate == "tanh" else "gelu"
        self.eps: float = norms[0].eps
        self.modulation: nn.Module | None = None
        self.plus, self.fixed = 1.0, []
        if isinstance(block, ModulatedBlock):
            self.modulation = block.modulation
            return
        scales: tuple[Any, Any] = (block.ls1, block.ls2)
        self.plus = 0.0
        self.fixed = [
            (n.weight.detach(), n.bias.detach(), s.gamma.detach()) for n, s in zip(norms, scales, strict=True)
        ]

    def modulations(self, batch: int, vector: Tensor | None) -> list[Modulation]:
        """Return scale, shift and gate of both branches, by image."""
        if self.modulation is None:
            return [(a.expand(batch, -1), b.expand(batch, -1), c.expand(batch, -1)) for a, b, c in self.fixed]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector).chunk(6, dim=-1)
        return [(scale1, shift1, gate1), (scale2, shift2, gate2)]

    def attend(self, rows: Rows, count: int, dtype: torch.dtype) -> Tensor:
        """Return what the attention adds before its gate."""
        packed = self.qkv(rows)
        if self.norms is not None:
            *both, values = packed.unflatten(1, (3, self.heads, -1)).unbind(1)
            normed = [norm(one).to(values.dtype) for norm, one in zip(self.norms, both, strict=True)]
            packed = torch.stack([*normed, values], dim=1).flatten(1)
        return self.proj(activate(attend(packed, count, self.heads), "none", dtype))
