"""The two vision transformers of the tokenizer, on stock timm blocks (arXiv:2412.10958, section 3.1).

The encoder reads image patches and L learned latent tokens and keeps the L outputs; the decoder reads one mask token
for each patch and the L latents and paints the pixels.
"""

import dataclasses
import math
from typing import Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import LayerNorm, PatchEmbed, build_sincos2d_pos_embed, resample_abs_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from softvq.config import check_finite
from softvq.errors import InputError

__all__ = ["ConvHead", "FeatureDecoder", "ViTConfig", "ViTDecoder", "ViTEncoder", "load_timm_weights"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Size of one vision transformer, and what it starts from."""

    width: int
    """Channels of every token."""
    depth: int
    """Number of blocks."""
    num_heads: int
    """Attention heads; they divide `width`."""
    mlp_ratio: float = 4.0
    """Hidden channels of each block's MLP, in units of `width`."""
    layer_scale_init: float = 1.0
    """Where LayerScale starts. The released code starts at 1e-5, which makes training from scratch slow to begin."""
    init: Literal["local", "released"] = "local"
    """How training from scratch starts: `local` lets every token attend to its neighbours at first, see `_start_local`;
    `released` is noise, as in the released code."""
    pretrained: str | None = None
    """Name of the timm ViT whose pretrained weights training starts from; loading a saved tokenizer never reads it."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        check_finite(self)
        bounds = (("width", self.width, 8192), ("depth", self.depth, 128), ("num_heads", self.num_heads, 256))
        for name, value, most in bounds:
            if not 1 <= value <= most:
                raise InputError(f"{name} is {value}, expected 1 to {most}")
        if self.width % self.num_heads:
            raise InputError(f"width is {self.width}, expected a multiple of num_heads ({self.num_heads})")
        if self.init == "local" and self.width % 4:
            raise InputError(f"width is {self.width}, expected a multiple of 4 for the local init")
        if not 0 < self.mlp_ratio <= 16:
            raise InputError(f"mlp_ratio is {self.mlp_ratio}, expected more than 0 and at most 16")


class ViTEncoder(nn.Module):
    """Patches and learned latent tokens in, latent tokens out: the L latent outputs of `E([x_p; z_l])`."""

    def __init__(self, config: ViTConfig, *, image_size: int, patch_size: int, num_latent_tokens: int) -> None:
        super().__init__()
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.patch_size = patch_size
        self.num_latent_tokens = num_latent_tokens
        self.patch_embed = PatchEmbed(image_size, patch_size, embed_dim=config.width, strict_img_size=False)
        self.cls_token = _token(1, config.width)
        self.pos_embed = _token(1 + self.grid[0] * self.grid[1], config.width)
        self.latent_pos_embed = _token(num_latent_tokens, config.width)
        self.latent_tokens = _token(num_latent_tokens, config.width)
        self.blocks = _blocks(config)
        self.norm = LayerNorm(config.width, eps=1e-6)
        if config.init == "local":
            _start_local(self)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], masked: Bool[Tensor, "batch patch"] | None = None
    ) -> Float[Tensor, "batch token channel"]:
        """Encode images of any height and width divisible by the patch into the same number of tokens.

        Of a `masked` patch only the position is seen. Its content is zero, which no patch's is, so that masking in
        training needs no learned token that every saved model would carry along.
        """
        batch, _, height, width = images.shape
        grid = (height // self.patch_size, width // self.patch_size)
        positions = _positions(self.pos_embed, self.grid, grid)
        patches = self.patch_embed(images)
        if masked is not None:
            patches = patches.masked_fill(masked[..., None], 0)
        image_tokens = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1) + positions
        latent_tokens = (self.latent_tokens + self.latent_pos_embed).expand(batch, -1, -1)
        tokens = self.blocks(torch.cat([image_tokens, latent_tokens.to(image_tokens.dtype)], dim=1))
        return self.norm(tokens[:, -self.num_latent_tokens :])


class ConvHead(nn.Module):
    """Patch tokens in, a correction of the pixels out that knows no borders between patches.

    Tokens become maps at a quarter of the image's side, which two convolutions turn into pixels. It starts at 0.
    """

    SCALE = 4

    def __init__(self, width: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.side = patch_size // self.SCALE
        self.to_maps = nn.Linear(width, channels * self.side**2)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)
        self.paint = nn.Conv2d(channels, 3 * self.SCALE**2, 3, padding=1)
        for parameter in self.paint.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, tokens: Float[Tensor, "batch patch channel"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Return what to add to the pixels, for patches of a grid of (rows, columns)."""
        maps = _unfolded(self.to_maps(tokens), grid, self.side)
        return F.pixel_shuffle(self.paint(F.gelu(self.mix(maps))), self.SCALE)


class ViTDecoder(nn.Module):
    """Mask tokens and latent tokens in, pixels out: one linear layer on the mask outputs of `D([m; z])`.

    With `head_channels` convolutions add to what the linear layer paints.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        head_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.patch_size = patch_size
        self.cls_token = _token(1, config.width)
        self.mask_token = _token(1, config.width)
        self.pos_embed = _token(1 + self.grid[0] * self.grid[1], config.width)
        self.latent_pos_embed = _token(num_latent_tokens, config.width)
        self.blocks = _blocks(config)
        self.norm = LayerNorm(config.width, eps=1e-6)
        self.to_pixels = nn.Linear(config.width, 3 * patch_size**2)
        self.head = None if head_channels is None else ConvHead(config.width, head_channels, patch_size)
        if config.init == "local":
            _start_local(self)

    def forward(
        self, latent_tokens: Float[Tensor, "batch token channel"], size: tuple[int, int]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Paint images of `size` = (height, width) in pixels, divisible by the patch; values are not clamped.

        The latent tokens may be the first few of all.
        """
        grid = size[0] // self.patch_size, size[1] // self.patch_size
        tokens = self.patch_tokens(latent_tokens, grid)
        images = _unfolded(self.to_pixels(tokens), grid, self.patch_size)
        return images if self.head is None else images + self.head(tokens, grid)

    def patch_tokens(
        self, latent_tokens: Float[Tensor, "batch token channel"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch patch channel"]:
        """Return what the mask tokens of a grid of (rows, columns) patches have become, before the pixels."""
        rows, columns = grid
        positions = _positions(self.pos_embed, self.grid, grid)
        image_tokens = torch.cat([self.cls_token, self.mask_token.expand(-1, rows * columns, -1)], dim=1) + positions
        latent_tokens = latent_tokens + self.latent_pos_embed[:, : latent_tokens.shape[1]]
        image_tokens = image_tokens.to(latent_tokens.dtype).expand(latent_tokens.shape[0], -1, -1)
        tokens = self.blocks(torch.cat([image_tokens, latent_tokens], dim=1))
        return self.norm(tokens[:, 1 : 1 + rows * columns])


class FeatureDecoder(nn.Module):
    """Latents in, a vision encoder's patch features out: what training may ask of latents besides the pixels.

    A shallow decoder of the same build (MAETok, arXiv:2502.03444, section 3.2); no part of the tokenizer that is saved.
    """

    def __init__(
        self,
        config: ViTConfig,
        *,
        image_size: int,
        patch_size: int,
        num_latent_tokens: int,
        latent_dim: int,
        features: int,
    ) -> None:
        super().__init__()
        sizes = {"image_size": image_size, "patch_size": patch_size, "num_latent_tokens": num_latent_tokens}
        self.from_latents = nn.Linear(latent_dim, config.width)
        self.vit = ViTDecoder(config, **sizes)
        self.vit.to_pixels = nn.Linear(config.width, features)

    def forward(
        self, latents: Float[Tensor, "batch token dim"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch patch feature"]:
        """Return one prediction for each place of a grid of (rows, columns), in raster order."""
        return self.vit.to_pixels(self.vit.patch_tokens(self.from_latents(latents), grid))


def _unfolded(
    patches: Float[Tensor, "batch patch _side_side_channel"], grid: tuple[int, int], side: int
) -> Float[Tensor, "batch _channel _height _width"]:
    """Put the patches of a grid of (rows, columns) together, each of `side` x `side` places."""
    tiles = patches.unflatten(2, (side, side, -1)).unflatten(1, grid)
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def load_timm_weights(vit: ViTEncoder | ViTDecoder, name: str, *, pretrained: bool = True) -> str:
    """Start a transformer from a timm ViT: positions and patch kernel are resampled, the rest is copied by name.

    LayerScale, which many ViTs lack, is set to 1 where the source has none, so that the blocks compute what they did.

    Args:
        vit: Width, depth and heads must be those of the source.
        name: A timm model name, for example `vit_base_patch14_dinov2.lvd142m`.
        pretrained: False builds the source at random, for tests without a network.

    Returns:
        One sentence saying what was loaded and what stayed random.

    Raises:
        InputError: If timm has no such ViT, or its width or depth differs.
    """
    height, width = vit.grid
    size = (height * vit.patch_size, width * vit.patch_size)
    try:
        source = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size, patch_size=vit.patch_size)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"pretrained is {name!r}, expected the name of a timm ViT ({error})") from error
    except (OSError, ValueError) as error:  # no network and no cached file
        return f"{name}: its weights cannot be had here ({type(error).__name__}), the transformer starts at random"
    weights = source.state_dict()
    if "pos_embed" in weights and weights["pos_embed"].shape[1] == vit.pos_embed.shape[1] - 1:
        weights["pos_embed"] = torch.cat([vit.pos_embed[:, :1].detach(), weights["pos_embed"]], dim=1)
    own = vit.state_dict()
    copied = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    blocks = [key for key in own if key.startswith("blocks.") and ".ls" not in key]
    if any(key not in copied for key in blocks) or f"blocks.{len(vit.blocks)}.norm1.weight" in weights:
        raise InputError(f"pretrained is {name!r}, whose width or depth is not this transformer's; choose its size")
    scales = {key: torch.ones_like(own[key]) for key in own if ".ls" in key and key not in copied}
    vit.load_state_dict({**copied, **scales}, strict=False)
    fresh = sorted(key for key in own if key not in copied and key not in scales)
    return f"{name}: {len(copied)} tensors loaded; at random: {', '.join(fresh) or 'nothing'}"


def _positions(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Resample a position table, whose first entry belongs to the class token, to another grid of patches."""
    return table if wanted == grid else resample_abs_pos_embed(table, list(wanted), list(grid), num_prefix_tokens=1)


@torch.no_grad()
def _start_local(vit: ViTEncoder | ViTDecoder) -> None:
    """Start attention among neighbours, so that no token has to find out first where to look.

    Positions start as sines of the place in the picture, those of a latent token at the mean of its run of patches; and
    the keys' weights start as the queries', which makes every attention logit a similarity of its two tokens, as it is
    in trained transformers (arXiv:2305.09828).
    """
    width = vit.pos_embed.shape[-1]
    sines = build_sincos2d_pos_embed(list(vit.grid), width) * math.sqrt(2)  # to unit mean square
    vit.pos_embed[0, 1:] = sines
    vit.latent_pos_embed[0] = F.adaptive_avg_pool1d(sines.mT, vit.latent_pos_embed.shape[1]).mT
    for name, weight in vit.named_parameters():
        if not name.endswith("attn.qkv.weight"):
            continue
        queries, keys, _ = weight.chunk(3)
        nn.init.normal_(queries, std=width**-0.5)
        keys.copy_(queries)


def _token(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.empty(1, count, width), std=0.02))


def _blocks(config: ViTConfig) -> nn.Sequential:
    return nn.Sequential(
        *(
            Block(
                config.width,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=True,
                init_values=config.layer_scale_init,
                norm_layer=LayerNorm,
            )
            for _ in range(config.depth)
        )
    )
