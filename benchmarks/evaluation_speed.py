"""Compare the time it takes to score images with the time that the feature network alone needs for them.

    python benchmarks/evaluation_speed.py --count 10000 --device cuda

Images are noise in an .npz file as ADM writes them, and the networks have random weights, which makes no difference to
the time. Scoring is everything: reading, features, and all figures against a reference of as many images, whose
features are there already; `with reference` counts those too.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from softvq.evaluation import extractors
from softvq.evaluation.extractors import Extractor, extractor
from softvq.evaluation.image_sets import open_images
from softvq.evaluation.set_features import set_features
from softvq.evaluation.set_figures import set_figures

COLUMNS = ("forward alone, s", "images/s", "scored, s", "ratio", "with reference, s")
WARM = 3


def network(kind: str, device: torch.device) -> Extractor:
    """Build a feature network with random weights."""
    if kind != "inception":
        return extractor(f"timm:{kind}", pretrained=False, device=device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(extractors._unloaded(FeatureExtractorInceptionV3).state_dict(), path)
        return extractor("inception", weights=path, device=device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(kind: str, paths: list[Path], device: torch.device, batch_size: int, workers: int) -> list[str]:
    """Return a row of the table."""
    look = network(kind, device)
    images = [open_images(path) for path in paths]
    pixels = torch.randint(0, 256, (batch_size, 3, 256, 256), dtype=torch.uint8, device=device)
    batches = images[0].count // batch_size

    def forward() -> None:
        for _ in range(batches):
            look.look_pixels(pixels)

    for _ in range(WARM):
        look.look_pixels(pixels)
    alone = timed(forward, device) * images[0].count / (batches * batch_size)

    def features(place: int) -> list[object]:
        return set_features(images[place], [look], batch_size=batch_size, workers=workers)

    found: list[object] = []
    reference_seconds = timed(lambda: found.append(features(0)[0]), device)
    set_figures(found[0], features(1)[0], look)  # the first use of a library's routine takes a second more

    def score() -> None:
        set_figures(found[0], features(1)[0], look)

    scored = timed(score, device)
    values = (alone, images[0].count / alone, scored, scored / alone, scored + reference_seconds)
    return [look.name, *(f"{value:.4g}" for value in values)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=["inception", "tf_efficientnet_lite2"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    title = f"{arguments.count} images of 256 px, {machine}, torch {torch.__version__}, float32"
    table = Table("network", *COLUMNS, title=title)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.npz" for name in ("reference", "samples")]
        for seed, path in enumerate(paths):
            draws = np.random.default_rng(seed)
            np.savez(path, arr_0=draws.integers(0, 256, (arguments.count, 256, 256, 3), dtype=np.uint8))
        for kind in arguments.networks:
            table.add_row(*measure(kind, paths, device, arguments.batch_size, arguments.workers))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
