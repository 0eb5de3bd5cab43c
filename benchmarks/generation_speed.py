"""How fast SiT-XL samples and trains on 32 and 64 tokens, and on the 256 and 1,024 of two-dimensional latents.

    python benchmarks/generation_speed.py [--device cuda] [--preset sit-xl] [--images 64]

Weights are random, which speed does not depend on. Networks are bf16 and compiled, guidance is on in every step, so
that one step evaluates twice as many samples as there are images. Images per second are those of 250 Euler steps and
the decoding by a tokenizer of size L (BL for 512 px); for the two-dimensional latents, whose tokenizers are not ours,
decoding is left out, which favours them.
"""

import argparse
import dataclasses
import gc
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from softvq.data.folder import Batch
from softvq.data.latent_set import LatentBatch
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.guidance import Guidance
from softvq.generators.presets import generator_preset
from softvq.generators.recipe import SamplingRecipe
from softvq.pipeline import GenerationPipeline
from softvq.randomness import keys_of, normal
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.presets import preset
from softvq.training.generator_task import GeneratorTask
from softvq.training.optim import OptimConfig
from softvq.training.train_config import TrainConfig
from softvq.training.trainer import Trainer

STEPS = 250
ROWS = (
    ("32 tokens of 64, 256 px", 32, 64, "softvq-l-32", 256, 1),
    ("64 tokens of 32, 256 px", 64, 32, "softvq-l-64", 256, 1),
    ("256 tokens (32 x 32 x 4 in patches of 2), 256 px", 256, 16, None, 256, 1),
    ("64 tokens of 32, 512 px", 64, 32, "softvq-bl-64", 512, 1),
    ("1,024 tokens (64 x 64 x 4 in patches of 2), 512 px", 1024, 16, None, 512, 2),
)
"""Name, tokens, numbers in each, tokenizer, side in pixels, and how many times fewer images are made at once."""


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of something, after two times that do not count."""
    times = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def tokenizer_of(name: str | None, tokens: int, dim: int, size: int, tiny: bool) -> ImageTokenizer:
    """Return a tokenizer with random weights; a small one where there is none of ours, or where time is short."""
    config = preset("softvq-tiny-16" if tiny or name is None else name)
    changes = {"image_size": size, "num_latent_tokens": tokens, "latent_dim": dim, "min_latent_tokens": None}
    encoder, decoder = (dataclasses.replace(vit, pretrained=None) for vit in (config.encoder, config.decoder))
    return ImageTokenizer(dataclasses.replace(config, encoder=encoder, decoder=decoder, **changes))


def sampling(row: tuple, arguments: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds a step, and images a second with and without decoding."""
    _, tokens, dim, name, size, fewer = row
    device, count = torch.device(arguments.device), max(1, arguments.images // fewer)
    config = model(arguments.preset, tokens, dim)
    tokenizer = tokenizer_of(name, tokens, dim, size, arguments.tiny)
    pipeline = GenerationPipeline(LatentGenerator(config), tokenizer).to(device, "bf16").compile()
    condition, keys = torch.arange(count) % 1000, keys_of(0, "speed", torch.arange(count))
    recipe = SamplingRecipe(sampler="euler", steps=arguments.steps, guidance=Guidance(scale=1.75))
    step = seconds_of(lambda: pipeline.latents(condition, keys, recipe), device, 3) / arguments.steps
    latents = pipeline.latents(condition, keys, recipe)
    decoding = 0.0 if name is None else seconds_of(lambda: pipeline.paint(latents), device, 3)
    return {"ms": 1000 * step, "decode": 1000 * decoding, "images/s": count / (STEPS * step + decoding), "n": count}


def model(name: str, tokens: int, dim: int) -> GeneratorConfig:
    """Return a generator; tokens of a grid know where they lie."""
    config = generator_preset(name, num_tokens=tokens, latent_dim=dim)
    positions = "sine_2d" if dim == 16 else "sine"
    return dataclasses.replace(config, network=dataclasses.replace(config.network, positions=positions))


def training(arguments: argparse.Namespace) -> dict[str, float]:
    """Return images a second trained on latents in memory, and on photographs that are encoded on the fly."""
    device, count, found = torch.device(arguments.device), 2 * arguments.images, {}
    settings = TrainConfig(
        batch_size=count, device=arguments.device, compile=True, cuda_graph=device.type == "cuda", precision="bf16"
    )
    positions = torch.arange(count, device=device)
    labels = positions % 1000
    for way in ("in memory", "on the fly"):
        tokenizer = tokenizer_of("softvq-l-64", 64, 32, 256, arguments.tiny) if way == "on the fly" else None
        task = GeneratorTask(LatentGenerator(model(arguments.preset, 64, 32)), seed=0, tokenizer=tokenizer)
        trainer = Trainer(task, Path(), settings, OptimConfig(), seed=0, console=Console(quiet=True))
        task.train()
        if tokenizer is None:
            batch = LatentBatch(latents=normal(positions, 64, 32), labels=labels, positions=positions)
        else:
            images = torch.rand(count, 3, 256, 256, device=device) * 2 - 1
            batch = Batch(images=images, labels=labels, positions=positions, skipped=[])
        trainer.update(batch)
        trainer.update(batch)
        found[way] = count / seconds_of(lambda trainer=trainer, batch=batch: trainer.update(batch), device, 5)
        trainer.check_finite()
        del trainer, task, batch
        free(device)
    return found


def free(device: torch.device) -> None:
    """Give memory back before the next row."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    """Measure all rows and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", help="default: sit-xl on a GPU, sit-tiny elsewhere")
    parser.add_argument("--images", type=int, help="made at once; half as many of 1,024 tokens")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    arguments.tiny = not on_gpu
    arguments.preset = arguments.preset or ("sit-xl" if on_gpu else "sit-tiny")
    arguments.images = arguments.images or (64 if on_gpu else 2)
    device = torch.device(arguments.device)
    machine = torch.cuda.get_device_name(device) if on_gpu else platform.machine()
    title = f"{arguments.preset}, bf16, compiled, {machine}, torch {torch.__version__}"
    console = Console(width=140)
    table = Table("latents", "images", "ms/step", "ms to decode", f"images/s at {STEPS} steps", "ratio", title=title)
    slowest = {256: 0.0, 512: 0.0}
    measured = []
    for row in ROWS:
        measured.append((row, sampling(row, arguments)))
        free(device)
    for row, found in measured:
        slowest[row[4]] = found["images/s"] if row[3] is None else slowest[row[4]]
    for row, found in measured:
        ratio = f"{found['images/s'] / slowest[row[4]]:.1f}"
        decoding = f"{found['decode']:.1f}" if row[3] else "left out"
        table.add_row(row[0], str(found["n"]), f"{found['ms']:.2f}", decoding, f"{found['images/s']:.2f}", ratio)
    console.print(table)
    rates = training(arguments)
    table = Table("training on 64 tokens, with softvq-l-64", "images/s", "ratio", title=title)
    for way, rate in rates.items():
        table.add_row(way, f"{rate:,.0f}", f"{rate / rates['on the fly']:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
