"""Features of pictures for figures about many of them: the last map of a frozen network, averaged over its places."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from softvq.backbones import FrozenBackbone
from softvq.errors import InputError

__all__ = ["pooled_features"]


@torch.no_grad()
def pooled_features(
    backbone: FrozenBackbone, batches: Iterable[Float[Tensor, "_batch 3 _height _width"]]
) -> Float[Tensor, "sample dim"]:
    """Return one feature vector for each picture: the mean over all places of the backbone's last map.

    Args:
        backbone: As `load_backbone` returns it, on the device that is to compute.
        batches: RGB in [-1, 1], of any device.

    Returns:
        Float32 features on the CPU, in the order of the pictures.

    Raises:
        InputError: If there are no pictures.
    """
    device = backbone.shift.device
    found = [backbone(images.to(device))[-1].float().mean((2, 3)).cpu() for images in batches]
    if not found:
        raise InputError("batches is empty, expected pictures")
    return torch.cat(found)
