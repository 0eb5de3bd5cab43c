"""The two vision transformers that newer figures look through: DINOv2 for FD-DINOv2, CLIP for CMMD.

Both are timm's. What they see and what is read from them follows the papers that named the figures, 2306.04675 and
2401.09603 on arXiv: pictures are squeezed to the network's size with an antialiased bicubic, for DINOv2 in bytes as the
Pillow of those days did it, for CLIP in floats.
"""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from softvq.backbones import load_backbone
from softvq.errors import InputError
from softvq.files import read_tensors
from softvq.hub import fingerprint
from softvq.randomness import seed_of

__all__ = ["CLIP", "DINOV2", "SPATIAL_CHANNELS", "VisionTower", "clip_tower", "dinov2_tower", "load_whole"]

DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224
CLIP = "vit_large_patch14_clip_quickgelu_336.openai"
"""OpenAI trained with the quick approximation of GELU; timm's name without it has other features."""
SPATIAL_CHANNELS = 7
POSITION_OFFSET = 0.1
"""What the released DINOv2 adds to the side of the grid before it resamples positions."""


class VisionTower(nn.Module):
    """A timm vision transformer that resizes 8-bit pictures itself and gives its summary and its patch tokens.

    Args:
        network: The transformer, with a class token.
        size: Side in pixels of what it sees.
        rounds: Resize in bytes, as Pillow before 13: first across, then down, rounded and cut to 0 to 255 after each.
        projects: Give what the head makes of the class token, in place of the token itself.
        sha256: Fingerprint of the weights as they were read, before positions were fitted to the size.
    """

    def __init__(self, network: Any, *, size: int, rounds: bool, projects: bool, sha256: str) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.size, self.rounds, self.projects, self.sha256 = size, rounds, projects, sha256
        self.dim: int = network.num_classes if projects else network.embed_dim
        self.spatial_dim: int = network.patch_embed.num_patches * min(SPATIAL_CHANNELS, network.embed_dim)
        config = network.pretrained_cfg
        self.mean: Tensor
        self.deviation: Tensor
        for name, values in (("mean", config["mean"]), ("deviation", config["std"])):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    def seen(self, pixels: UInt8[Tensor, "batch 3 _height _width"]) -> Float[Tensor, "batch 3 _side _side"]:
        """Return what the transformer sees of pictures: resized without keeping the ratio of the sides, 0 to 255."""
        images = pixels.float()
        if images.shape[2:] == (self.size, self.size):
            return images
        for size in ((images.shape[2], self.size), (self.size, self.size)) if self.rounds else ((self.size,) * 2,):
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
            images = images.clamp(0, 255).round() if self.rounds else images
        return images

    def forward(
        self, pixels: UInt8[Tensor, "batch 3 _height _width"]
    ) -> tuple[Float[Tensor, "batch dim"], None, Float[Tensor, "batch place"]]:
        """Return the summary of each picture, no logits, and the first channels of all patch tokens, row by row."""
        tokens = self.network.forward_features((self.seen(pixels) - self.mean) / self.deviation)
        summary = self.network.forward_head(tokens) if self.projects else tokens[:, 0]
        patches = tokens[:, self.network.num_prefix_tokens :, :SPATIAL_CHANNELS]
        return summary, None, patches.flatten(1)


def dinov2_tower(weights: str | None, *, pretrained: bool) -> VisionTower:
    """Build DINOv2 ViT-L/14 (arXiv:2304.07193) for pictures of 224 px, with its normed class token as summary.

    Its positions are resampled as the authors' code does it: bicubic without antialiasing, the side of the grid taken
    to be 0.1 longer. timm's own way would shift all features a little.

    Args:
        weights: A .safetensors file of timm's state dict, or None for timm's download.
        pretrained: False without a file is a random network.

    Returns:
        The frozen tower, on the CPU.

    Raises:
        InputError: If the weights cannot be had.
    """
    known: Any = timm.get_pretrained_cfg(DINOV2)
    backbone = load_backbone(DINOV2, image_size=known.input_size[-1], weights=weights, pretrained=pretrained)
    network: Any = backbone.network
    found = fingerprint({}, network.state_dict())  # resampled numbers may differ in their last digits by machine
    positions, grid = network.pos_embed.detach(), network.patch_embed.grid_size
    network.set_input_size(img_size=(DINOV2_SIZE, DINOV2_SIZE))
    resampled = _positions(positions, grid, network.patch_embed.grid_size, prefix=network.num_prefix_tokens)
    network.pos_embed = nn.Parameter(resampled, requires_grad=False)
    return VisionTower(network, size=DINOV2_SIZE, rounds=True, projects=False, sha256=found)


def clip_tower(weights: str | None, *, pretrained: bool) -> VisionTower:
    """Build the image side of CLIP ViT-L/14 at 336 px (arXiv:2103.00020), with the projected embedding as summary.

    Args:
        weights: A .safetensors file of timm's state dict with its head, or None for timm's download.
        pretrained: False without a file is a random network.

    Returns:
        The frozen tower, on the CPU. Embeddings have their own length; CMMD takes them to length 1.

    Raises:
        InputError: If the weights cannot be had.
    """
    network = _created(CLIP, pretrained=pretrained and weights is None)
    if weights is not None:
        path = Path(weights)
        if path.suffix.lower() != ".safetensors":
            raise InputError(
                f"weights is {weights!r}, expected a .safetensors file with the state dict of timm's {CLIP}"
            )
        load_whole(network, read_tensors(path)[0], path, f"timm's {CLIP}")
    size: int = network.patch_embed.img_size[0]
    return VisionTower(network, size=size, rounds=False, projects=True, sha256=fingerprint({}, network.state_dict()))


def load_whole(network: nn.Module, state: dict[str, Tensor], path: Path, owner: str) -> None:
    """Copy a file's tensors into a network that must have the same ones.

    Args:
        network: Changed in place.
        state: By their names; counts of batches, which nothing reads, may be missing.
        path: Where they are from.
        owner: Whose tensors are expected.

    Raises:
        InputError: If one is missing, unknown, of another shape, or not finite.
    """
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(
        name
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name) and not name.endswith("num_batches_tracked")
    )
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape than {owner} has "
            f"({', '.join(wrong[:3])}); give a file of that network"
        )
    broken = sorted(name for name, tensor in state.items() if not bool(tensor.isfinite().all()))
    if broken:
        raise InputError(f"{path}: {', '.join(broken[:3])} hold numbers that are not finite")
    nn.Module.load_state_dict(network, state, strict=False)


def _positions(
    positions: Float[Tensor, "1 old dim"], old: tuple[int, int], new: tuple[int, int], *, prefix: int
) -> Float[Tensor, "1 new dim"]:
    if old == new:
        return positions
    grid = positions[:, prefix:].float().mT.unflatten(2, old)
    scale = tuple((after + POSITION_OFFSET) / before for after, before in zip(new, old, strict=True))
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([positions[:, :prefix], grid.flatten(2).mT], dim=1)


def _created(name: str, *, pretrained: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(0, "backbone", name))
        try:
            return timm.create_model(name, pretrained=pretrained)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"timm's weights of {name} cannot be had here ({type(error).__name__}); give weights, a .safetensors "
                "file with their state dict"
            ) from error
