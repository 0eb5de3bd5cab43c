"""What quantizers with codebooks share: groups of tokens, the entropy regulariser, health figures, checks.

Everything here runs in float32, whatever autocast says: cosines rounded to bfloat16 and divided by a temperature of
0.07 or 0.01 are noise.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.ranks import mean_over_ranks

__all__ = [
    "CodebookQuantizer",
    "check_codebook",
    "check_groups",
    "check_positive",
    "check_weight",
    "codebook_statistics",
    "entropy_averages",
    "entropy_of",
    "float32",
    "group",
    "keys_or_fresh",
    "new_codebook",
    "posterior_averages",
    "ungroup",
    "unit",
]

SHORTEST = 1e-4


class CodebookQuantizer(nn.Module):
    """What can be said of every quantizer that has a posterior over the codewords of each token's own codebook.

    A subclass gives `_logits`, [group, sample, code], the logarithm of the posterior up to a constant of each sample,
    and `_codewords`, [group, code, dim], as they enter the latents.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, *, num_latent_tokens: int, latent_dim: int) -> None:
        super().__init__()
        check_groups(num_latent_tokens, num_codebooks)
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.input_dim = latent_dim
        self.codebook = new_codebook(num_codebooks, codebook_size, latent_dim)

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the latents to use: the posterior's mean over the codewords of every token's codebook."""
        with float32(latents_pre):
            return ungroup(self._posterior(self._logits(latents_pre)) @ self._codewords(), latents_pre.shape[0])

    def posterior(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token code"]:
        """Return `q(c_k | z)` of every token over the codewords of its own codebook; rows sum to 1."""
        with float32(latents_pre):
            return ungroup(self._posterior(self._logits(latents_pre)), latents_pre.shape[0])

    def indices(self, latents_pre: Float[Tensor, "batch token dim"]) -> Int[Tensor, "batch token"]:
        """Return the likeliest codeword of every token, an index into its own codebook."""
        with torch.no_grad(), float32(latents_pre):
            return ungroup(self._logits(latents_pre).argmax(dim=-1, keepdim=True), latents_pre.shape[0])[..., 0]

    def lookup(self, indices: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token dim"]:
        """Return the codewords that `indices` name, each in its own token's codebook."""
        groups, codewords = group(indices[..., None], self.num_codebooks), self._codewords()
        return ungroup(codewords.gather(1, groups.expand(-1, -1, codewords.shape[-1])), len(indices))

    def top_codewords(
        self, latents_pre: Float[Tensor, "batch token dim"], k: int
    ) -> tuple[Int[Tensor, "batch token top"], Float[Tensor, "batch token top"]]:
        """Return the likeliest codewords of every token and their probabilities.

        Args:
            latents_pre: The encoder's outputs.
            k: How many, 1 to the codebook's size.

        Returns:
            Indices into each token's own codebook, the likeliest first, and the posterior's probabilities of them.

        Raises:
            InputError: If there are not so many codewords.
        """
        if not 1 <= k <= self.codebook_size:
            raise InputError(f"k is {k}, expected 1 to the codebook's size ({self.codebook_size})")
        with torch.no_grad(), float32(latents_pre):
            logits = self._logits(latents_pre)
            top = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]  # of equals the first, as argmax
            weights = self._posterior(logits).gather(-1, top)
            return ungroup(top, latents_pre.shape[0]), ungroup(weights, len(latents_pre))

    def averages(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return `posterior_averages` over these tokens, for each of the codebooks."""
        with torch.no_grad(), float32(latents_pre):
            return posterior_averages(self._posterior(self._logits(latents_pre)))

    def statistics(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return usage, perplexity, posterior entropy and largest probability over these tokens."""
        return codebook_statistics(self.averages(latents_pre))

    def _logits(self, latents_pre: Tensor) -> Tensor:
        raise NotImplementedError

    def _codewords(self) -> Tensor:
        return unit(self.codebook)

    def _posterior(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1)


def entropy_averages(
    logits: Float[Tensor, "group sample code"], *, pooled: bool = False
) -> tuple[Float[Tensor, ""], Float[Tensor, "pool code"]]:
    """Return what `entropy_of` needs: the mean entropy in nats and the mean posterior of each group.

    Args:
        logits: Already divided by the temperature. What shares a marginal shares a group.
        pooled: Put all groups into one.

    Returns:
        Averages over the samples of this rank. No rank waits for another here, so this may be checkpointed.
    """
    logits = logits.flatten(0, 1)[None] if pooled else logits
    log_posterior = logits.log_softmax(dim=-1).clamp(min=-80)  # exponentials below are denormal, many times slower
    posterior = log_posterior.exp()
    return -(posterior * log_posterior).sum(dim=-1).mean(), posterior.mean(dim=1)


def entropy_of(token_entropy: Float[Tensor, ""], marginal: Float[Tensor, "pool code"]) -> Float[Tensor, ""]:
    """Return `mean H(q(z|x)) - H(mean q(z|x))`, averaged over groups: sharp for each token, uniform over all of them.

        L_kl = H(q(z|x)) - H(E_x q(z|x))        arXiv:2412.10958, section 3

    It lies in [-log K, 0] and is minus the mutual information of token and codeword, not a divergence from a prior.

    Args:
        token_entropy: As `entropy_averages` gives it for this rank's samples.
        marginal: The same.

    Returns:
        A scalar in nats. The expectation in it is over the samples of all ranks, so every rank must call this.

    Note:
        The released code adds 1e-6 inside the marginal's logarithm, and so do we; its other constant shifts all logits
        alike and has no effect.
    """
    marginal = mean_over_ranks(marginal)
    return token_entropy + (marginal * (marginal + 1e-6).log()).sum(dim=-1).mean()


def posterior_averages(posterior: Float[Tensor, "group sample code"]) -> dict[str, Tensor]:
    """Return averages over samples, from which `codebook_statistics` describes a codebook.

    Args:
        posterior: Rows sum to 1.

    Returns:
        `likeliest`, [group, code], the share of samples whose likeliest codeword it is; `marginal`, [group, code], the
        mean posterior; `posterior_entropy`, [group], in nats; `max_probability`, [group], the mean of the largest
        probability. All are means over samples: those of equally large parts of a batch may be averaged.
    """
    groups, samples, codes = posterior.shape
    likeliest = posterior.argmax(dim=-1)
    ones = torch.ones_like(likeliest, dtype=torch.float32)
    counts = torch.zeros(groups, codes, device=posterior.device).scatter_add_(1, likeliest, ones)
    return {
        "likeliest": counts / samples,
        "marginal": posterior.mean(dim=1),
        "posterior_entropy": torch.special.entr(posterior).sum(dim=-1).mean(dim=1),
        "max_probability": posterior.amax(dim=-1).mean(dim=1),
    }


def codebook_statistics(averages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Describe codebooks by scalars, without waiting for the device.

    Args:
        averages: As `posterior_averages` gives them, over as many samples as wanted; none if there is no codebook.

    Returns:
        `usage`, the share of codewords that are some token's likeliest; `perplexity`, the exponential of the marginal's
        entropy, 1 to K; `posterior_entropy`, in nats, and `max_probability`, means over tokens.
    """
    if not averages:
        return {}
    return {
        "usage": (averages["likeliest"] > 0).float().mean(),
        "perplexity": torch.special.entr(averages["marginal"]).sum(dim=-1).exp().mean(),
        "posterior_entropy": averages["posterior_entropy"].mean(),
        "max_probability": averages["max_probability"].mean(),
    }


def new_codebook(num_codebooks: int, codebook_size: int, latent_dim: int) -> nn.Parameter:
    """Draw random directions: unit vectors, as the released initialisation leaves them."""
    bound = 1 / codebook_size
    return nn.Parameter(
        F.normalize(torch.empty(num_codebooks, codebook_size, latent_dim).uniform_(-bound, bound), dim=-1)
    )


def unit(vectors: Tensor) -> Tensor:
    """Return vectors of length 1 in float32; those shorter than 1e-4 are divided by 1e-4 and take no gradient.

    Where there is next to no direction, the slope of taking it is 1 / length: it would drown every other token's.
    """
    vectors = vectors.float()
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    units = vectors / lengths.clamp(min=SHORTEST)
    units = torch.where(lengths.isfinite(), units, torch.nan)  # overflown ones have no direction, and must not pass
    return torch.where(lengths < SHORTEST, units.detach(), units)


def keys_or_fresh(keys: Int64[Tensor, " batch"] | None, latents_pre: Tensor) -> Int64[Tensor, " batch"]:
    """Return `keys` or, if there are none, new ones from torch's global generator of the latents' device."""
    if keys is not None:
        return keys
    return torch.randint(1 << 62, (latents_pre.shape[0],), device=latents_pre.device)


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
