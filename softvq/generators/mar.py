"""MAR: a masked autoencoder says what each hidden token could be, and a small head draws the token from that."""

import dataclasses
import math
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.generators.conditioning import Condition
from softvq.generators.heads import DenoisingHead
from softvq.generators.process import Process
from softvq.generators.transformer import MAX_DEPTH, MAX_WIDTH
from softvq.randomness import fold_in, normal, seed_of, uniform

__all__ = ["MAR", "MARConfig", "masked_counts", "random_orders", "select"]

TRAINING = seed_of(0, "mar training")  # the same keys serve others too
ORDER, RATIO, HEAD = range(3)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MARConfig:
    """Sizes of the two transformers and of the head, and how many tokens training hides."""

    kind: Literal["mar"] = "mar"
    width: int = 768
    """Numbers in each token inside the transformers."""
    encoder_depth: int = 12
    """Blocks that see the visible tokens only."""
    decoder_depth: int = 12
    """Blocks that see mask tokens too."""
    num_heads: int = 12
    """Attention heads; a divisor of `width`."""
    mlp_ratio: float = 4.0
    """Width of the hidden layers of the transformers' MLPs, in widths."""
    head_width: int = 1024
    """Numbers in each token inside the head."""
    head_depth: int = 6
    """Blocks of the head."""
    condition_tokens: int = 64
    """Tokens in front of the sequence that carry the condition, each with its own position."""
    min_mask_ratio: float = 0.7
    """Smallest share of tokens that training hides."""
    mask_std: float = 0.25
    """Deviation of that share: it is normal around 1, cut to `min_mask_ratio` and 1."""
    head_repeats: int = 4
    """Times and noises for which the head learns one token in one step; the transformers run once for all of them."""

    def __post_init__(self) -> None:
        """Refuse sizes that no network has."""
        depths = ("encoder_depth", "decoder_depth", "head_depth", "condition_tokens", "head_repeats")
        for name, most in (
            *((name, MAX_WIDTH) for name in ("width", "num_heads", "head_width")),
            *((name, MAX_DEPTH) for name in depths),
        ):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        if self.width % self.num_heads:
            raise InputError(f"num_heads is {self.num_heads}, expected a divisor of width ({self.width})")
        if not 0 < self.mlp_ratio <= 16:
            raise InputError(f"mlp_ratio is {self.mlp_ratio}, expected above 0 and at most 16")
        if not 0 <= self.min_mask_ratio <= 1:
            raise InputError(f"min_mask_ratio is {self.min_mask_ratio}, expected 0 to 1")
        if not 0 < self.mask_std <= 10:
            raise InputError(f"mask_std is {self.mask_std}, expected above 0 and at most 10")


