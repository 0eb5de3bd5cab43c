"""A network to look at sets of images through that costs nothing: random products of the pixels, of any size."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from softvq.evaluation.extractors import SHORT, Extractor
from softvq.evaluation.set_features import SetFeatures

SIDE = 8
DIM, CATEGORIES, PLACES = 6, 5, 4


class Products(nn.Module):
    """Features, logits and spatial features are fixed matrices times the pixels, bent a little."""

    def __init__(self, side: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(side)
        count = 3 * side * side
        sizes = {"features": DIM, "logits": CATEGORIES, "spatial": PLACES}
        for name, size in sizes.items():
            self.register_buffer(name, torch.randn(count, size, generator=generator) * 4 / count**0.5)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = (pixels.double() / 127.5 - 1).flatten(1)
        features, logits, spatial = ((seen @ table.double()).float() for table in self.buffers())
        return features + features.sin(), logits, spatial


def network(*, side: int = SIDE, name: str = "Products", **changes: Any) -> Extractor:
    fields: dict[str, Any] = dict(
        name=name,
        dim=DIM,
        spatial_dim=PLACES,
        num_classes=CATEGORIES,
        sha256="ab" * 32,
        image_size=side,
        resize="none",
        is_fid_inception=False,
        published={},
        device=torch.device("cpu"),
        network=Products(side),
    )
    return Extractor(**(fields | changes))


def inception(**changes: Any) -> Extractor:
    """Return a network that says it is the Inception of FID."""
    said = {"name": "Inception", "is_fid_inception": True, "published": SHORT, "sha256": "6726825d" + "0" * 56}
    return network(**(said | changes))


def pictures(count: int, seed: int = 0, side: int = SIDE) -> Tensor:
    """Return pictures of two colours with noise, of which no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(40, 216, (count, 3, 1, 1), generator=generator)
    noise = torch.randint(-40, 40, (count, 3, side, side), generator=generator)
    return (colours + noise).to(torch.uint8)


def save_folder(folder: Path, pixels: Tensor) -> Path:
    folder.mkdir()
    for place, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(picture).save(folder / f"{place:04}.png")
    return folder


def save_npz(path: Path, pixels: Tensor) -> Path:
    np.savez(path, arr_0=pixels.permute(0, 2, 3, 1).numpy())
    return path


def seen(
    features: Tensor, by: Extractor, /, source: str = "set", logits: Tensor | None = None, **changes: Any
) -> SetFeatures:
    """Return a set of given features, with moments from numpy."""
    exact = features.double().numpy()
    fields: dict[str, Any] = dict(
        source=source,
        count=len(features),
        size=(SIDE, SIDE),
        pixels=None,
        extractor=by.name,
        extractor_sha256=by.sha256,
        mean=torch.from_numpy(exact.mean(0)),
        covariance=torch.from_numpy(np.cov(exact, rowvar=False)),
        spatial_mean=None,
        spatial_covariance=None,
        features=features,
        logits=logits,
        statistics_count=len(features),
    )
    return SetFeatures(**(fields | changes))
