"""What SoftVQ is compared with, behind the same calls: vector quantization, a Gaussian posterior, and nothing."""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq.randomness import normal
from softvq.tokenizers.codebooks import (
    CodebookQuantizer,
    check_codebook,
    check_positive,
    check_weight,
    entropy_averages,
    entropy_of,
    float32,
    group,
    keys_or_fresh,
    unit,
)

__all__ = ["KL", "VQ", "KLConfig", "NoneConfig", "Unquantized", "VQConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class VQConfig:
    """Vector quantization on the unit sphere with a straight-through gradient."""

    kind: Literal["vq"] = "vq"
    codebook_size: int = 8192
    """Codewords K in each codebook."""
    num_codebooks: int = 1
    """Groups of consecutive tokens, each with a codebook of its own; divides the number of tokens."""
    codebook_weight: float = 1.0
    """Weight of the term that moves codewords to the encoder's outputs."""
    commitment_weight: float = 0.25
    """Weight of the term that keeps the encoder's outputs near their codewords."""
    entropy_weight: float = 0.0
    """Weight of the entropy regulariser; 0 leaves it out."""
    entropy_temperature: float = 0.01
    """Temperature of the regulariser's posterior."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_codebook(self.codebook_size, self.num_codebooks)
        check_positive(entropy_temperature=self.entropy_temperature)
        check_weight(
            codebook_weight=self.codebook_weight,
            commitment_weight=self.commitment_weight,
            entropy_weight=self.entropy_weight,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class KLConfig:
    """A diagonal Gaussian posterior, sampled in training, its mean in use."""

    kind: Literal["kl"] = "kl"
    kl_weight: float = 1e-6
    """Weight of the divergence from the standard normal, summed over an image's latents."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_weight(kl_weight=self.kl_weight)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NoneConfig:
    """No quantizer: a plain autoencoder."""

    kind: Literal["none"] = "none"


class VQ(CodebookQuantizer):
    """Each latent is the nearest codeword on the unit sphere; the gradient goes straight through (arXiv:1711.00937).

    latent = c_j,  j = argmin_k |z - c_k|
    loss   = codebook_weight |c_j - sg(z)|^2 + commitment_weight |sg(c_j) - z|^2
    """

    def __init__(self, config: VQConfig, *, num_latent_tokens: int, latent_dim: int) -> None:
        sizes = {"num_latent_tokens": num_latent_tokens, "latent_dim": latent_dim}
        super().__init__(config.num_codebooks, config.codebook_size, **sizes)
        self.config = config

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the nearest codewords, straight through, and the codebook, commitment and entropy terms.

        Args:
            latents_pre: The encoder's outputs.
            keys: Not used: nothing is random here.
            softening: Not used: the posterior is one-hot.

        Returns:
            Latents, and the loss terms by name.
        """
        config = self.config
        with float32(latents_pre):
            units, codewords = unit(latents_pre), self.encode(latents_pre)
            losses = {
                "codebook": config.codebook_weight * F.mse_loss(codewords, units.detach()),
                "commitment": config.commitment_weight * F.mse_loss(units, codewords.detach()),
            }
            if config.entropy_weight:
                averages = checkpoint(self._entropy, latents_pre, use_reentrant=False, preserve_rng_state=False)
                losses["entropy"] = config.entropy_weight * entropy_of(*averages)
            return units + (codewords - units).detach(), losses

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the nearest codeword of every token, a unit vector."""
        with float32(latents_pre):
            return self.lookup(self.indices(latents_pre))

    def _logits(self, latents_pre: Tensor) -> Tensor:
        """Minus the squared distance on the unit sphere, up to the constant 2."""
        return 2 * group(unit(latents_pre), self.num_codebooks) @ self._codewords().mT

    def _posterior(self, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)

    def _entropy(self, latents_pre: Tensor) -> tuple[Tensor, Tensor]:
        with float32(latents_pre):
            return entropy_averages(self._logits(latents_pre) / self.config.entropy_temperature, pooled=True)


class KL(nn.Module):
    """A diagonal Gaussian per latent, `N(mean, exp(log_variance))`, drawn to the standard normal (arXiv:1312.6114).

    loss = kl_weight * mean over images of sum 1/2 (mean^2 + variance - 1 - log_variance)        arXiv:1312.6114, Eq. 10
    """

    def __init__(self, config: KLConfig, *, latent_dim: int) -> None:
        super().__init__()
        self.config = config
        self.input_dim = 2 * latent_dim

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token channel"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return one draw of every latent and the divergence.

        Args:
            latents_pre: The encoder's outputs.
            keys: Of the samples' noise; None draws new ones.
            softening: Not used: there is no temperature.

        Returns:
            Latents, and the loss terms by name.
        """
        mean, log_variance = self.moments(latents_pre)
        noise = normal(keys_or_fresh(keys, latents_pre), *mean.shape[1:])
        latents = mean + (0.5 * log_variance).exp() * noise
        return latents, {"kl": self.config.kl_weight * _divergence(mean, log_variance).mean()}

    def encode(self, latents_pre: Float[Tensor, "batch token channel"]) -> Float[Tensor, "batch token dim"]:
        """Return the mean of every latent."""
        return self.moments(latents_pre)[0]

    def moments(
        self, latents_pre: Float[Tensor, "batch token channel"]
    ) -> tuple[Float[Tensor, "batch token dim"], Float[Tensor, "batch token dim"]]:
        """Return mean and log-variance; the latter is kept within -30 and 20 so that its exponential is finite."""
        mean, log_variance = latents_pre.float().chunk(2, dim=-1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def divergence(self, latents_pre: Float[Tensor, "batch token channel"]) -> Float[Tensor, " batch"]:
        """Return the divergence from the standard normal in nats, summed over each image's latents."""
        return _divergence(*self.moments(latents_pre))

    def averages(self, latents_pre: Float[Tensor, "batch token channel"]) -> dict[str, Tensor]:
        """Return nothing: there is no codebook."""
        return {}

    def statistics(self, latents_pre: Float[Tensor, "batch token channel"]) -> dict[str, Tensor]:
        """Return nothing: there is no codebook."""
        return {}


class Unquantized(nn.Module):
    """The encoder's outputs as they are."""

    def __init__(self, *, latent_dim: int) -> None:
        super().__init__()
        self.input_dim = latent_dim

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the encoder's outputs in float32 and no loss terms.

        Args:
            latents_pre: The encoder's outputs.
            keys: Not used: nothing is random here.
            softening: Not used: there is no temperature.

        Returns:
            Latents and an empty dictionary.
        """
        return latents_pre.float(), {}

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the encoder's outputs in float32."""
        return latents_pre.float()

    def averages(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return nothing: there is no codebook."""
        return {}

    def statistics(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return nothing: there is no codebook."""
        return {}


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2))
