"""Discriminators: pictures to logits, high where a picture is taken for a photograph.

None of them looks from one picture to those on other ranks, and none changes its buffers in a forward pass. Forward
passes may therefore be repeated, as activation checkpointing does, left out, or spread over ranks; where a weight is
divided by its spectral norm, the estimate of the norm moves only in `Discriminator.advance`.
"""

import dataclasses
import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from softvq.backbones import load_backbone
from softvq.errors import InputError
from softvq.losses.augment import view
from softvq.losses.spectral import SpectralConv1d

__all__ = [
    "DinoConfig",
    "DinoDiscriminator",
    "Discriminator",
    "DiscriminatorConfig",
    "PatchGAN",
    "PatchGANConfig",
    "StyleGAN",
    "StyleGANConfig",
    "TokenHead",
    "build_discriminator",
    "group_deviation",
]

Images = Float[Tensor, "batch 3 height width"]
Keys = Int64[Tensor, " batch"]
Logits = Float[Tensor, "batch n"]
SLOPE = 0.2  # of every leaky rectifier below zero


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DinoConfig:
    """Light heads on the features of a frozen vision network; the released code's choice."""

    kind: Literal["dino"] = "dino"
    backbone: str = "vit_small_patch16_224.dino"
    """Name of the frozen network in timm: a vision transformer or a convolutional network."""
    weights: str | None = None
    """File or installed package with the frozen network's weights; null takes timm's, from the Hugging Face Hub."""
    pretrained: bool = True
    """Use trained weights; random ones are for tests only."""
    layers: tuple[int, ...] = (0, 3, 6, 9, 12)
    """What the heads read. Of a transformer: 0 is the tokens before the first block, i those after block i."""
    image_size: int = 224
    """Side in pixels that the frozen network sees; larger pictures are cropped or shrunk, smaller ones enlarged."""
    kernel: int = 9
    """Neighbouring tokens in raster order that the heads' second layer sees; odd."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.layers:
            raise InputError("layers is empty, expected at least one layer for the discriminator to read")
        _check_range(1, 4096, image_size=self.image_size)
        _check_range(1, 255, kernel=self.kernel)
        if self.kernel % 2 == 0:
            raise InputError(f"kernel is {self.kernel}, expected an odd number")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PatchGANConfig:
    """Plain convolutions that judge overlapping patches (arXiv:1611.07004)."""

    kind: Literal["patchgan"] = "patchgan"
    width: int = 64
    """Channels after the first layer; they double with every halving up to eight times as many."""
    depth: int = 3
    """Layers that halve the picture: 3 judges patches of 70 px."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_range(1, 4096, width=self.width)
        _check_range(1, 8, depth=self.depth)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StyleGANConfig:
    """Residual network that judges whole pictures (arXiv:1912.04958)."""

    kind: Literal["stylegan"] = "stylegan"
    width: int = 128
    """Channels at full size; they double with every halving up to `max_width`. The paper has 128 at 256 px."""
    max_width: int = 512
    """Most channels."""
    group: int = 4
    """Most neighbouring samples whose deviation is shown to the last layers; 1 shows none."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        _check_range(1, 4096, width=self.width, max_width=self.max_width)
        _check_range(1, 1024, group=self.group)


DiscriminatorConfig = DinoConfig | PatchGANConfig | StyleGANConfig


class Discriminator(nn.Module):
    """What all discriminators share: `discriminator(images, keys)` gives logits [batch, n] in float32."""

    def forward(self, images: Images, keys: Keys) -> Logits:
        """Judge pictures.

        Args:
            images: RGB, in [-1, 1] or a little beyond it.
            keys: One for each sample, for what is drawn at random; the same keys draw the same.

        Returns:
            Logits in float32 under autocast too, high for what looks real, n of them for every picture.
        """
        raise NotImplementedError

    @torch.no_grad()
    def advance(self) -> None:
        """Follow the weights' spectral norms by a step.

        Call it once after every update, and never between a forward pass and its backward pass.
        """
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.advance()


class TokenHead(nn.Module):
    """Features of one layer, [batch, channel, rows, columns], to a logit for every place in raster order."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.inward = SpectralConv1d(channels, channels)
        self.inward_norm = _group_norm(channels)
        self.around = SpectralConv1d(channels, channels, kernel)
        self.around_norm = _group_norm(channels)
        self.logit = SpectralConv1d(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Judge every place."""
        places = features.flatten(2).to(self.inward.weight.dtype)
        hidden = F.leaky_relu(self.inward_norm(self.inward(places)), SLOPE)
        around = F.leaky_relu(self.around_norm(self.around(hidden)), SLOPE)
        return _in_float32(self.logit, (hidden + around) * math.sqrt(0.5)).flatten(1)


class DinoDiscriminator(Discriminator):
    """A head on each of several layers of a frozen vision network, by default DINO's ViT-S/16 (arXiv:2104.14294).

    A head is a convolution of width 1, a residual one over neighbouring tokens, and one to a logit, all spectrally
    normalised (arXiv:2301.09515 has such heads). The class token, where there is one, is added to every patch token.
    Its five default heads have 7,386,245 parameters, as many as the released code's.

    Args:
        config: The network, its layers and the heads.
        dtype: Of the frozen network's weights and computation, in which autocast has no say.

    Note:
        The released heads normalise over the batch on all ranks. That ties a picture's logit to whatever else is in the
        batch, needs a process group, and changes running statistics in every pass; groups of channels within a picture
        (GroupNorm) do none of this. The released code also sets the bias of DINO's attention keys to zero; it adds the
        same number to all logits of a query, so that the softmax over the keys is the same without.
    """

    def __init__(self, config: DinoConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.backbone = load_backbone(
            config.backbone,
            image_size=config.image_size,
            layers=config.layers,
            pretrained=config.pretrained,
            weights=config.weights,
            dtype=dtype,
        )
        self.backbone.add_class_token = self.backbone.is_vit and self.backbone.network.cls_token is not None
        if self.backbone.patches < config.kernel // 2:
            most = 2 * self.backbone.patches + 1
            raise InputError(
                f"kernel is {config.kernel}, expected at most {most} for the last of layers {config.layers}"
            )
        self.heads = nn.ModuleList(TokenHead(channels, config.kernel) for channels in self.backbone.channels)

    def forward(self, images: Images, keys: Keys) -> Logits:
        """Judge pictures of any size; the keys choose crop or shrunken whole for larger ones than the network's."""
        maps = self.backbone(view(images, keys, self.config.image_size))
        return torch.cat([head(features) for head, features in zip(self.heads, maps, strict=True)], dim=1)


class PatchGAN(Discriminator):
    """Convolutions of 4x4 that judge overlapping patches (arXiv:1611.07004, section 6.1.2).

    The paper's batch normalisation is replaced by one over groups of channels within a picture.
    """

    def __init__(self, config: PatchGANConfig, *, image_size: int) -> None:
        smallest = 3 << config.depth
        if image_size < smallest:
            depth = config.depth
            raise InputError(
                f"image_size is {image_size}, expected at least {smallest} for a PatchGAN of depth {depth}"
            )
        super().__init__()
        widths = [config.width * min(2**i, 8) for i in range(config.depth + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i, (before, width) in enumerate(itertools.pairwise(widths), start=1):
            stride = 1 if i == config.depth else 2
            layers += [nn.Conv2d(before, width, 4, stride, padding=1, bias=False)]
            layers += [_group_norm(width), nn.LeakyReLU(SLOPE)]
        self.trunk = nn.Sequential(*layers)
        self.logit = nn.Conv2d(widths[-1], 1, 4, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Images, keys: Keys) -> Logits:
        """Judge every patch of the pictures; nothing is drawn from the keys."""
        return _in_float32(self.logit, self.trunk(images)).flatten(1)


class StyleGAN(Discriminator):
    """The residual discriminator of StyleGAN2 (arXiv:1912.04958): one logit for the whole picture.

    Every weight is scaled at run time by 1 / sqrt(inputs) (equalised learning rate, arXiv:1710.10196), and pictures are
    blurred by [1, 3, 3, 1] before they are halved.

    Note:
        The deviation over groups of neighbouring samples (`group_deviation`) is all that one sample knows of another.
        Ranks whose batch is a multiple of the group give the logits of one rank with the whole batch.
    """

    def __init__(self, config: StyleGANConfig, *, image_size: int) -> None:
        if image_size < 8 or image_size & (image_size - 1):
            raise InputError(f"image_size is {image_size}, expected a power of two from 8, or kind dino or patchgan")
        super().__init__()
        self.image_size, self.group = image_size, config.group
        halvings = image_size.bit_length() - 3  # down to 4x4
        widths = [min(config.width << i, config.max_width) for i in range(halvings + 1)]
        self.from_rgb = EqualConv2d(3, widths[0], 1)
        self.blocks = nn.ModuleList(HalvingBlock(*pair) for pair in itertools.pairwise(widths))
        self.judge = EqualConv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.whole = EqualConv2d(widths[-1], widths[-1], 4)
        self.logit = EqualConv2d(widths[-1], 1, 1)

    def forward(self, images: Images, keys: Keys) -> Logits:
        """Judge pictures of the size it was built for; nothing is drawn from the keys, and n is 1."""
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            found = "x".join(map(str, images.shape[2:]))
            raise InputError(f"images are {found} px, expected {self.image_size} px for this StyleGAN discriminator")
        hidden = _rectified(self.from_rgb(images))
        for block in self.blocks:
            hidden = block(hidden)
        deviation = group_deviation(hidden, self.group).to(hidden.dtype)
        deviation = deviation[:, None, None, None].expand(-1, 1, *hidden.shape[2:])
        hidden = _rectified(self.judge(torch.cat([hidden, deviation], dim=1)))
        return _in_float32(self.logit, _rectified(self.whole(hidden))).flatten(1)


class HalvingBlock(nn.Module):
    """Two convolutions, the second at half the size, beside a linear path, divided by sqrt(2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = EqualConv2d(inputs, inputs, 3, padding=1)
        self.second = EqualConv2d(inputs, outputs, 3, stride=2)
        self.skip = EqualConv2d(inputs, outputs, 1, bias=False)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.kernel: Tensor
        self.register_buffer("kernel", taps[:, None] * taps, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = _rectified(self.second(self._blur(_rectified(self.first(x)), padding=2)))
        return (hidden + self.skip(self._blur(x, padding=1, stride=2))) * math.sqrt(0.5)

    def _blur(self, x: Tensor, padding: int, stride: int = 1) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=stride, padding=padding, groups=x.shape[1])


class EqualConv2d(nn.Module):
    """Convolution whose weight is drawn from the standard normal and divided by sqrt(inputs * kernel^2) in use."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.scale = stride, padding, (inputs * kernel**2) ** -0.5
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, self.stride, self.padding)


def group_deviation(hidden: Float[Tensor, "batch channel height width"], group: int) -> Float[Tensor, "batch"]:
    """Return the standard deviation over `group` neighbouring samples, averaged over all their values.

    The largest divisor of the batch up to `group` is taken. It is float32, and 1e-4 where all samples are equal.
    """
    size = max(n for n in range(1, group + 1) if len(hidden) % n == 0)
    with torch.autocast(hidden.device.type, enabled=False):
        variance = hidden.float().unflatten(0, (-1, size)).var(dim=1, correction=0)
        deviation = (variance + 1e-8).sqrt().mean(dim=(1, 2, 3))  # the summand keeps the slope finite at 0
    return deviation.repeat_interleave(size)


def build_discriminator(
    config: DiscriminatorConfig, *, image_size: int, dtype: torch.dtype = torch.float32
) -> Discriminator:
    """Return the discriminator that `config` describes, on the CPU.

    Args:
        config: Its kind and sizes.
        image_size: Side in pixels of the square pictures it will judge.
        dtype: Of a frozen network inside it; what is trained has float32 weights and follows autocast.

    Returns:
        A discriminator, to be called as `discriminator(images, keys)`.

    Raises:
        InputError: If it cannot judge pictures of that size, or its frozen network cannot be had.
    """
    match config:
        case DinoConfig():
            return DinoDiscriminator(config, dtype=dtype)
        case PatchGANConfig():
            return PatchGAN(config, image_size=image_size)
        case StyleGANConfig():
            return StyleGAN(config, image_size=image_size)


def _rectified(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE) * math.sqrt(2)  # keeps the size of activations


def _group_norm(channels: int) -> nn.GroupNorm:
    # at least four channels in a group: of a channel alone its mean, what the picture has of it, would be lost
    return nn.GroupNorm(math.gcd(32, channels, max(channels // 4, 1)), channels)


def _in_float32(layer: nn.Module, hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.float())


def _check_range(smallest: int, largest: int, **values: int) -> None:
    for name, value in values.items():
        if not smallest <= value <= largest:
            raise InputError(f"{name} is {value}, expected {smallest} to {largest}")
