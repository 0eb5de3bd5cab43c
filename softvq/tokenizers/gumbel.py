"""The Gumbel-softmax posterior: draws of codewords that gradients pass through (arXiv:1611.01144, arXiv:1611.00712)."""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from softvq.randomness import uniform
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
    ungroup,
    unit,
)

__all__ = ["Gumbel", "GumbelConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GumbelConfig:
    """A categorical posterior, drawn from in training by the Gumbel-softmax relaxation."""

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: int = 8192
    """Codewords K in each codebook."""
    num_codebooks: int = 4
    """Groups of consecutive tokens, each with a codebook of its own; divides the number of tokens."""
    temperature: float = 0.07
    """Softness of the posterior that is drawn from."""
    gumbel_temperature: float = 1.0
    """Softness of a draw: towards 0 it is one codeword, towards infinity the codebook's mean."""
    hard: bool = False
    """Draw one codeword, with the gradient of the soft draw, and use the likeliest one."""
    entropy_weight: float = 0.01
    """Weight of the entropy regulariser; 0 leaves it out."""
    entropy_temperature: float = 0.01
    """Temperature of the regulariser's own posterior."""
    entropy_per_codebook: bool = False
    """Ask each codebook for uniform use by itself instead of pooling all of them."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_codebook(self.codebook_size, self.num_codebooks)
        check_positive(
            temperature=self.temperature,
            gumbel_temperature=self.gumbel_temperature,
            entropy_temperature=self.entropy_temperature,
        )
        check_weight(entropy_weight=self.entropy_weight)


class Gumbel(CodebookQuantizer):
    """Each latent is a relaxed draw from the posterior over the codewords in training, its mean in use.

        q(c_k | z) = softmax_k(cos(z, c_k) / temperature)
        y          = softmax((log q + g) / gumbel_temperature),  g_k = -log(-log u_k)        arXiv:1611.01144, Eq. 2
        latent     = sum_k y_k c_k

    The largest of log q + g is codeword k with probability q(c_k | z) exactly, so y is nearly one-hot, and distributed
    like the posterior, where gumbel_temperature is small. With `hard` the draw is that codeword and its gradient to the
    encoder the soft draw's; in use it is the likeliest codeword. Otherwise the latent in use is the posterior's mean.

    Note:
        Each sample's noise comes from its key: [token, code] numbers, whatever the batch. The codebook learns both as
        the values that are mixed and through the logits.
    """

    def __init__(self, config: GumbelConfig, *, num_latent_tokens: int, latent_dim: int) -> None:
        sizes = {"num_latent_tokens": num_latent_tokens, "latent_dim": latent_dim}
        super().__init__(config.num_codebooks, config.codebook_size, **sizes)
        self.config = config

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return one draw of every latent and, where it has weight, the entropy regulariser.

        Noise and draw are computed again in the backward pass rather than kept until then.

        Args:
            latents_pre: The encoder's outputs.
            keys: Of the samples' noise; None draws new ones.
            softening: Multiplies gumbel_temperature, so that annealing it changes how soft a draw is and not which
                codewords are likely.

        Returns:
            Latents, and the loss terms by name.
        """
        keys = keys_or_fresh(keys, latents_pre)
        latents, averages = checkpoint(
            self._train, latents_pre, keys, softening, use_reentrant=False, preserve_rng_state=False
        )
        return latents, {} if averages is None else {"entropy": self.config.entropy_weight * entropy_of(*averages)}

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the mean of the posterior or, if `hard`, the likeliest codeword of every token."""
        if not self.config.hard:
            return super().encode(latents_pre)
        with float32(latents_pre):
            return self.lookup(self.indices(latents_pre))

    def _train(
        self, latents_pre: Tensor, keys: Tensor, softening: Tensor | float
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        config = self.config
        with float32(latents_pre):
            codewords = self._codewords()
            cosines = group(unit(latents_pre), self.num_codebooks) @ codewords.mT
            noise = -(-uniform(keys, latents_pre.shape[1], self.codebook_size).log()).log()
            noisy = cosines / config.temperature + group(noise, self.num_codebooks)
            draws = (noisy / (config.gumbel_temperature * softening)).softmax(dim=-1)
            if config.hard:
                one_hot = torch.zeros_like(draws).scatter_(-1, noisy.argmax(dim=-1, keepdim=True), 1.0)
                draws = one_hot + (draws - draws.detach())
            latents = ungroup(draws @ codewords, latents_pre.shape[0])
            if config.entropy_weight == 0:
                return latents, None
            pooled = not config.entropy_per_codebook
            return latents, entropy_averages(cosines / config.entropy_temperature, pooled=pooled)

    def _logits(self, latents_pre: Tensor) -> Tensor:
        return group(unit(latents_pre), self.num_codebooks) @ self._codewords().mT / self.config.temperature
