"""Alignment of latents with a frozen vision encoder (arXiv:2412.10958, section 3.3; margins from arXiv:2501.01423)."""

import dataclasses
import functools
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.backbones import FrozenBackbone
from softvq.errors import InputError
from softvq.randomness import generator
from softvq.tokenizers.codebooks import check_weight, float32

__all__ = [
    "AlignmentConfig",
    "AlignmentMode",
    "Projector",
    "alignment_loss",
    "check_alignment",
    "distance_matrix_loss",
    "patch_features",
]

AlignmentMode: TypeAlias = Literal["repeat", "avg_1d", "avg_1d_shuffle", "global"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AlignmentConfig:
    """Ask of latents that a small MLP can tell a frozen vision encoder's features from them."""

    teacher: str = "vit_large_patch14_dinov2.lvd142m"
    """Name of a timm model, see `softvq.backbones.load_backbone`; the default is the released code's."""
    weights: str | None = None
    """A .safetensors file of the teacher's weights, or an installed package that has them; overrules `pretrained`."""
    pretrained: bool = True
    """Take timm's weights of the teacher; false is a random teacher."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """What the teacher computes in; `auto` is bf16 on CUDA and fp32 elsewhere."""
    mode: AlignmentMode = "repeat"
    """Which patches a token answers for, see `alignment_loss`; `repeat` is the released configuration's."""
    weight: float = 0.1
    """What the alignment counts in the loss."""
    hidden: int = 1024
    """Channels of the projector's two hidden layers."""
    cosine_margin: float | None = None
    """Pairs whose cosine is above 1 minus this are close enough; None has no margin (VA-VAE: 0.5)."""
    distance_weight: float = 0.0
    """What the distance matrix loss counts, in units of the alignment; 0 leaves it out (VA-VAE: 1)."""
    distance_margin: float = 0.25
    """Differences of cosines below this are close enough in the distance matrix loss."""
    adaptive: bool = False
    """Scale the alignment so that its gradient at the latents is as long as the reconstruction's, times `weight`."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.teacher:
            raise InputError("teacher is '', expected the name of a timm model")
        check_weight(weight=self.weight, distance_weight=self.distance_weight)
        if not 1 <= self.hidden <= 65536:
            raise InputError(f"hidden is {self.hidden}, expected 1 to 65536")
        for name, value in (("cosine_margin", self.cosine_margin), ("distance_margin", self.distance_margin)):
            if value is not None and not 0 <= value < 2:
                raise InputError(
                    f"{name} is {value}, expected 0 or more and less than 2, as cosines differ by 2 at most"
                )


class Projector(nn.Sequential):
    """Latent channels to the teacher's: three linear layers with SiLU between them."""

    def __init__(self, latent_dim: int, hidden: int, teacher_dim: int) -> None:
        first, middle, last = nn.Linear(latent_dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, teacher_dim)
        super().__init__(first, nn.SiLU(), middle, nn.SiLU(), last)


def alignment_loss(
    projected: Float[Tensor, "batch token channel"],
    features: Float[Tensor, "batch patch channel"],
    mode: AlignmentMode = "repeat",
    margin: float | None = None,
) -> Float[Tensor, ""]:
    """Compare latent tokens with the patch features they answer for, by cosine similarity, in float32.

        L_align = -(1/N) sum_n cos(y_n, MLP(z)_n)                  arXiv:2412.10958, section 3
        L_mcos  = (1/N) sum_n relu(1 - margin - cos(y_n, MLP(z)_n))    arXiv:2501.01423, with a margin

    Each token stands for a run of consecutive patches in raster order, `patches / tokens` of them. `repeat` compares it
    with every patch of its run; `avg_1d` with the run's mean; `avg_1d_shuffle` with the mean of a run after a
    permutation that is always the same, so that a token answers for places all over the picture; `global` compares the
    mean of all tokens with the mean of all patches.

    Args:
        projected: Latents through the projector.
        features: The teacher's patch features; no gradient flows to them.
        mode: Which features a token is compared with.
        margin: Cosines above 1 minus this cost nothing; None has no margin.

    Returns:
        A scalar in [-1, 1], with a margin in [0, 2 - margin]. The cosine of a zero vector is 0.

    Raises:
        InputError: If the patches are no multiple of the tokens (`global` takes any).
    """
    check_alignment(mode, projected.shape[1], features.shape[1])
    with float32(projected):
        tokens, patches = projected.float(), features.detach().float()
        if mode == "global":
            tokens = tokens.mean(1, keepdim=True)
        elif mode == "avg_1d_shuffle":
            patches = patches[:, _permutation(patches.shape[1], patches.device)]
        runs = patches.unflatten(1, (tokens.shape[1], -1))
        if mode != "repeat":
            runs = runs.mean(2, keepdim=True)
        cosines = torch.einsum("btc,btrc->btr", _unit(tokens), _unit(runs))
        return -cosines.mean() if margin is None else F.relu(1 - margin - cosines).mean()


def distance_matrix_loss(
    latents: Float[Tensor, "batch token dim"], features: Float[Tensor, "batch patch channel"], margin: float
) -> Float[Tensor, ""]:
    """Ask of a picture's tokens to be as similar to one another as the teacher's features are, in float32.

        L_mdms = (1/L^2) sum_ij relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin)        arXiv:2501.01423

    Args:
        latents: As they are, not projected: only their angles count.
        features: The teacher's patch features, averaged over each token's run; no gradient flows to them.
        margin: Differences of cosines below this cost nothing, 0 to 2.

    Returns:
        A scalar in [0, 2 - margin], zero where the angles agree.

    Raises:
        InputError: If the patches are no multiple of the tokens.
    """
    check_alignment("avg_1d", latents.shape[1], features.shape[1])
    with float32(latents):
        tokens = _unit(latents.float())
        runs = _unit(features.detach().float().unflatten(1, (latents.shape[1], -1)).mean(2))
        return F.relu((tokens @ tokens.mT - runs @ runs.mT).abs() - margin).mean()


def check_alignment(mode: AlignmentMode, tokens: int, patches: int) -> None:
    """Refuse tokens that cannot be compared with so many patches.

    Args:
        mode: Of `alignment_loss`.
        tokens: How many latent tokens a picture has.
        patches: How many patch features the teacher gives.

    Raises:
        InputError: If the mode is unknown, or the patches are no multiple of the tokens and the mode wants one.
    """
    if mode not in get_args(AlignmentMode):
        raise InputError(f"mode is {mode!r}, expected one of {', '.join(get_args(AlignmentMode))}")
    if mode != "global" and patches % tokens:
        raise InputError(
            f"the teacher has {patches} patches, expected a multiple of the {tokens} latent tokens; "
            "choose another teacher or mode global"
        )


@torch.no_grad()
def patch_features(
    backbone: FrozenBackbone, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch patch channel"]:
    """Return the backbone's last map of images in [-1, 1] as patches in raster order, without a gradient."""
    return backbone(images)[-1].flatten(2).mT


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=1e-6)


@functools.cache
def _permutation(length: int, device: torch.device) -> Tensor:
    # Kept on the device: copying it there at every step would wait for the device.
    with torch.inference_mode(False):
        return torch.randperm(length, generator=generator(0, "alignment", length)).to(device)
