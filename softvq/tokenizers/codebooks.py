"""What quantizers with codebooks share: groups of tokens, the entropy regulariser, health figures, checks.

Everything here runs in float32, whatever autocast says: cosines rounded to bfloat16 and divided by a temperature of
0.07 or 0.01 are noise.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.errors import InputError

__all__ = [
    "check_codebook",
    "check_groups",
    "check_positive",
    "check_weight",
    "codebook_statistics",
    "entropy_loss",
    "float32",
    "group",
    "new_codebook",
    "ungroup",
]


def entropy_loss(logits: Float[Tensor, "group sample code"]) -> Float[Tensor, ""]:
    """Return `mean H(q(z|x)) - H(mean q(z|x))`, averaged over groups: sharp for each token, uniform over all of them.

        L_kl = H(q(z|x)) - H(E_x q(z|x))        arXiv:2412.10958, section 3

    It lies in [-log K, 0] and is minus the mutual information of token and codeword, not a divergence from a prior.

    Args:
        logits: Already divided by the temperature. What shares a marginal shares a group.

    Returns:
        A scalar in nats.

    Note:
        The released code adds 1e-6 inside the marginal's logarithm, and so do we; its other constant shifts all logits
        alike and has no effect.
    """
    log_posterior = logits.log_softmax(dim=-1).clamp(min=-80)  # exponentials below are denormal, many times slower
    posterior = log_posterior.exp()
    marginal = posterior.mean(dim=1)
    token_entropy = -(posterior * log_posterior).sum(dim=-1).mean()
    return token_entropy + (marginal * (marginal + 1e-6).log()).sum(dim=-1).mean()


def codebook_statistics(posterior: Float[Tensor, "group sample code"]) -> dict[str, Tensor]:
    """Describe a grouped posterior by scalars, without waiting for the device.

    `usage` is the share of codewords that are some token's likeliest; `perplexity` the exponential of the marginal's
    entropy, 1 to K; `posterior_entropy` the mean over tokens in nats; `max_probability` the mean over tokens of the
    largest probability.
    """
    groups, _, codes = posterior.shape
    likeliest = posterior.argmax(dim=-1)
    ones = torch.ones_like(likeliest, dtype=torch.float32)
    counts = torch.zeros(groups, codes, device=posterior.device).scatter_add_(1, likeliest, ones)
    marginal = posterior.mean(dim=1)
    return {
        "usage": (counts > 0).float().mean(),
        "perplexity": torch.special.entr(marginal).sum(dim=-1).exp().mean(),
        "posterior_entropy": torch.special.entr(posterior).sum(dim=-1).mean(),
        "max_probability": posterior.amax(dim=-1).mean(),
    }


def new_codebook(num_codebooks: int, codebook_size: int, latent_dim: int) -> nn.Parameter:
    """Draw random directions: unit vectors, as the released initialisation leaves them."""
    bound = 1 / codebook_size
    return nn.Parameter(
        F.normalize(torch.empty(num_codebooks, codebook_size, latent_dim).uniform_(-bound, bound), dim=-1)
    )


def group(latents: Tensor, num_codebooks: int) -> Tensor:
    """[batch, token, dim] to [codebook, batch * token / codebooks, dim]: consecutive tokens share a codebook."""
    batch, tokens, dim = latents.shape
    return (
        latents.reshape(batch, num_codebooks, tokens // num_codebooks, dim)
        .transpose(0, 1)
        .reshape(num_codebooks, -1, dim)
    )


def ungroup(groups: Tensor, batch: int) -> Tensor:
    """The inverse of `group`."""
    num_codebooks, _, dim = groups.shape
    return groups.reshape(num_codebooks, batch, -1, dim).transpose(0, 1).reshape(batch, -1, dim)


def float32(like: Tensor) -> torch.autocast:
    """Switch autocast off on the device of `like`."""
    return torch.autocast(like.device.type, enabled=False)


def check_groups(num_latent_tokens: int, num_codebooks: int) -> None:
    """Refuse codebooks that do not divide the tokens."""
    if num_latent_tokens % num_codebooks:
        raise InputError(
            f"num_codebooks is {num_codebooks}, expected a divisor of num_latent_tokens ({num_latent_tokens})"
        )


def check_codebook(codebook_size: int, num_codebooks: int) -> None:
    """Refuse a codebook that cannot be built."""
    if not 2 <= codebook_size <= 1 << 20:
        raise InputError(f"codebook_size is {codebook_size}, expected 2 to {1 << 20}")
    if not 1 <= num_codebooks <= 4096:
        raise InputError(f"num_codebooks is {num_codebooks}, expected 1 to 4096")


def check_positive(**values: float) -> None:
    """Refuse named values that are not finite, or so small that dividing by them overflows."""
    for name, value in values.items():
        if not 1e-6 <= value < math.inf:
            raise InputError(f"{name} is {value}, expected at least 1e-06")


def check_weight(**values: float) -> None:
    """Refuse named loss weights that are not finite and at least 0."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{name} is {value}, expected 0 or more")
