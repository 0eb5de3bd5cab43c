"""What a tokenizer is made of."""

import dataclasses

from softvq.errors import InputError
from softvq.tokenizers.quantizers import QuantizerConfig, SoftVQConfig, check_quantizer
from softvq.tokenizers.vit import ViTConfig

__all__ = ["FREE_FIELDS", "TokenizerConfig"]

FREE_FIELDS = ("pretrained", "init", "layer_scale_init", "min_latent_tokens", "_weight")
"""Ends of the names of fields that change neither the weights' shapes nor the latents."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerConfig:
    """Everything that determines a tokenizer's architecture."""

    encoder: ViTConfig
    """The transformer that reads patches."""
    decoder: ViTConfig
    """The transformer that paints them."""
    num_latent_tokens: int = 64
    """Latent tokens L per image."""
    latent_dim: int = 32
    """Channels d of each latent token."""
    quantizer: QuantizerConfig = dataclasses.field(default_factory=SoftVQConfig)
    """What turns the encoder's outputs into latents."""
    image_size: int = 256
    """Side in pixels that the position tables are made for; other sizes resample them."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    min_latent_tokens: int | None = None
    """Fewest tokens that `decode` takes: training then keeps only the first few of them at random steps, so that one
    model serves from this many tokens to all. Null trains and decodes all tokens always."""
    head_channels: int | None = None
    """Channels of convolutions that add to what the decoder's linear layer paints, across the borders of patches; null
    for that layer alone, as in the paper."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        for name, value, most in (
            ("num_latent_tokens", self.num_latent_tokens, 4096),
            ("latent_dim", self.latent_dim, 4096),
            ("patch_size", self.patch_size, 128),
            ("image_size", self.image_size, 8192),
        ):
            if not 1 <= value <= most:
                raise InputError(f"{name} is {value}, expected 1 to {most}")
        if self.image_size % self.patch_size:
            raise InputError(f"image_size is {self.image_size}, expected a multiple of patch_size ({self.patch_size})")
        if self.min_latent_tokens is not None and not 1 <= self.min_latent_tokens <= self.num_latent_tokens:
            raise InputError(
                f"min_latent_tokens is {self.min_latent_tokens}, expected 1 to num_latent_tokens "
                f"({self.num_latent_tokens}), or null"
            )
        if self.head_channels is not None and not 1 <= self.head_channels <= 4096:
            raise InputError(f"head_channels is {self.head_channels}, expected 1 to 4096, or null")
        if self.head_channels is not None and self.patch_size % 4:
            raise InputError(f"patch_size is {self.patch_size}, expected a multiple of 4 for head_channels")
        check_quantizer(self.quantizer, num_latent_tokens=self.num_latent_tokens, latent_dim=self.latent_dim)
