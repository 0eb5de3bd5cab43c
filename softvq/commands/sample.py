"""Images from a generator: `softvq sample`."""

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import softvq
from softvq.commands.common import check_output, machine_name, messages, results
from softvq.config import to_dict
from softvq.data.images import SUFFIXES, to_image
from softvq.errors import InputError
from softvq.evaluation.pictures import grid
from softvq.files import replacing, write_json
from softvq.generators.generator import LatentGenerator
from softvq.generators.guidance import Guidance
from softvq.generators.recipe import SamplingRecipe, resolved
from softvq.pipeline import GenerationPipeline, class_numbers, keys_of_images
from softvq.training.distributed import choose_device

__all__ = ["sample"]

MAX_IMAGES = 1 << 20
GRID_IMAGES = 64


def sample(arguments: argparse.Namespace) -> None:
    """Write images as PNG files, a grid of the first, all of them in one .npz file, and how they were made."""
    out = Path(arguments.out)
    if out.is_file() or out.suffix.lower() in SUFFIXES:
        raise InputError(f"{out}: is to be a folder of pictures; give the name of one")
    check_output(out, arguments.overwrite)
    if arguments.n > MAX_IMAGES:
        raise InputError(f"--n is {arguments.n}, expected at most {MAX_IMAGES}")
    pipeline = GenerationPipeline.from_pretrained(arguments.model, tokenizer=arguments.tokenizer, guide=arguments.guide)
    generator = pipeline.generator
    recipe = generator.checked(_recipe(_with_sampler(generator), arguments), pipeline.guide)
    names = _classes(arguments.classes, pipeline)
    labels = [names[place % len(names)] for place in range(arguments.n)]
    class_numbers(labels, generator)  # an unknown class is told before the networks are moved and compiled
    fingerprint = generator.fingerprint()  # of the weights as they are stored, whatever they are computed in
    fp8 = arguments.precision == "fp8"
    pipeline.to(choose_device(arguments.device), "bf16" if fp8 else arguments.precision)
    if arguments.compile or fp8:
        pipeline.compile(fp8=fp8)
    _clear(out)
    # first, so that pictures of an interrupted run say how they were made
    write_json(out / "recipe.json", {"generator": fingerprint, **_record(pipeline, recipe, arguments)})
    pictures = _make(pipeline, labels, recipe, arguments, out)
    shown = pictures[:GRID_IMAGES]
    columns = len(names) if 1 < len(names) <= 10 else max(1, round(math.sqrt(len(shown))))
    with replacing(out / "grid.png") as temporary:
        images = torch.from_numpy(shown).permute(0, 3, 1, 2) / 127.5 - 1
        grid(images, columns, [_title(label, pipeline) for label in labels[: len(shown)]]).save(temporary)
    with replacing(out / "samples.npz") as temporary:
        np.savez(temporary, arr_0=pictures)
    results().print(f"{out}: {len(labels)} images, grid.png, samples.npz, recipe.json", soft_wrap=True)


def _clear(out: Path) -> None:
    """Remove the pictures of an earlier call, which would be taken for this one's; nothing else is touched."""
    if (out / "recipe.json").is_file():
        for path in [*out.glob("*.png"), out / "samples.npz"]:
            if re.fullmatch(r"\d{6}-.+\.png|grid\.png|samples\.npz", path.name):
                path.unlink(missing_ok=True)


def _make(
    pipeline: GenerationPipeline,
    labels: list[int | str],
    recipe: SamplingRecipe,
    arguments: argparse.Namespace,
    out: Path,
) -> np.ndarray:
    """Write one PNG file after the other, and return them all: `[image, height, width, 3]` of bytes."""
    size = pipeline.tokenizer.config.image_size
    pictures = np.empty((len(labels), size, size, 3), dtype=np.uint8)
    condition, keys = class_numbers(labels, pipeline.generator), keys_of_images(arguments.seed, len(labels))
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = messages()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("images", total=len(labels))
        for start in range(0, len(labels), arguments.batch_size):
            part = slice(start, start + arguments.batch_size)
            images = pipeline.paint(pipeline.latents(condition[part], keys[part], recipe))
            for place, image in enumerate(images, start):
                picture = to_image(image)
                pictures[place] = np.asarray(picture)
                with replacing(out / f"{place:06d}-{_file_name(_title(labels[place], pipeline))}.png") as temporary:
                    picture.save(temporary)
            bar.advance(task, len(images))
    return pictures


def _with_sampler(generator: LatentGenerator) -> SamplingRecipe:
    """Return the stored recipe with the sampler that auto stands for; what may be overruled is not checked yet."""
    stored = generator.sampling
    if stored.sampler != "auto":
        return stored
    return dataclasses.replace(stored, sampler=resolved(SamplingRecipe(steps=1), generator.config).sampler)


def _recipe(stored: SamplingRecipe, arguments: argparse.Namespace) -> SamplingRecipe:
    """Return the generator's own recipe with what the command line overrules."""
    guidance: dict[str, Any] = {"scale": arguments.guidance, "schedule": arguments.guidance_schedule}
    guidance["interval"] = None if arguments.guidance_interval is None else tuple(arguments.guidance_interval)
    fields = {name: getattr(arguments, name) for name in ("sampler", "steps", "head_steps", "shift", "temperature")}
    if arguments.sampler not in (None, stored.sampler) and arguments.steps is None:
        raise InputError(
            f"--sampler is {arguments.sampler}, which needs --steps; the stored ones are {stored.sampler}'s"
        )
    changes = {name: value for name, value in fields.items() if value is not None}
    guided = {name: value for name, value in guidance.items() if value is not None}
    new: Guidance = dataclasses.replace(stored.guidance, **guided)
    return dataclasses.replace(stored, guidance=new, **changes)


def _classes(text: str | None, pipeline: GenerationPipeline) -> list[int | str]:
    config = pipeline.generator.config
    if config.condition == "embedding":
        raise InputError("the generator is asked by embeddings, which have no names; use GenerationPipeline in Python")
    if text is None:
        count = config.num_classes if config.condition == "class" else 1
        return list(pipeline.generator.classes) or list(range(count))
    if config.condition == "none":
        raise InputError("--classes is given, but the generator has no classes; leave it out")
    names: list[int | str] = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("--classes is empty, expected names or numbers with commas between them")
    return names


def _title(label: int | str, pipeline: GenerationPipeline) -> str:
    number, classes = int(class_numbers([label], pipeline.generator)[0]), pipeline.generator.classes
    return classes[number] if classes else str(number)


def _file_name(title: str) -> str:
    return "".join(char if char.isalnum() or char in "-_" else "_" for char in title)[:40] or "_"


def _record(pipeline: GenerationPipeline, recipe: SamplingRecipe, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": arguments.model,
        "tokenizer": pipeline.tokenizer.fingerprint(),
        "guide": arguments.guide,
        "classes": arguments.classes,
        "n": arguments.n,
        "seed": arguments.seed,
        "recipe": to_dict(recipe),
        "precision": str(pipeline.dtype).removeprefix("torch."),
        "machine": machine_name(pipeline.device),
        "versions": {"softvq": softvq.__version__, "torch": torch.__version__},
    }
