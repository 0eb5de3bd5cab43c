"""The soft categorical posterior: what SoftVQ is (arXiv:2412.10958, section 3.2)."""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
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

__all__ = ["SoftVQ", "SoftVQConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SoftVQConfig:
    """The soft categorical posterior of the paper, as released."""

    kind: Literal["softvq"] = "softvq"
    codebook_size: int = 8192
    """Codewords K in each codebook."""
    num_codebooks: int = 4
    """Groups of consecutive tokens, each with a codebook of its own; divides the number of tokens."""
    temperature: float = 0.07
    """Softness of the posterior: towards 0 it is VQ, towards infinity every latent is the codebook's mean."""
    similarity: Literal["cosine", "euclidean"] = "cosine"
    """`cosine` is the released code's, `euclidean` the paper's Eq. 4; see `SoftVQ`."""
    detach_logits: bool = True
    """Stop the gradient from the posterior to the codebook, as the released code does; the paper learns it directly."""
    entropy_weight: float = 0.01
    """Weight of the entropy regulariser; 0 leaves it out."""
    entropy_temperature: float = 0.01
    """Temperature of the regulariser's own posterior."""
    entropy_per_codebook: bool = False
    """Ask each codebook for uniform use by itself; the released code pools all of them."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_codebook(self.codebook_size, self.num_codebooks)
        check_positive(temperature=self.temperature, entropy_temperature=self.entropy_temperature)
        check_weight(entropy_weight=self.entropy_weight)


class SoftVQ(CodebookQuantizer):
    """Each latent is its posterior's mean over the codewords: differentiable, continuous, with no codebook loss.

        q(c_k | z) = softmax_k(s(z, c_k) / temperature)        arXiv:2412.10958, Eq. 4
        latent     = sum_k q(c_k | z) c_k                      arXiv:2412.10958, section 3

    with s the cosine similarity (released code) or minus the Euclidean distance of the raw vectors (paper).

    Note:
        On the unit sphere cos(z, c) = 1 - |z - c|^2 / 2, so the released posterior is one of squared distances. With
        `cosine` the codewords are unit vectors, and the latents, their mixtures, lie inside the unit ball; they are not
        normalised again. The whole step is attention from tokens to codewords, which in use a fused kernel computes
        without ever holding the [tokens, K] posterior.
    """

    def __init__(self, config: SoftVQConfig, *, num_latent_tokens: int, latent_dim: int) -> None:
        sizes = {"num_latent_tokens": num_latent_tokens, "latent_dim": latent_dim}
        super().__init__(config.num_codebooks, config.codebook_size, **sizes)
        self.config = config

    def forward(
        self,
        latents_pre: Float[Tensor, "batch token dim"],
        keys: Int64[Tensor, " batch"] | None = None,
        softening: Float[Tensor, ""] | float = 1.0,
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the mixtures of codewords and, where it has weight, the entropy regulariser.

        The posterior is computed again in the backward pass rather than kept until then.

        Args:
            latents_pre: The encoder's outputs.
            keys: Not used: nothing is random here.
            softening: Multiplies the temperature.

        Returns:
            Latents, and the loss terms by name.
        """
        latents, averages = checkpoint(
            self._train, latents_pre, softening, use_reentrant=False, preserve_rng_state=False
        )
        return latents, {} if averages is None else {"entropy": self.config.entropy_weight * entropy_of(*averages)}

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the mixture of codewords of every token."""
        if self.config.similarity == "euclidean":
            return super().encode(latents_pre)
        with float32(latents_pre):
            queries, codewords = group(unit(latents_pre), self.num_codebooks), self._codewords()
            scale = 1 / self.config.temperature
            mixtures = F.scaled_dot_product_attention(queries[None], codewords[None], codewords[None], scale=scale)
            return ungroup(mixtures[0], latents_pre.shape[0])

    def _train(self, latents_pre: Tensor, softening: Tensor | float) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        config = self.config
        with float32(latents_pre):
            codewords = self._codewords()
            similarities = self._similarities(latents_pre, codewords)
            posterior = (similarities / (config.temperature * softening)).softmax(dim=-1)
            latents = ungroup(posterior @ codewords, latents_pre.shape[0])
            if config.entropy_weight == 0:
                return latents, None
            pooled = not config.entropy_per_codebook
            return latents, entropy_averages(similarities / config.entropy_temperature, pooled=pooled)

    def _similarities(self, latents_pre: Tensor, codewords: Tensor) -> Tensor:
        """Return s(z, c_k), [codebook, sample, code]."""
        codewords = codewords.detach() if self.config.detach_logits else codewords
        if self.config.similarity == "cosine":
            return group(unit(latents_pre), self.num_codebooks) @ codewords.mT
        return -torch.cdist(group(latents_pre.float(), self.num_codebooks), codewords)

    def _logits(self, latents_pre: Tensor) -> Tensor:
        return self._similarities(latents_pre, self._codewords()) / self.config.temperature

    def _codewords(self) -> Tensor:
        return unit(self.codebook) if self.config.similarity == "cosine" else self.codebook.float()
