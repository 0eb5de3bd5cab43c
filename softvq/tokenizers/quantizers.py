"""The quantizers a tokenizer can have, told apart by `kind`, and what the tokenizer asks of each.

Every quantizer is a module with the same face. `input_dim` is the number of channels it asks of the encoder.
`encode(latents_pre)` gives the latents to use: no randomness, no loss terms, nothing kept. Calling it gives the latents
to train with and a dictionary of loss terms, already weighted; it takes keys of the samples' noise and a softening of
the posterior, which those use that have any. `averages(latents_pre)` gives the codebooks' health over a batch, and
`statistics(latents_pre)` the same as scalars, nothing where there is no codebook.

Those with codebooks also give `indices(latents_pre)`, the likeliest codewords, `lookup(indices)`, the latents that
those stand for, and `top_codewords(latents_pre, k)`. Indices are [batch, token], with one more axis for each product or
residual quantizer, the outermost first.
"""

from softvq.tokenizers.baselines import KL, VQ, KLConfig, NoneConfig, Unquantized, VQConfig
from softvq.tokenizers.codebooks import check_groups
from softvq.tokenizers.gmmvq import GMMVQ, GMMVQConfig
from softvq.tokenizers.gumbel import Gumbel, GumbelConfig
from softvq.tokenizers.softvq import SoftVQ, SoftVQConfig
from softvq.tokenizers.wrappers import Product, ProductConfig, Residual, ResidualConfig, check_parts

__all__ = [
    "GMMVQ",
    "KL",
    "VQ",
    "GMMVQConfig",
    "Gumbel",
    "GumbelConfig",
    "KLConfig",
    "NoneConfig",
    "Product",
    "ProductConfig",
    "QuantizerConfig",
    "Residual",
    "ResidualConfig",
    "SoftVQ",
    "SoftVQConfig",
    "Unquantized",
    "VQConfig",
    "build_quantizer",
    "check_quantizer",
    "code_shape",
    "innermost",
    "unit_vectors",
]

LeafConfig = SoftVQConfig | VQConfig | GMMVQConfig | GumbelConfig | KLConfig | NoneConfig
QuantizerConfig = LeafConfig | ProductConfig | ResidualConfig
Quantizer = SoftVQ | VQ | GMMVQ | Gumbel | KL | Unquantized | Product | Residual


def build_quantizer(config: QuantizerConfig, *, num_latent_tokens: int, latent_dim: int) -> Quantizer:
    """Return the quantizer that `config` describes.

    Args:
        config: Of any kind.
        num_latent_tokens: Of each image; a multiple of the number of codebooks.
        latent_dim: Channels of each latent; a multiple of the parts of all product quantizers.

    Returns:
        The module, with random weights.

    Raises:
        InputError: If the sizes do not fit.
    """
    sizes = {"num_latent_tokens": num_latent_tokens, "latent_dim": latent_dim}
    match config:
        case SoftVQConfig():
            return SoftVQ(config, **sizes)
        case VQConfig():
            return VQ(config, **sizes)
        case GMMVQConfig():
            return GMMVQ(config, **sizes)
        case GumbelConfig():
            return Gumbel(config, **sizes)
        case KLConfig():
            return KL(config, latent_dim=latent_dim)
        case NoneConfig():
            return Unquantized(latent_dim=latent_dim)
        case ProductConfig(parts=parts):
            check_parts(latent_dim, parts)
            sizes["latent_dim"] = latent_dim // parts
            return Product(build_quantizer(config.inner, **sizes) for _ in range(parts))
        case ResidualConfig():
            return Residual(build_quantizer(config.inner, **sizes) for _ in range(config.depth))


def check_quantizer(config: QuantizerConfig, *, num_latent_tokens: int, latent_dim: int) -> None:
    """Refuse, without building anything, parts that do not divide the channels and codebooks that do not the tokens."""
    while isinstance(config, ProductConfig | ResidualConfig):
        if isinstance(config, ProductConfig):
            check_parts(latent_dim, config.parts)
            latent_dim //= config.parts
        config = config.inner
    check_groups(num_latent_tokens, getattr(config, "num_codebooks", 1))


def innermost(config: QuantizerConfig) -> LeafConfig:
    """Return the config within all product and residual ones, which has the codebook's size and number."""
    while isinstance(config, ProductConfig | ResidualConfig):
        config = config.inner
    return config


def code_shape(config: QuantizerConfig) -> tuple[int, ...]:
    """Return the axes that indices have after the token's: parts and depths, the outer wrapper's first."""
    shape: tuple[int, ...] = ()
    while isinstance(config, ProductConfig | ResidualConfig):
        shape += (config.parts if isinstance(config, ProductConfig) else config.depth,)
        config = config.inner
    return shape


def unit_vectors(config: QuantizerConfig) -> int:
    """Return of how many unit vectors, or mixtures of such, a latent is put together; 0 if it may have any length."""
    count = 1
    while isinstance(config, ProductConfig | ResidualConfig):
        count *= config.parts if isinstance(config, ProductConfig) else 1
        config = config.inner
    if isinstance(config, SoftVQConfig):
        return count if config.similarity == "cosine" else 0
    return count if isinstance(config, VQConfig | GMMVQConfig | GumbelConfig) else 0
