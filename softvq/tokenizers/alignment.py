"""Alignment of latents with a frozen vision encoder (arXiv:2412.10958, section 3.3)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.tokenizers.codebooks import float32

__all__ = ["Projector", "alignment_loss"]


class Projector(nn.Sequential):
    """Latent channels to the teacher's: three linear layers with SiLU between them."""

    def __init__(self, latent_dim: int, hidden: int, teacher_dim: int) -> None:
        first, middle, last = nn.Linear(latent_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, teacher_dim)
        super().__init__(first, nn.SiLU(), middle, nn.SiLU(), last)


def alignment_loss(
    projected: Float[Tensor, "batch token channel"], features: Float[Tensor, "batch patch channel"]
) -> Float[Tensor, ""]:
    """Return minus the mean cosine similarity of every patch feature and its latent token.

        L_align = -(1/N) sum_n cos(y_n, MLP(z)_n)        arXiv:2412.10958, section 3

    Each token stands for a run of consecutive patches in raster order, `patches / tokens` of them.

    Args:
        projected: Latents through the projector.
        features: The teacher's patch features, a multiple of the tokens in number; no gradient flows to them.

    Returns:
        A scalar in [-1, 1].

    Raises:
        InputError: If the patches are no multiple of the tokens.
    """
    tokens, patches = projected.shape[1], features.shape[1]
    if patches % tokens:
        raise InputError(f"the teacher has {patches} patches, expected a multiple of the {tokens} latent tokens")
    with float32(projected):
        repeated = projected.float().repeat_interleave(patches // tokens, dim=1)
        return -torch.mean(F.cosine_similarity(repeated, features.detach().float(), dim=-1))
