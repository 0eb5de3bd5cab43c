"""What `softvq evaluate generation` judges: finished images, latents, or a generator that is to make them."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from softvq.commands.common import load_tokenizer
from softvq.config import to_dict
from softvq.data.images import SUFFIXES
from softvq.errors import InputError
from softvq.evaluation.generation import generated, recipe_beside, sweep
from softvq.evaluation.image_sets import ImageSet, open_images
from softvq.generators.recipe import SamplingRecipe
from softvq.pipeline import GenerationPipeline

__all__ = ["Samples", "open_samples"]

CONFIG = "config.json"
SET_SUFFIXES = (".npz", ".safetensors", *SUFFIXES)
DEFAULT_COUNT = 5000
RUN_MODEL = "generator"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What is judged: a set for each setting, and where it comes from."""

    sets: list[ImageSet]
    """One for each setting."""
    settings: list[dict[str, float | str]]
    """Guidance and steps of each, and the sampler where samplers were given; nothing of finished images."""
    model: dict[str, Any] | None
    """Name and fingerprints of what made them, where known."""
    recipe: dict[str, Any] | None
    """How they were made, where known."""
    remarks: list[str]
    """What a reader must know."""
    pipeline: GenerationPipeline | None = None
    """What makes them, if they are to be made."""


def open_samples(arguments: argparse.Namespace, device: torch.device) -> Samples:
    """Open the set that was given, or load the generator that is to make it.

    Args:
        arguments: Of `softvq evaluate generation`.
        device: Where latents are decoded; a generator stays on the CPU.

    Returns:
        What is to be judged.

    Raises:
        InputError: If there is no such set or generator, or an option is for the other.
    """
    source = arguments.samples
    if _is_generator(source):
        return _generated(arguments)
    for option, is_given in (
        ("--n", arguments.n is not None),
        ("--seed", arguments.seed is not None),
        ("--guidance", arguments.guidance is not None),
        ("--steps", arguments.steps is not None),
        ("--sampler", arguments.sampler is not None),
        ("--compile", arguments.compile),
    ):
        if is_given:
            raise InputError(f"{option} is for a generator, but {source} holds finished images; leave it out")
    tokenizer = None if arguments.tokenizer is None else load_tokenizer(arguments.tokenizer, device)
    images = open_images(source, size=arguments.size, tokenizer=tokenizer)
    if tokenizer is not None and images.kind != "latents":
        raise InputError(f"--tokenizer is for latents or a generator, but {source} holds images; leave it out")
    recipe, remarks = recipe_beside(Path(source), images.count)
    model = None
    if recipe is not None and "model" in recipe:
        model = {"name": recipe["model"], "fingerprint": recipe.get("generator"), "tokenizer": recipe.get("tokenizer")}
    elif tokenizer is not None:
        model = {"name": arguments.tokenizer, "fingerprint": None, "tokenizer": tokenizer.fingerprint()}
    return Samples(sets=[images], settings=[{}], model=model, recipe=recipe, remarks=remarks)


def _is_generator(source: str) -> bool:
    path = Path(source)
    if (path / RUN_MODEL / CONFIG).is_file():
        raise InputError(f"{source}: is the folder of a run; give the generator in it, {path / RUN_MODEL}")
    if path.is_dir():
        return (path / CONFIG).is_file()
    return not path.exists() and path.suffix.lower() not in SET_SUFFIXES


def _generated(arguments: argparse.Namespace) -> Samples:
    pipeline = GenerationPipeline.from_pretrained(arguments.samples, tokenizer=arguments.tokenizer)
    generator, tokenizer = pipeline.generator, pipeline.tokenizer
    side = tokenizer.config.image_size
    if arguments.size not in (None, side):
        raise InputError(f"--size is {arguments.size}, but {arguments.samples} makes images of {side} px; leave it out")
    recipes = sweep(generator, arguments.guidance, arguments.steps, arguments.sampler)
    count = DEFAULT_COUNT if arguments.n is None else arguments.n
    seed = 0 if arguments.seed is None else arguments.seed
    sets = [
        generated(
            pipeline,
            recipe,
            count,
            seed=seed,
            batch_size=arguments.batch_size,
            source=arguments.samples,
        )
        for recipe in recipes
    ]
    return Samples(
        sets=sets,
        settings=[_setting(recipe, arguments.sampler is not None) for recipe in recipes],
        # of the weights as they are stored, whatever they are computed in
        model={
            "name": arguments.samples,
            "fingerprint": generator.fingerprint(),
            "tokenizer": tokenizer.fingerprint(),
        },
        recipe={
            "n": count,
            "seed": seed,
            "precision": arguments.precision,
            "recipes": [to_dict(recipe) for recipe in recipes],
        },
        remarks=[],
        pipeline=pipeline,
    )


def _setting(recipe: SamplingRecipe, with_sampler: bool) -> dict[str, float | str]:
    found: dict[str, float | str] = {"guidance": recipe.guidance.scale, "steps": recipe.steps}
    return found | ({"sampler": recipe.sampler} if with_sampler else {})
