"""The quantizers a tokenizer can have, told apart by `kind`, and what the tokenizer asks of each.

Every quantizer is a module with the same face. `input_dim` is the number of channels it asks of the encoder.
`encode(latents_pre)` gives the latents to use: no randomness, no loss terms, nothing kept. Calling it gives the latents
to train with and a dictionary of loss terms, already weighted. `statistics(latents_pre)` gives the codebook's health as
scalars, nothing where there is no codebook.
"""

from softvq.tokenizers.baselines import KL, VQ, KLConfig, NoneConfig, Unquantized, VQConfig
from softvq.tokenizers.softvq import SoftVQ, SoftVQConfig

__all__ = [
    "KL",
    "VQ",
    "KLConfig",
    "NoneConfig",
    "QuantizerConfig",
    "SoftVQ",
    "SoftVQConfig",
    "Unquantized",
    "VQConfig",
    "build_quantizer",
]

QuantizerConfig = SoftVQConfig | VQConfig | KLConfig | NoneConfig


def build_quantizer(
    config: QuantizerConfig, *, num_latent_tokens: int, latent_dim: int
) -> SoftVQ | VQ | KL | Unquantized:
    """Return the quantizer that `config` describes."""
    match config:
        case SoftVQConfig():
            return SoftVQ(config, num_latent_tokens=num_latent_tokens, latent_dim=latent_dim)
        case VQConfig():
            return VQ(config, num_latent_tokens=num_latent_tokens, latent_dim=latent_dim)
        case KLConfig():
            return KL(config, latent_dim=latent_dim)
        case NoneConfig():
            return Unquantized(latent_dim=latent_dim)
