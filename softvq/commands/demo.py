"""From nothing to a page about bundled models: `softvq demo`."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import softvq
from softvq.commands.common import Photos, check_output, finite_images, load_tokenizer, machine_name, messages, results
from softvq.commands.demo_photos import credits_of_photos, photos_of
from softvq.commands.train_demo import train_demo
from softvq.data.images import read_image
from softvq.errors import InputError
from softvq.evaluation.demo_page import (
    DemoParts,
    Samples,
    demo_page,
    demo_pictures,
    fewer_tokens,
    interpolated,
    token_pictures,
)
from softvq.evaluation.probing import evenly
from softvq.files import replacing, write_text
from softvq.losses.perceptual import PerceptualDistance, load_perceptual
from softvq.pipeline import GenerationPipeline
from softvq.pretrained import bundled
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.distributed import choose_device

__all__ = ["demo"]

TOKENIZER = "photos-64"
GENERATOR = "flowers-dit"
SHOWN = 6  # photographs, so that two cores are done within a minute
SAMPLES_PER_CLASS = 4
MOST_CLASSES = 8


class Clock:
    """How long each part took."""

    def __init__(self, console: Console) -> None:
        self.seconds: dict[str, float] = {}
        self._console = console

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Tell that a part begins, and remember how long it took."""
        self._console.print(name, soft_wrap=True)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


def demo(arguments: argparse.Namespace) -> None:
    """Show what the bundled models do; where none is bundled, or on request, train a tiny tokenizer."""
    folder = bundled(TOKENIZER)
    if folder is None or arguments.train or arguments.steps is not None:
        train_demo(arguments)
        return
    out = Path(arguments.out)
    check_output(out, overwrite=True)  # another demo may be replaced
    console, device = messages(), choose_device(arguments.device)
    clock = Clock(console)
    with clock.part("loading"):
        tokenizer = load_tokenizer(str(folder), device)
        distance = _distance(device, console)
    parts, photographs = _parts(tokenizer, distance, arguments.seed, clock)
    with clock.part("drawing"):
        pictures = demo_pictures(parts)
        for name, picture in pictures.items():
            with replacing(out / name) as temporary:
                picture.save(temporary)
    facts = {
        "Tokenizer": f"{TOKENIZER}, {sum(p.numel() for p in tokenizer.parameters()):,} parameters",
        **({"Generator": GENERATOR} if parts.samples else {}),
        "Photographs": photographs,
        "Machine": machine_name(device),
        "Time": ", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock.seconds.items()),
        "Command": f"softvq demo --seed {arguments.seed} --device {arguments.device}",
        "Versions": f"softvq {softvq.__version__}, torch {torch.__version__}",
    }
    write_text(out / "demo.html", demo_page("What softvq does", parts, facts))
    if parts.samples is None:
        (out / "samples.png").unlink(missing_ok=True)  # of an earlier demo, whose page is gone
    _print_times(clock)
    for name in ("demo.html", *pictures):
        results().print(str((out / name).resolve()), soft_wrap=True)


@torch.inference_mode()
def _parts(
    tokenizer: ImageTokenizer, distance: PerceptualDistance | None, seed: int, clock: Clock
) -> tuple[DemoParts, str]:
    """Compute all that is shown, and say in words which photographs these are."""
    config, device = tokenizer.config, tokenizer.latent_mean.device
    photos = Photos(
        source=photos_of("val"),
        size=(config.image_size, config.image_size),
        patch_size=config.patch_size,
        console=messages(),
    )
    bundled_photos = len(photos.paths)
    photos.paths = [photos.paths[i] for i in evenly(bundled_photos, SHOWN)]
    with clock.part("reconstructions"):
        found = list(photos)
        images = torch.stack([photo.image for photo in found]).to(device)
        latents = tokenizer.encode(images)
        finite_images(tokenizer.decode(latents[:1]))  # weights that overflow are told before the minute is spent
        names = [Path(photo.name).stem for photo in found]
        credits = credits_of_photos()
        lines = [credits.get(f"val/{photo.name}", "") for photo in found]
        items = fewer_tokens(tokenizer, images, latents, names, lines, distance)
    with clock.part("interpolation"):
        between = interpolated(tokenizer, latents[0], latents[-1])
    with clock.part("what each token paints"):
        place = len(items) // 4
        tokens = token_pictures(tokenizer, items[place], latents, place)
    samples = _samples(seed, device, clock)
    width, height = read_image(photos.paths[0]).size
    return (
        DemoParts(photographs=items, ends=(names[0], names[-1]), between=between, tokens=tokens, samples=samples),
        f"{len(items)} of {bundled_photos} bundled, {width} x {height} pixels as bundled, "
        f"{config.image_size} x {config.image_size} for the tokenizer",
    )


def _samples(seed: int, device: torch.device, clock: Clock) -> Samples | None:
    folder = bundled(GENERATOR)
    if folder is None:
        return None
    with clock.part("loading the generator"):
        own = (folder / "tokenizer").is_dir()
        pipeline = GenerationPipeline.from_pretrained(folder, tokenizer=None if own else bundled(TOKENIZER)).to(device)
        generator = pipeline.generator
        classes = (list(generator.classes) or list(range(generator.config.num_classes)))[:MOST_CLASSES]
    with clock.part("samples"):
        images = pipeline([name for name in classes for _ in range(SAMPLES_PER_CLASS)], seed=seed)
    return Samples(
        classes=[str(name) for name in classes], images=images, seconds=clock.seconds["samples"] / len(images)
    )


def _distance(device: torch.device, console: Console) -> PerceptualDistance | None:
    try:
        return load_perceptual().to(device)
    except InputError as error:
        console.print(f"ST-LPIPS is left out: {error}", soft_wrap=True)
        return None


def _print_times(clock: Clock) -> None:
    table = Table("part", "seconds", title="Time", title_justify="left")
    table.columns[1].justify = "right"
    for name, seconds in clock.seconds.items():
        table.add_row(name, f"{seconds:.1f}")
    table.add_section()
    table.add_row("total", f"{sum(clock.seconds.values()):.1f}")
    results().print(table)
