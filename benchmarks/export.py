"""How long exported files take on this machine's processor, and how much their precision costs.

    python benchmarks/export.py --model photos-64 --data FOLDER --generator flowers-dit --steps 4

Encoder, decoder and, with --generator, sampler are written in every format and precision and timed in turns with the
model itself. Loss is told in pixels: `PSNR to the model` compares pictures of 8 bits with those that the model makes of
the same photographs (an encoder's latents are painted by the model's decoder), `PSNR to the photograph` with those.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from softvq.commands.common import machine_name
from softvq.data.images import center_crop, find_images, read_image, to_tensor
from softvq.evaluation.pair_figures import pair_figures
from softvq.evaluation.timing import time_in_turns
from softvq.export.files import run_part, write_part
from softvq.export.parts import Part, decoder_part, encoder_part, sampler_part
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.autoencoder import ImageTokenizer

VARIANTS = (("torch", "float32"), ("torch", "bf16"), ("onnx", "float32"), ("onnx", "int8"))
CPU = torch.device("cpu")


def photographs(folder: Path, count: int, size: int) -> Tensor:
    """Return photographs spread evenly over a folder."""
    paths = find_images(folder)
    count = min(count, len(paths))
    chosen = [paths[number * len(paths) // count] for number in range(count)]
    return torch.stack([to_tensor(center_crop(read_image(path), size)) for path in chosen])


def to_bytes(images: Tensor) -> Tensor:
    """Return pixels as files have them."""
    return images.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def psnr(images: Tensor, targets: Tensor) -> str:
    """Return the mean over pairs."""
    return f"{pair_figures(to_bytes(targets), to_bytes(images))['psnr'].mean():.2f}"


def measure(
    part: Part, folder: Path, batches: list[int], rounds: int, paint: Callable[..., Tensor], given: tuple[Tensor, ...],
    photos: Tensor | None,
) -> list[list[str]]:  # fmt: skip
    """Return a row for the model itself and for each variant."""
    runs: dict[str, tuple[Callable[..., Tensor], int]] = {"the model": (torch.no_grad()(part.module), 0)}
    for kind, precision in VARIANTS:
        path = folder / f"{part.kind}-{precision}.{'pt2' if kind == 'torch' else 'onnx'}"
        write_part(part, path, kind, precision)
        runs[f"{kind}, {precision}"] = (run_part(path, kind), path.stat().st_size)
    times = {name: [] for name in runs}
    for batch in batches:
        inputs = [port.examples(batch) for port in part.inputs]
        timings = time_in_turns([partial(run, *inputs) for run, _ in runs.values()], CPU, rounds=rounds)
        for name, timing in zip(runs, timings, strict=True):
            times[name].append(f"{1e3 * timing.seconds:.1f}")
    wanted, rows = paint(runs["the model"][0](*given)), []
    for name, (run, size) in runs.items():
        found = paint(run(*given))
        to_model = "" if name == "the model" else psnr(found, wanted)
        to_photo = "" if photos is None else psnr(found, photos)
        rows.append([part.kind, name, f"{size / 2**20:.1f}" if size else "", *times[name], to_model, to_photo])
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a tokenizer's folder or name")
    parser.add_argument("--data", type=Path, required=True, help="a folder of photographs")
    parser.add_argument("--generator", help="a generator's folder or name")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler")
    parser.add_argument("--n", type=int, default=16, help="photographs, and images of the sampler")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    tokenizer = ImageTokenizer.from_pretrained(arguments.model)
    photos = photographs(arguments.data, arguments.n, tokenizer.config.image_size)
    with torch.no_grad():
        latents = tokenizer.encode(photos)
    paint = torch.no_grad()(tokenizer.decode)
    jobs = [
        (encoder_part(tokenizer), paint, (photos,), photos),
        (decoder_part(tokenizer), lambda images: images, (latents,), photos),
    ]
    if arguments.generator is not None:
        pipeline = GenerationPipeline.from_pretrained(arguments.generator)
        part = sampler_part(pipeline, dataclasses.replace(pipeline.generator.sampling, steps=arguments.steps))
        jobs.append((part, lambda images: images, tuple(port.examples(arguments.n) for port in part.inputs), None))
    headings = [f"ms, batch {batch}" for batch in arguments.batches]
    title = f"{machine_name(CPU)}, torch {torch.__version__}, {len(photos)} photographs"
    table = Table("part", "file", "MiB", *headings, "PSNR to the model", "PSNR to the photograph", title=title)
    with tempfile.TemporaryDirectory() as folder:
        for part, paint, given, targets in jobs:
            for row in measure(part, Path(folder), arguments.batches, arguments.rounds, paint, given, targets):
                table.add_row(*row)
    Console(width=130, highlight=False).print(table)


if __name__ == "__main__":
    main()
