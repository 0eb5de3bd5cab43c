"""What SoftVQ is compared with, behind the same calls: vector quantization, a Gaussian posterior, and nothing."""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from softvq.tokenizers.codebooks import (
    check_codebook,
    check_groups,
    check_positive,
    check_weight,
    codebook_statistics,
    entropy_loss,
    float32,
    group,
    new_codebook,
    ungroup,
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


class VQ(nn.Module):
    """Each latent is the nearest codeword on the unit sphere; the gradient goes straight through (arXiv:1711.00937).

    latent = c_j,  j = argmin_k |z - c_k|
    loss   = codebook_weight |c_j - sg(z)|^2 + commitment_weight |sg(c_j) - z|^2
    """

    def __init__(self, config: VQConfig, *, num_latent_tokens: int, latent_dim: int) -> None:
        super().__init__()
        check_groups(num_latent_tokens, config.num_codebooks)
        self.config = config
        self.input_dim = latent_dim
        self.codebook = new_codebook(config.num_codebooks, config.codebook_size, latent_dim)

    def forward(
        self, latents_pre: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the nearest codewords, straight through, and the codebook, commitment and entropy terms."""
        config = self.config
        with float32(latents_pre):
            unit = F.normalize(latents_pre.float(), dim=-1)
            codewords = self.lookup(self.indices(latents_pre))
            losses = {
                "codebook": config.codebook_weight * F.mse_loss(codewords, unit.detach()),
                "commitment": config.commitment_weight * F.mse_loss(unit, codewords.detach()),
            }
            if config.entropy_weight:
                losses["entropy"] = config.entropy_weight * checkpoint(
                    self._entropy_loss, latents_pre, use_reentrant=False
                )
            return unit + (codewords - unit).detach(), losses

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the nearest codeword of every token, a unit vector."""
        with float32(latents_pre):
            return self.lookup(self.indices(latents_pre))

    def indices(self, latents_pre: Float[Tensor, "batch token dim"]) -> Int[Tensor, "batch token"]:
        """Return the nearest codeword of every token, an index into its own codebook."""
        with torch.no_grad(), float32(latents_pre):
            return ungroup(self._logits(latents_pre).argmax(dim=-1, keepdim=True), len(latents_pre))[..., 0]

    def lookup(self, indices: Int[Tensor, "batch token"]) -> Float[Tensor, "batch token dim"]:
        """Return the unit codewords that `indices` name."""
        groups = group(indices[..., None], self.config.num_codebooks)
        codewords = F.normalize(self.codebook.float(), dim=-1)
        return ungroup(codewords.gather(1, groups.expand(-1, -1, codewords.shape[-1])), len(indices))

    def statistics(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return usage and perplexity; the posterior is one-hot."""
        with torch.no_grad(), float32(latents_pre):
            logits = self._logits(latents_pre)
            return codebook_statistics(F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float())

    def _logits(self, latents_pre: Tensor) -> Tensor:
        """Minus the squared distance on the unit sphere, up to the constant 2."""
        groups = group(F.normalize(latents_pre.float(), dim=-1), self.config.num_codebooks)
        return 2 * groups @ F.normalize(self.codebook.float(), dim=-1).mT

    def _entropy_loss(self, latents_pre: Tensor) -> Tensor:
        with float32(latents_pre):
            return entropy_loss(self._logits(latents_pre).flatten(0, 1)[None] / self.config.entropy_temperature)


class KL(nn.Module):
    """A diagonal Gaussian per latent, `N(mean, exp(log_variance))`, drawn to the standard normal (arXiv:1312.6114).

    loss = kl_weight * mean over images of sum 1/2 (mean^2 + variance - 1 - log_variance)        arXiv:1312.6114, Eq. 10
    """

    def __init__(self, config: KLConfig, *, latent_dim: int) -> None:
        super().__init__()
        self.config = config
        self.input_dim = 2 * latent_dim

    def forward(
        self, latents_pre: Float[Tensor, "batch token channel"]
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return one draw of every latent and the divergence."""
        mean, log_variance = self.moments(latents_pre)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
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

    def statistics(self, latents_pre: Float[Tensor, "batch token channel"]) -> dict[str, Tensor]:
        """Return nothing: there is no codebook."""
        return {}


class Unquantized(nn.Module):
    """The encoder's outputs as they are."""

    def __init__(self, *, latent_dim: int) -> None:
        super().__init__()
        self.input_dim = latent_dim

    def forward(
        self, latents_pre: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the encoder's outputs in float32 and no loss terms."""
        return latents_pre.float(), {}

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the encoder's outputs in float32."""
        return latents_pre.float()

    def statistics(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return nothing: there is no codebook."""
        return {}


def _divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2))
