"""Responsibilities of a Gaussian mixture as the posterior: SoftVQ with learned priors, scales and precision."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq.tokenizers.codebooks import (
    CodebookQuantizer,
    check_codebook,
    check_positive,
    check_weight,
    entropy_averages,
    entropy_of,
    float32,
    group,
    ungroup,
    unit,
)

__all__ = ["GMMVQ", "GMMVQConfig"]

PRECISION_BOUND = 4.0  # of |log(omega * temperature)|: from 55 times softer to 55 times sharper
SCALE_BOUND = 1.0  # of |log sigma_k|


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GMMVQConfig:
    """A Gaussian mixture over the unit sphere, one component for each codeword."""

    kind: Literal["gmmvq"] = "gmmvq"
    codebook_size: int = 8192
    """Codewords K in each codebook."""
    num_codebooks: int = 4
    """Groups of consecutive tokens, each with a codebook of its own; divides the number of tokens."""
    temperature: float = 0.07
    """One over the precision that every token starts with."""
    kl_weight: float = 0.001
    """Weight of the bound on the divergence from the prior, a mean over images and tokens; 0 leaves it out."""
    entropy_weight: float = 0.01
    """Weight of the entropy regulariser; 0 leaves it out."""
    entropy_temperature: float = 0.01
    """One over the precision in the regulariser's own posterior, the same for all tokens."""
    entropy_per_codebook: bool = False
    """Ask each codebook for uniform use by itself instead of pooling all of them."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_codebook(self.codebook_size, self.num_codebooks)
        check_positive(temperature=self.temperature, entropy_temperature=self.entropy_temperature)
        check_weight(kl_weight=self.kl_weight, entropy_weight=self.entropy_weight)


class GMMVQ(CodebookQuantizer):
    """Each latent is the mean of the codewords under the responsibilities of a Gaussian mixture.

        gamma_k(z) = pi_k N(z^; c_k, sigma_k^2 / omega(z) I) / sum_j pi_j N(z^; c_j, sigma_j^2 / omega(z) I)
        log gamma_k = log pi_k - d log sigma_k - omega(z) |z^ - c_k|^2 / (2 sigma_k^2) + const
        omega(z)   = exp(b tanh((w.z + a) / b)) / temperature
        latent     = sum_k gamma_k(z) c_k

    with unit vectors z^ = z / |z| and c_k, and learned pi (a softmax), sigma_k, w and a, which start uniform, at 1 and
    at 0. There, since |z^ - c|^2 / 2 = 1 - cos(z, c), it is SoftVQ; as the temperature falls it becomes the nearest
    codeword by |z^ - c_k| / sigma_k. The tanh keeps omega within exp(+-b), b = 4, of its start, and log sigma_k is kept
    within +-1 in the same way, so that nothing overflows.

    `kl_weight` weighs, as a mean over images and tokens in nats,

        sum_k gamma_k log(gamma_k / pi_k) >= KL(sum_k gamma_k N_k || sum_k pi_k N_k)        log-sum inequality

    with N_k = N(c_k, sigma_k^2 / omega(z) I). Averaged over tokens it equals I(z; k) + KL(mean gamma || pi): to
    minimise it moves the prior to how often each codeword is used, and makes tokens tell less of themselves, the
    opposite of what the entropy regulariser asks for. With equal weights, and one posterior in both, the two add up to
    KL(mean gamma || pi) alone. Keep this one small: a large weight ends with every latent at the codebook's mean.

    Note:
        The paper (arXiv:2412.10958, appendix B.2) replaces one over the temperature by a data-dependent weight omega(z)
        and reports results like SoftVQ's. The form of omega, the priors, the scales, the unit vectors and the bound are
        our reading of it. As omega depends on the image, the mixture that the bound compares with is not one fixed
        prior. The regulariser is SoftVQ's, of the responsibilities at omega = 1 / entropy_temperature.
    """

    def __init__(self, config: GMMVQConfig, *, num_latent_tokens: int, latent_dim: int) -> None:
        sizes = {"num_latent_tokens": num_latent_tokens, "latent_dim": latent_dim}
        super().__init__(config.num_codebooks, config.codebook_size, **sizes)
        self.config = config
        self.log_priors = nn.Parameter(torch.zeros(config.num_codebooks, config.codebook_size))
        self.log_scales = nn.Parameter(torch.zeros(config.num_codebooks, config.codebook_size))
        self.precision = nn.Linear(latent_dim, 1)
        nn.init.zeros_(self.precision.weight)
        nn.init.zeros_(self.precision.bias)

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the mixtures of codewords and, where they have weight, the bound and the entropy regulariser.

        The responsibilities are computed again in the backward pass rather than kept until then.

        Args:
            latents_pre: The encoder's outputs.
            keys: Not used: nothing is random here.
            softening: Divides the logarithms of the responsibilities.

        Returns:
            Latents, and the loss terms by name.
        """
        config, losses = self.config, {}
        latents, bound, averages = checkpoint(
            self._train, latents_pre, softening, use_reentrant=False, preserve_rng_state=False
        )
        if config.kl_weight:
            losses["kl"] = config.kl_weight * bound
        if averages is not None:
            losses["entropy"] = config.entropy_weight * entropy_of(*averages)
        return latents, losses

    def precisions(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token"]:
        """Return `omega(z)` of every token: large where it is sure of its codeword."""
        with float32(latents_pre):
            steps = _bounded(self.precision(latents_pre.to(self.precision.weight.dtype)).float(), PRECISION_BOUND)
            return (steps.exp() / self.config.temperature)[..., 0]

    def bound(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token"]:
        """Return the bound on each token's divergence from the prior, in nats, 0 or more."""
        with float32(latents_pre):
            log_posterior = self._logits(latents_pre).log_softmax(dim=-1)
            return ungroup(self._divergence(log_posterior)[..., None], latents_pre.shape[0])[..., 0]

    def _train(
        self, latents_pre: Tensor, softening: Tensor | float
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        config = self.config
        with float32(latents_pre):
            codewords = self._codewords()
            offsets, distances = self._components(latents_pre, codewords)
            logits = (offsets - self._grouped_precisions(latents_pre) * distances) / softening
            log_posterior = logits.log_softmax(dim=-1).clamp(min=-80)  # exponentials below are denormal
            latents = ungroup(log_posterior.exp() @ codewords, latents_pre.shape[0])
            bound = self._divergence(log_posterior).mean()
            if config.entropy_weight == 0:
                return latents, bound, None
            pooled = not config.entropy_per_codebook
            logits = offsets - distances / config.entropy_temperature
            return latents, bound, entropy_averages(logits, pooled=pooled)

    def _divergence(self, log_posterior: Tensor) -> Tensor:
        log_priors = self.log_priors.float().log_softmax(dim=-1)[:, None]
        return (log_posterior.exp() * (log_posterior - log_priors)).sum(dim=-1)

    def _logits(self, latents_pre: Tensor) -> Tensor:
        offsets, distances = self._components(latents_pre, self._codewords())
        return offsets - self._grouped_precisions(latents_pre) * distances

    def _components(self, latents_pre: Tensor, codewords: Tensor) -> tuple[Tensor, Tensor]:
        """Return log pi_k - d log sigma_k, [codebook, 1, code], and |z^ - c_k|^2 / (2 sigma_k^2)."""
        log_scales = _bounded(self.log_scales.float(), SCALE_BOUND)[:, None]
        offsets = self.log_priors.float().log_softmax(dim=-1)[:, None] - self.input_dim * log_scales
        queries = group(unit(latents_pre), self.num_codebooks)
        squares = queries.square().sum(dim=-1, keepdim=True) + codewords.square().sum(dim=-1)[:, None]
        distances = (squares / 2 - queries @ codewords.mT).clamp(min=0)
        return offsets, distances * (-2 * log_scales).exp()

    def _grouped_precisions(self, latents_pre: Tensor) -> Tensor:
        return group(self.precisions(latents_pre)[..., None], self.num_codebooks)


def _bounded(values: Tensor, bound: float) -> Tensor:
    return bound * (values / bound).tanh()
