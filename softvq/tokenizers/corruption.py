"""What training may hide from a tokenizer so that its latents become better ones; nothing of it happens in use.

Every draw belongs to its sample's key, but the number of tokens kept, which one step shares.
"""

import dataclasses

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.randomness import fold_in, normal, uniform

__all__ = ["CorruptionConfig", "noisy", "patch_mask", "token_counts"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CorruptionConfig:
    """How much is hidden; nothing by default."""

    mask_ratio: tuple[float, float] = (0.0, 0.0)
    """Each image hides a share of its patches from the encoder, drawn evenly between these two; below 0 counts as 0.
    MAETok (arXiv:2502.03444) has -0.1 and 0.6."""
    latent_noise: float = 0.0
    """Largest strength of the noise mixed into the latents, in units of their deviation (l-DeTok, arXiv:2507.15856)."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        low, high = self.mask_ratio
        if not -1 <= low <= high < 1:
            raise InputError(f"mask_ratio is {list(self.mask_ratio)}, expected two rising numbers from -1 to below 1")
        if not 0 <= self.latent_noise <= 100:
            raise InputError(f"latent_noise is {self.latent_noise}, expected 0 to 100")


def patch_mask(
    keys: Int64[Tensor, " batch"], num_patches: int, ratio: tuple[float, float]
) -> Bool[Tensor, "batch patch"]:
    """Draw which patches of each image are hidden.

    Args:
        keys: One for each image.
        num_patches: Patches of an image.
        ratio: Least and greatest share; each image draws its own in between and hides that share, rounded down.

    Returns:
        True for the hidden ones.
    """
    low, high = ratio
    share = (low + (high - low) * uniform(fold_in(keys, 0), 1)).clamp(min=0)
    order = uniform(fold_in(keys, 1), num_patches).argsort(dim=1).argsort(dim=1)
    return order < (share * num_patches).floor()


def noisy(
    latents: Float[Tensor, "batch token dim"], keys: Int64[Tensor, " batch"], strength: float
) -> Float[Tensor, "batch token dim"]:
    """Mix noise into latents, a random amount for each image.

        z <- (1 - t) z + t strength deviation(z) e      arXiv:2507.15856, section 3; t uniform in (0, 1), e normal

    The deviation is that of the image's own latents, where the paper's latents have deviation 1.

    Args:
        latents: In float32.
        keys: One for each image.
        strength: Of the noise at t = 1.

    Returns:
        Latents of the same shape.
    """
    t = uniform(fold_in(keys, 0), 1, 1)
    deviation = latents.detach().std(dim=(1, 2), correction=0, keepdim=True)
    return (1 - t) * latents + t * strength * deviation * normal(fold_in(keys, 1), *latents.shape[1:])


def token_counts(least: int, most: int) -> list[int]:
    """Return the numbers of tokens that nested training keeps: the least, doubled up to the most, and that.

    >>> token_counts(16, 64)
    [16, 32, 64]
    """
    counts = []
    while least < most:
        counts.append(least)
        least *= 2
    return [*counts, most]