class MAR(nn.Module):
    """Masked autoregression over continuous tokens (arXiv:2406.11838): p(hidden tokens | visible tokens, condition).

    The encoder sees the condition's tokens and the visible tokens. The decoder sees what comes out of it, and a mask
    token for each hidden one. Its vector z for a hidden token is all that the head knows when it draws that token.

    Tokens are arranged in an order of their own for each image, with the visible ones in front. Attention has no
    order, and each token carries its position, so nothing need be put back into place in between.

    Args:
        config: Sizes.
        num_tokens: Of one image.
        latent_dim: Numbers in one token.
        condition: Gives vectors of `config.width`.
        process: Of the head.
    """

    def __init__(
        self, config: MARConfig, num_tokens: int, latent_dim: int, condition: Condition, process: Process
    ) -> None:
        super().__init__()
        if num_tokens < 1:
            raise InputError(f"num_tokens is {num_tokens}, expected at least 1")
        if latent_dim < 1:
            raise InputError(f"latent_dim is {latent_dim}, expected at least 1")
        width = config.width
        length = config.condition_tokens + num_tokens
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, width, config.num_heads, mlp_ratio=config.mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.config, self.num_tokens, self.latent_dim, self.process = config, num_tokens, latent_dim, process
        self.condition = condition
        self.to_tokens = nn.Linear(latent_dim, width)
        self.encoder_positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.start_norm = norm(width)
        self.encoder_blocks = nn.ModuleList(block() for _ in range(config.encoder_depth))
        self.encoder_norm = norm(width)
        self.to_decoder = nn.Linear(width, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.decoder_positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.decoder_blocks = nn.ModuleList(block() for _ in range(config.decoder_depth))
        self.decoder_norm = norm(width)
        self.head_positions = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self._start()
        self.head = DenoisingHead(
            latent_dim, process.output_dim(latent_dim), width, config.head_width, config.head_depth
        )

    def forward(
        self,
        front: Float[Tensor, "batch front dim"],
        orders: Int64[Tensor, "batch token"],
        vector: Float[Tensor, "batch width"],
        num_visible: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """Return z of every token, as `orders` arranges them.

        Args:
            front: Latents of the first tokens of each order; there may be none.
            orders: Numbers of all tokens of an image, the visible ones first.
            vector: Of the condition, from `self.condition`.
            num_visible: How many of `front` an image shows, so that images of one batch may differ; the others have no
                effect on z. None shows all of them.

        Returns:
            Vectors for the head.
        """
        visible = None
        if num_visible is not None:
            visible = torch.arange(front.shape[1], device=front.device) < num_visible[:, None]
        return self._decode(self._encode(front, orders, vector, visible), orders, visible)

    def losses(
        self,
        clean: Float[Tensor, "batch token dim"],
        condition: Shaped[Tensor, "batch *conditiondim"],
        null: Bool[Tensor, " batch"],
        keys: Int64[Tensor, " batch"],
    ) -> dict[str, Float[Tensor, " batch"]]:
        """Hide tokens, and return how well the head finds them again: means over hidden tokens, times and noises.

        Args:
            clean: Latents.
            condition: See `Condition`.
            null: Where the condition is hidden.
            keys: Of the samples; order, number of hidden tokens, times and noises follow from a sample's key alone.

        Returns:
            Losses of each sample, whose sum is to be minimised.
        """
        repeats, length = self.config.head_repeats, self.num_tokens
        clean, keys = clean.float(), fold_in(keys, TRAINING)
        orders = random_orders(fold_in(keys, ORDER), length)
        masked = masked_counts(self.config, fold_in(keys, RATIO), length)
        arranged = select(clean, orders)
        front = arranged[:, : length - _fewest_masked(self.config, length)]
        z = self(front, orders, self.condition(condition, null), length - masked)
        hidden = torch.arange(length, device=keys.device) >= (length - masked)[:, None]

        numbers = torch.arange(repeats * length, device=keys.device)
        token_keys = (fold_in(keys, HEAD)[:, None] + numbers).flatten()
        time = self.process.draw_times(fold_in(token_keys, 0))
        noise = normal(fold_in(token_keys, 1), self.latent_dim)
        tokens = arranged[:, None].expand(-1, repeats, -1, -1).flatten(0, 2)
        noisy = self.process.noisy(tokens, noise, time)
        output = self.head(noisy, self.process.network_time(time), z[:, None].expand(-1, repeats, -1, -1).flatten(0, 2))
        shares = hidden / masked[:, None]
        return {
            name: (loss.unflatten(0, (-1, repeats, length)).mean(1) * shares).sum(1)
            for name, loss in self.process.losses(output, tokens, noise, time).items()
        }

    def _encode(self, front: Tensor, orders: Tensor, vector: Tensor, visible: Tensor | None) -> Tensor:
        """Return the condition's tokens and those in front, encoded; hidden ones are seen by none."""
        prefix = vector[:, None].expand(-1, self.config.condition_tokens, -1)
        tokens = self.to_tokens(front.to(self.to_tokens.weight.dtype))
        tokens = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
        tokens = self.start_norm(tokens + self._positions(self.encoder_positions, orders[:, : front.shape[1]]))
        mask = None
        if visible is not None:
            seen = visible.new_ones(len(visible), self.config.condition_tokens)
            mask = torch.cat([seen, visible], dim=1)[:, None, None]
        for block in self.encoder_blocks:
            tokens = block(tokens, attn_mask=mask)
        return self.encoder_norm(tokens)

    def _decode(self, encoded: Tensor, orders: Tensor, visible: Tensor | None) -> Tensor:
        """Return z of every token, mask tokens standing for those that were not encoded or are hidden."""
        prefix = self.config.condition_tokens
        tokens = self.to_decoder(encoded)
        mask_token = self.mask_token.to(tokens.dtype)
        front = tokens[:, prefix:]
        if visible is not None:
            front = torch.where(visible[..., None], front, mask_token)
        rest = mask_token.expand(len(orders), self.num_tokens - front.shape[1], -1)
        tokens = torch.cat([tokens[:, :prefix], front, rest], dim=1)
        tokens = tokens + self._positions(self.decoder_positions, orders)
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_norm(tokens)[:, prefix:] + self.head_positions[orders]

    def _positions(self, table: Tensor, orders: Tensor) -> Tensor:
        """Return the positions of the condition's tokens and of tokens in an order."""
        prefix = self.config.condition_tokens
        return torch.cat([table[:prefix].expand(len(orders), -1, -1), table[prefix:][orders]], dim=1)

    def _start(self) -> None:
        for part in (self.to_tokens, self.encoder_blocks, self.to_decoder, self.decoder_blocks):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)


def random_orders(keys: Int64[Tensor, " batch"], num_tokens: int) -> Int64[Tensor, "batch token"]:
    """Return a random order of the tokens of each image.

    Args:
        keys: Of the images.
        num_tokens: Of one image.

    Returns:
        Numbers 0 to num_tokens - 1 in each row.
    """
    return uniform(keys, num_tokens).argsort(dim=1, stable=True)


def masked_counts(config: MARConfig, keys: Int64[Tensor, " batch"], num_tokens: int) -> Int64[Tensor, " batch"]:
    """Return how many tokens of each image training hides.

        ratio ~ Normal(1, mask_std) cut to [min_mask_ratio, 1],  count = ceil(ratio num_tokens)

    Args:
        config: Range and deviation of the ratio.
        keys: Of the images.
        num_tokens: Of one image.

    Returns:
        Numbers from 1 to num_tokens.
    """
    lowest = 0.5 * math.erfc((1 - config.min_mask_ratio) / (config.mask_std * math.sqrt(2)))
    quantiles = lowest + (0.5 - lowest) * uniform(keys)
    ratios = 1 + config.mask_std * torch.special.ndtri(quantiles)
    counts = (ratios * num_tokens).ceil().long()
    return counts.clamp(_fewest_masked(config, num_tokens), num_tokens)


def select(tokens: Float[Tensor, "batch token dim"], numbers: Int64[Tensor, "batch n"]) -> Float[Tensor, "batch n dim"]:
    """Return some tokens of each image.

    Args:
        tokens: Of the images.
        numbers: Which, for each image.

    Returns:
        They in that order.
    """
    return tokens.gather(1, numbers[..., None].expand(-1, -1, tokens.shape[2]))


def _fewest_masked(config: MARConfig, num_tokens: int) -> int:
    return min(num_tokens, math.floor(config.min_mask_ratio * num_tokens + 1e-6) + 1)  # 0.3 * 10 may be below 3
