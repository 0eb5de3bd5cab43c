"""The soft categorical posterior: what SoftVQ is (arXiv:2412.10958, section 3.2)."""

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


class SoftVQ(nn.Module):
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
        super().__init__()
        check_groups(num_latent_tokens, config.num_codebooks)
        self.config = config
        self.input_dim = latent_dim
        self.codebook = new_codebook(config.num_codebooks, config.codebook_size, latent_dim)

    def forward(
        self, latents_pre: Float[Tensor, "batch token dim"]
    ) -> tuple[Float[Tensor, "batch token dim"], dict[str, Tensor]]:
        """Return the mixtures of codewords and, where it has weight, the entropy regulariser.

        The posterior is computed again in the backward pass rather than kept until then.
        """
        latents, entropy = checkpoint(self._train, latents_pre, use_reentrant=False, preserve_rng_state=False)
        return latents, {} if entropy is None else {"entropy": entropy}

    def encode(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token dim"]:
        """Return the mixture of codewords of every token."""
        with float32(latents_pre):
            if self.config.similarity == "euclidean":
                return self._mixtures(*self._similarities(latents_pre), len(latents_pre))
            queries, codewords = self._vectors(latents_pre)
            scale = 1 / self.config.temperature
            mixtures = F.scaled_dot_product_attention(queries[None], codewords[None], codewords[None], scale=scale)
            return ungroup(mixtures[0], len(latents_pre))

    def posterior(self, latents_pre: Float[Tensor, "batch token dim"]) -> Float[Tensor, "batch token code"]:
        """Return `q(c_k | z)` of every token over the codewords of its own codebook; rows sum to 1."""
        with float32(latents_pre):
            return ungroup(self._grouped_posterior(latents_pre), len(latents_pre))

    def indices(self, latents_pre: Float[Tensor, "batch token dim"]) -> Int[Tensor, "batch token"]:
        """Return the likeliest codeword of every token, an index into its own codebook."""
        with torch.no_grad(), float32(latents_pre):
            similarities, _ = self._similarities(latents_pre)
            return ungroup(similarities.argmax(dim=-1, keepdim=True), len(latents_pre))[..., 0]

    def statistics(self, latents_pre: Float[Tensor, "batch token dim"]) -> dict[str, Tensor]:
        """Return usage, perplexity, posterior entropy and largest probability."""
        with torch.no_grad(), float32(latents_pre):
            return codebook_statistics(self._grouped_posterior(latents_pre))

    def _train(self, latents_pre: Tensor) -> tuple[Tensor, Tensor | None]:
        config = self.config
        with float32(latents_pre):
            similarities, codewords = self._similarities(latents_pre)
            latents = self._mixtures(similarities, codewords, len(latents_pre))
            if config.entropy_weight == 0:
                return latents, None
            logits = similarities / config.entropy_temperature
            logits = logits if config.entropy_per_codebook else logits.flatten(0, 1)[None]
            return latents, config.entropy_weight * entropy_loss(logits)

    def _similarities(self, latents_pre: Tensor) -> tuple[Tensor, Tensor]:
        """Return s(z, c_k), [codebook, sample, code], and the codewords."""
        queries, codewords = self._vectors(latents_pre)
        keys = codewords.detach() if self.config.detach_logits else codewords
        return queries @ keys.mT if self.config.similarity == "cosine" else -torch.cdist(queries, keys), codewords

    def _mixtures(self, similarities: Tensor, codewords: Tensor, batch: int) -> Tensor:
        return ungroup((similarities / self.config.temperature).softmax(dim=-1) @ codewords, batch)

    def _grouped_posterior(self, latents_pre: Tensor) -> Tensor:
        similarities, _ = self._similarities(latents_pre)
        return (similarities / self.config.temperature).softmax(dim=-1)

    def _vectors(self, latents_pre: Tensor) -> tuple[Tensor, Tensor]:
        queries, codewords = group(latents_pre.float(), self.config.num_codebooks), self.codebook.float()
        if self.config.similarity == "cosine":
            return F.normalize(queries, dim=-1), F.normalize(codewords, dim=-1)
        return queries, codewords
