"""Train every quantizer for the same time on the same photographs and compare what they reconstruct.

    python benchmarks/quantizers.py [--data FOLDER] [--preset softvq-tiny-16] [--tokens 64] [--minutes 0.5]

`FOLDER` holds `train` and `val`; without it the bundled photographs are taken. Of each quantizer the time of one update
is measured first, which gives the number of updates that fit into the time, and so its whole schedule. All else is
equal: seed, transformers, photographs in their order, losses, optimizer. Trainings that share a device (`--at-once`)
share its time unevenly; `--updates` gives all the same number of updates instead.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from softvq.config import from_dict
from softvq.data.folder import DataConfig, PhotoFolder, batches
from softvq.evaluation.metrics import psnr, ssim
from softvq.losses.perceptual import load_perceptual
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.rehearsal import rehearse
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset
from softvq.training.tokenizer_run import train_tokenizer

PHOTOS = Path(__file__).parents[1] / "softvq" / "assets" / "photos"
MEASURED = {"PSNR": "PSNR", "SSIM": "SSIM", "LPIPS": "LPIPS", "usage": "usage", "perplexity": "perplexity"}
MEASURED |= {"entropy": "posterior_entropy"}
COLUMNS = (*MEASURED, "images/s", "GiB", "updates", "minutes")


def quantizers(size: int, parts: int) -> dict[str, dict[str, Any]]:
    """Return what is compared: codebooks of one size, split into `parts` where a quantizer splits anything."""
    soft = {"kind": "softvq", "codebook_size": size, "num_codebooks": parts}
    one = {**soft, "num_codebooks": 1}
    hard = {"kind": "vq", "codebook_size": size}
    return {
        "softvq": soft,
        "softvq, 1 codebook": one,
        "softvq, 1 codebook, temperature 0.15": {**one, "temperature": 0.15},
        "vq": hard,
        "kl": {"kind": "kl"},
        "none": {"kind": "none"},
        "gmmvq": {"kind": "gmmvq", "codebook_size": size},
        "gumbel": {"kind": "gumbel", "codebook_size": size},
        "product softvq": {"kind": "product", "parts": parts, "inner": one},
        "residual softvq": {"kind": "residual", "depth": parts, "inner": one},
        "product vq": {"kind": "product", "parts": parts, "inner": hard},
        "residual vq": {"kind": "residual", "depth": parts, "inner": hard},
    }


def recipe(arguments: argparse.Namespace, quantizer: dict[str, Any], steps: int) -> TokenizerRunConfig:
    """Return the recipe of one quantizer."""
    model = {"preset": arguments.preset, "image_size": arguments.image_size, "patch_size": arguments.patch_size}
    model |= {"num_latent_tokens": arguments.tokens, "latent_dim": arguments.numbers // arguments.tokens}
    model |= {"quantizer": quantizer, "encoder": {"pretrained": None}}
    perceptual = 0.0 if arguments.perceptual == "none" else 1.0
    weights = None if arguments.perceptual in {"none", "installed"} else arguments.perceptual
    never = max(steps, 1)
    data = {
        "model": model,
        "data": {"path": str(arguments.data / "train"), "num_workers": arguments.workers, "cache_megabytes": 4096},
        "loss": {
            "perceptual_weight": perceptual,
            "perceptual_warmup_steps": steps // 10,
            "perceptual_weights": weights,
        },
        "optim": {"kind": "muon", "lr": arguments.lr, "warmup_steps": steps // 20},
        "train": {
            "batch_size": arguments.batch_size,
            "steps": steps,
            "ema_decay": 0.99,
            "device": arguments.device,
            "compile": arguments.compile,
            "log_every": never,
            "save_every": never,
            "sample_every": 0,
        },
    }
    return from_dict(TokenizerRunConfig, expand_preset(data))


@torch.inference_mode()
def evaluate(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Reconstruct the photographs of `val` and return means over them."""
    tokenizer = ImageTokenizer.from_pretrained(folder).to(arguments.device)
    weights = None if arguments.perceptual in {"none", "installed"} else arguments.perceptual
    perceptual = load_perceptual(weights).to(arguments.device)
    settings = DataConfig(crop="center", flip=False, num_workers=arguments.workers)
    photographs = PhotoFolder(arguments.data / "val", arguments.image_size, settings, 0)
    size = min(64, len(photographs))
    rows: dict[str, list[float]] = {"PSNR": [], "SSIM": [], "LPIPS": []}
    health: list[dict[str, float]] = []
    for batch in batches(photographs, size, 0, len(photographs) // size, settings.num_workers):
        images = batch.images.to(arguments.device)
        pictures = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
        rows["PSNR"] += psnr(pictures, images).tolist()
        rows["SSIM"] += ssim(pictures, images).tolist()
        rows["LPIPS"] += perceptual(pictures, images).tolist()
        health.append({name: float(value) for name, value in tokenizer.statistics(images).items()})
    means = {name: statistics.fmean(values) for name, values in rows.items()}
    return means | {name: statistics.fmean(line[name] for line in health) for name in health[0]}


def compare(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one quantizer for its time and return its row."""
    quantizer = quantizers(arguments.codebook_size, arguments.parts)[name]
    *_, last = rehearse(recipe(arguments, quantizer, 10**6), Console(quiet=True), lambda _: None)
    steps = arguments.updates or max(20, int(arguments.minutes * 60 / last.seconds))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trained = train_tokenizer(recipe(arguments, quantizer, steps), Path(folder) / "run")
        minutes = (time.perf_counter() - started) / 60
        found = evaluate(trained, arguments)
    row = {column: found.get(name, float("nan")) for column, name in MEASURED.items()}
    row |= {"images/s": arguments.batch_size / last.seconds, "GiB": last.memory / 2**30}
    row |= {"updates": steps, "minutes": minutes}
    return row


def compare_at_once(names: list[str], arguments: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    """Train each in a process of its own, so many at once on each device, and return their rows."""
    places = [device for device in arguments.device for _ in range(arguments.at_once)]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(places)) as pool:
        free = Queue()
        for place in places:
            free.put(place)

        def run(name: str) -> None:
            place, out = free.get(), Path(folder) / f"{name}.json"
            given = [*sys.argv[1:], "--at-once", "1", "--device", place, "--only", name, "--out", str(out)]
            subprocess.run([sys.executable, __file__, *given], check=True, stdout=subprocess.DEVNULL)
            rows.update(json.loads(out.read_text()))
            console.print(f"{name}: {json.dumps(rows[name])}", soft_wrap=True)
            free.put(place)

        list(pool.map(run, names))
    return {name: rows[name] for name in names}


def main() -> None:
    """Train all of them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=PHOTOS)
    parser.add_argument("--preset", default="softvq-tiny-16")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--numbers", type=int, default=512, help="tokens times channels")
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--updates", type=int, help="so many for all, in place of the minutes")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--perceptual", default="none", help="none, installed, or a file with its weights")
    parser.add_argument("--device", nargs="+", default=["cpu"])
    parser.add_argument("--at-once", type=int, default=1, help="trainings that share one device")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of quantizers")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    console = Console(width=150)
    names = arguments.only or list(quantizers(2, 1))
    on_gpu = arguments.device[0].startswith("cuda")
    if arguments.at_once * len(arguments.device) > 1:
        rows = compare_at_once(names, arguments, console)
    else:
        arguments.device = arguments.device[0]
        rows = {name: compare(name, arguments) for name in names}
    machine = torch.cuda.get_device_name() if on_gpu else platform.machine()
    machine += f", {arguments.at_once} at once" if arguments.at_once > 1 else ""
    budget = f"{arguments.updates} updates" if arguments.updates else f"{arguments.minutes} min"
    title = f"{arguments.preset}, {arguments.image_size} px, {arguments.tokens} tokens, {budget} each"
    table = Table("quantizer", *COLUMNS, title=f"{title}, {machine}, torch {torch.__version__}")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.4g}" for column in COLUMNS))
    console.print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
