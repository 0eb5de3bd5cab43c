"""The transformer of DiT and SiT over latent tokens: every block is modulated by time and condition (adaLN-zero).

Two-dimensional latents are tokens too: `patchify_latents` cuts them into patches, and `positions: sine_2d` tells the
transformer where those lie, so that generators on 256 tokens of a grid run in the same code.
"""

import dataclasses
import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.generators.conditioning import Condition

__all__ = [
    "LatentTransformer",
    "ModulatedBlock",
    "TimestepEmbedding",
    "TransformerConfig",
    "modulate",
    "patchify_latents",
    "unpatchify_latents",
]

MAX_PERIOD = 10_000
MAX_WIDTH, MAX_DEPTH = 1 << 16, 1 << 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Size of the transformer, and how it tells tokens apart."""

    kind: Literal["transformer"] = "transformer"
    width: int = 1152
    """Numbers in each token inside."""
    depth: int = 28
    """Blocks."""
    num_heads: int = 16
    """Attention heads; a divisor of `width`."""
    mlp_ratio: float = 4.0
    """Width of the hidden layers of the blocks' MLPs, in widths."""
    positions: Literal["sine", "learned", "sine_2d"] = "sine"
    """Added to the tokens: fixed sines along the sequence, learned vectors, or fixed sines over a square grid."""
    qk_norm: bool = False
    """Normalise queries and keys, which keeps attention tame in long trainings."""

    def __post_init__(self) -> None:
        """Refuse sizes that no transformer has."""
        for name, most in (("width", MAX_WIDTH), ("depth", MAX_DEPTH), ("num_heads", MAX_WIDTH)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        if self.width % self.num_heads:
            raise InputError(f"num_heads is {self.num_heads}, expected a divisor of width ({self.width})")
        if self.width % 4:
            raise InputError(f"width is {self.width}, expected a multiple of 4")
        if not 0 < self.mlp_ratio <= 16:
            raise InputError(f"mlp_ratio is {self.mlp_ratio}, expected above 0 and at most 16")


class LatentTransformer(nn.Module):
    """DiT's transformer (arXiv:2212.09748, section 3.2) on `[batch, token, dim]`.

        x += gate_1 * attention(modulate(norm(x), shift_1, scale_1))
        x += gate_2 * mlp(modulate(norm(x), shift_2, scale_2))

    Shifts, scales and gates of each block are a linear function of SiLU(time + condition) that starts at zero.

    Args:
        config: Sizes.
        num_tokens: Of one image.
        dim: Numbers in one noisy token.
        output_dim: Numbers in one token of the output.
        condition: Gives vectors of `config.width`.

    Raises:
        InputError: If `positions` is sine_2d and the tokens are no square.
    """

    def __init__(
        self, config: TransformerConfig, num_tokens: int, dim: int, output_dim: int, condition: Condition
    ) -> None:
        super().__init__()
        width = config.width
        self.to_tokens = nn.Linear(dim, width)
        self.time_embedding = TimestepEmbedding(width)
        self.condition = condition
        self.blocks = nn.ModuleList(ModulatedBlock(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.to_output = nn.Linear(width, output_dim)
        if config.positions == "learned":
            self.positions = nn.Parameter(0.02 * torch.randn(1, num_tokens, width))
        else:
            self.register_buffer("positions", _sines(config.positions, num_tokens, width)[None])
        self._start()

    def forward(
        self,
        noisy: Float[Tensor, "batch token dim"],
        time: Float[Tensor, " batch"],
        condition: Shaped[Tensor, "batch *conditiondim"],
        null: Bool[Tensor, " batch"],
    ) -> Float[Tensor, "batch token outputdim"]:
        """Return what the process asks the network for.

        Args:
            noisy: Noisy latents.
            time: As `Process.network_time` gives it.
            condition: See `Condition`.
            null: Where the condition is hidden.

        Returns:
            Velocity, noise or clean latents, with a learned variance beside it if the process has one.
        """
        tokens = self.to_tokens(noisy.to(self.to_tokens.weight.dtype)) + self.positions
        vector = nn.functional.silu(self.time_embedding(time) + self.condition(condition, null))
        tokens = self.run_blocks(tokens, vector)
        shift, scale = self.final_modulation(vector).chunk(2, dim=-1)
        return self.to_output(modulate(self.final_norm(tokens), shift, scale))

    def run_blocks(
        self, tokens: Float[Tensor, "batch token width"], vector: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch token width"]:
        """Return the tokens after all blocks; `softvq.inference` puts a faster way in its place."""
        for block in self.blocks:
            tokens = block(tokens, vector)
        return tokens

    def _start(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for layer in self.time_embedding.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            if isinstance(block, ModulatedBlock):
                nn.init.zeros_(block.modulation.weight)  # so that every block starts as the identity
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.to_output.weight)


class ModulatedBlock(nn.Module):
    """Attention and MLP, each with its shift, scale and gate.

    Args:
        config: Sizes.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        norm = nn.LayerNorm if config.qk_norm else None
        self.attn = Attention(width, num_heads=config.num_heads, qkv_bias=True, qk_norm=config.qk_norm, norm_layer=norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        hidden = int(width * config.mlp_ratio)
        self.mlp = Mlp(width, hidden, act_layer=_TanhGELU)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self, tokens: Float[Tensor, "batch token width"], vector: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch token width"]:
        """Return the tokens, changed; `vector` is SiLU(time + condition)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vector).chunk(6, dim=-1)
        tokens = tokens + gate1[:, None] * self.attn(modulate(self.norm1(tokens), shift1, scale1))
        return tokens + gate2[:, None] * self.mlp(modulate(self.norm2(tokens), shift2, scale2))


class TimestepEmbedding(nn.Module):
    """Time as a vector: cosines and sines of it at falling frequencies, then a small MLP.

    Args:
        width: Length of the vector.
        frequencies: Number of cosines and sines together, even.
    """

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        assert frequencies % 2 == 0
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.num_angles = frequencies // 2

    def forward(self, time: Float[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
        """Return one vector for each time; angles are float32, because bf16 has eight bits for a thousand steps."""
        steps = torch.arange(self.num_angles, device=time.device, dtype=torch.float32)
        angles = time.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) / self.num_angles * steps)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


def modulate(
    tokens: Float[Tensor, "batch token width"], shift: Float[Tensor, "batch width"], scale: Float[Tensor, "batch width"]
) -> Float[Tensor, "batch token width"]:
    """Return `tokens (1 + scale) + shift`, the same for all tokens of an image."""
    return tokens * (1 + scale[:, None]) + shift[:, None]


def patchify_latents(
    latents: Float[Tensor, "batch channel height width"], patch_size: int
) -> Float[Tensor, "batch token dim"]:
    """Cut two-dimensional latents into tokens, row by row.

    Args:
        latents: Of a tokenizer with a grid, such as `[batch, 4, 32, 32]`.
        patch_size: Side of a patch; a divisor of height and width.

    Returns:
        `[batch, (height / patch) (width / patch), patch^2 channel]`; `unpatchify_latents` undoes it.
    """
    patches = latents.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unpatchify_latents(
    tokens: Float[Tensor, "batch token dim"], patch_size: int
) -> Float[Tensor, "batch channel height width"]:
    """Undo `patchify_latents` for a square grid.

    Args:
        tokens: Their number is a square.
        patch_size: As it was cut.

    Returns:
        The latents on their grid.
    """
    rows = math.isqrt(tokens.shape[1])
    patches = tokens.unflatten(1, (rows, rows)).unflatten(3, (patch_size, patch_size, -1))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class _TanhGELU(nn.GELU):
    """GELU in its tanh form, which the released weights were trained with."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the activation; compiled code takes it as a sigmoid, since its tanh is slower than memory."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return input * torch.sigmoid(math.sqrt(8 / math.pi) * (input + 0.044715 * input**3))
        return super().forward(input)


def _sines(kind: str, num_tokens: int, width: int) -> Tensor:
    if kind == "sine":
        return _sines_of(torch.arange(num_tokens), width)
    rows = math.isqrt(num_tokens)
    if rows * rows != num_tokens:
        raise InputError(f"positions is sine_2d, which needs a square number of tokens; it is {num_tokens}")
    place = torch.arange(num_tokens)
    return torch.cat([_sines_of(place // rows, width // 2), _sines_of(place % rows, width // 2)], dim=1)


def _sines_of(place: Tensor, width: int) -> Tensor:
    """Interleave sine and cosine of each place at falling frequencies."""
    speed = MAX_PERIOD ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = place.double()[:, None] * speed
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()
