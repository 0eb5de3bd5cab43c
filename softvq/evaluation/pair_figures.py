"""Figures about pairs of pictures, a photograph and what came back of it: as many numbers as there are pairs.

The pixels are those of files, of 8 bits: what is judged is what one would save.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.evaluation.metrics import legacy_ssim, mean_colour_psnr, ms_ssim, ssim
from softvq.hub import fingerprint
from softvq.losses.perceptual import load_perceptual

__all__ = ["DISTANCES", "LABELS", "Distance", "figure_names", "load_distance", "pair_figures"]

LABELS = {
    "mse": "mean squared error of 8-bit values",
    "psnr": "PSNR in dB",
    "mean_colour_psnr": "PSNR of the mean colour in dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "legacy_ssim": "legacy SSIM (too high; for old tables only)",
    "st_lpips": "ST-LPIPS (VGG16)",
    "lpips_vgg": "LPIPS (VGG16)",
    "lpips_alex": "LPIPS (AlexNet)",
}
"""How each figure must be called."""
LEAST_PX = {"ssim": 11, "ms_ssim": 176, "legacy_ssim": 7}
DISTANCES = {"st-lpips": 18, "lpips-vgg": 16, "lpips-alex": 31}
"""The least side in pixels that each perceptual distance can look at."""

Compare = Callable[[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 3 height width"]], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """A perceptual distance; `load_distance` gives it."""

    name: str
    """As it was asked for, without a file."""
    sha256: str
    """Of its tensors: name, type, shape and bytes, by name."""
    network: nn.Module = dataclasses.field(repr=False)
    """Maps two batches of RGB in [-1, 1] to one number for each pair, of any shape with so many elements."""

    @property
    def key(self) -> str:
        """What its figure is called in files."""
        return self.name.replace("-", "_")


def load_distance(text: str, size: tuple[int, int], device: torch.device | str = "cpu") -> Distance | None:
    """Load the perceptual distance that is asked for.

    Args:
        text: `none`; `st-lpips`, whose weights an installed package brings, or `st-lpips=FILE`; `lpips-vgg` or
            `lpips-alex` (arXiv:1801.03924, version 0.1), whose trunks torchvision may have to download.
        size: Height and width of the pictures in pixels.
        device: Where it is to compute.

    Returns:
        The frozen distance, or None for `none`.

    Raises:
        InputError: If there is no such distance, its weights cannot be had, or the pictures are too small for it.
    """
    name, equals, path = text.partition("=")
    if name == "none" and not equals:
        return None
    if name not in DISTANCES or (equals and name != "st-lpips"):
        raise InputError(
            f"--perceptual is {text!r}, expected auto, none, st-lpips, st-lpips=FILE, lpips-vgg or lpips-alex"
        )
    if min(size) < DISTANCES[name]:
        raise InputError(
            f"images are {size[0]}x{size[1]} px, expected at least {DISTANCES[name]} px a side for {name}; give a "
            "larger --size, or --perceptual none"
        )
    if name == "st-lpips":
        if equals and not path:
            raise InputError("--perceptual is 'st-lpips=', expected a .safetensors file after the =")
        network: nn.Module = load_perceptual(path or None)
    else:
        network = _lpips(name)
    return Distance(name=name, sha256=fingerprint({}, network.state_dict()), network=network.to(device).eval())


def figure_names(size: tuple[int, int], distance: Distance | None) -> list[str]:
    """Return what `pair_figures` says of pictures.

    Args:
        size: Height and width in pixels; SSIM needs 11, MS-SSIM 176, the legacy SSIM 7 a side.
        distance: A perceptual distance, if there is one.

    Returns:
        Keys of `LABELS`, in order.
    """
    names = ["mse", "psnr", "mean_colour_psnr"]
    names += [name for name, least in LEAST_PX.items() if min(size) >= least]
    return names if distance is None else [*names, distance.key]


@torch.no_grad()
def pair_figures(
    originals: UInt8[Tensor, "batch 3 height width"],
    reconstructions: UInt8[Tensor, "batch 3 height width"],
    distance: Distance | None = None,
) -> dict[str, Float64[Tensor, " batch"]]:
    """Return the figures of each pair.

        mse = mean (a - b)^2,   PSNR = 10 log10(255^2 / max(mse, 1 / (3 H W)))

    Both are exact: whole numbers are summed. Equal pictures have the PSNR of those that differ by one level in one
    value, 101 dB at 256 px, so that there is a mean over all. The others are computed in float32, see
    `softvq.evaluation.metrics` and `whole_float32`.

    Args:
        originals: RGB.
        reconstructions: As many, of the same size and on the same device.
        distance: A perceptual distance on that device.

    Returns:
        The figures that `figure_names` has, on that device, all finite if the distance is.
    """
    error = (originals.short() - reconstructions.short()).int().square().sum((1, 2, 3), dtype=torch.int64)
    values = originals[0].numel()
    mse = error.double() / values
    a, b = (pixels.float() / 127.5 - 1 for pixels in (reconstructions, originals))
    found = {"mse": mse, "psnr": 10 * torch.log10(255**2 / mse.clamp(min=1 / values))}
    with torch.autocast(originals.device.type, enabled=False):
        whole = {"ssim": ssim, "ms_ssim": ms_ssim, "legacy_ssim": legacy_ssim}
        for name in figure_names((originals.shape[2], originals.shape[3]), distance):
            if name in whole:
                found[name] = whole[name](a, b).double()
            elif name == "mean_colour_psnr":
                found[name] = mean_colour_psnr(b).double()
            elif distance is not None and name == distance.key:
                found[name] = distance.network(a, b).reshape(len(a)).double()
    return found


def _lpips(name: str) -> nn.Module:
    kind: Literal["vgg", "alex"] = "vgg" if name == "lpips-vgg" else "alex"
    trunk = "vgg16" if kind == "vgg" else "alexnet"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torchvision is going to change
            metrics: Any = _torchmetrics_lpips()
            network = metrics(net_type=kind).net
    except Exception as error:  # a download fails in every way there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--perceptual is {name}, but torchvision's {trunk} or torchmetrics' weights on it cannot be had "
            f"({reason}); fetch the trunk where there is a network, or give --perceptual st-lpips"
        ) from error
    assert isinstance(network, nn.Module)
    return network.requires_grad_(False)


def _torchmetrics_lpips() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity
