"""How far a frozen vision network takes a reconstruction to be from its photograph.

A perceptual distance of a network trained for textures and edges says little of what a picture shows; one of a network
that names things keeps petals petals.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.backbones import load_backbone
from softvq.config import check_finite
from softvq.errors import InputError
from softvq.losses.perceptual import feature_distance

__all__ = ["SemanticConfig", "SemanticDistance"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SemanticConfig:
    """A distance of the features of a frozen vision network, added to the perceptual distance and scheduled with it."""

    weight: float = 1.0
    """What it counts beside the perceptual distance, whose weight is that of both."""
    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    """Name of the frozen network in timm: a vision transformer or a convolutional network."""
    weights: str | None = None
    """File or installed package with the frozen network's weights; null takes timm's, from the Hugging Face Hub."""
    pretrained: bool = True
    """Use trained weights; random ones are for tests only."""
    layers: tuple[int, ...] = (3, 6, 9, 12)
    """What is compared, each counting alike. Of a transformer: i is the tokens after block i."""
    image_size: int = 224
    """Side in pixels that a transformer sees; a convolutional network sees pictures as they are."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_finite(self)
        if not self.weight > 0:
            raise InputError(f"weight is {self.weight}, expected more than 0; leave semantic out to train without")
        if not self.layers:
            raise InputError("layers is empty, expected at least one layer to compare")
        if not 1 <= self.image_size <= 4096:
            raise InputError(f"image_size is {self.image_size}, expected 1 to 4096")


class SemanticDistance(nn.Module):
    """One minus the cosine of two pictures' features, averaged over the places of a map and over the layers.

    Args:
        config: The network and its layers.
        dtype: Of the network's weights and computation, in which autocast has no say; the cosines are float32.

    Raises:
        InputError: If the network cannot be had or has no such layers.
    """

    def __init__(self, config: SemanticConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.backbone = load_backbone(
            config.backbone,
            image_size=config.image_size,
            layers=config.layers,
            pretrained=config.pretrained,
            weights=config.weights,
            dtype=dtype,
        )

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch"]:
        """Compare pictures.

        Args:
            images: RGB, in [-1, 1] or a little beyond it; gradients flow to them.
            targets: What they should show; no gradient flows to them.

        Returns:
            A number from 0, alike, to 2 for each pair.
        """
        with torch.no_grad():
            expected = self.backbone(targets)
        pairs = zip(self.backbone(images), expected, strict=True)
        # half the squared distance on the unit sphere is one minus the cosine
        halves = [feature_distance(a, b, torch.full((a.shape[1],), 0.5, device=a.device)) for a, b in pairs]
        return torch.stack(halves).mean(0)
