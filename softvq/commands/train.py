"""Training: `softvq train tokenizer` and `softvq train generator`."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from softvq.commands.common import messages, results
from softvq.commands.inspect import parameter_counts
from softvq.config import apply_overrides, from_dict, read_yaml, to_yaml
from softvq.data.latent_cache import cache_info
from softvq.data.sources import open_source
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.generator_recipe import GeneratorRunConfig, expand_generator
from softvq.training.generator_run import tokenizer_of
from softvq.training.generator_run import train_generator as make_generator
from softvq.training.rehearsal import Phase, rehearse, rehearse_generator
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset
from softvq.training.tokenizer_run import train_tokenizer as train

__all__ = ["generator_recipe_of", "read_generator_recipe", "read_recipe", "train_generator", "train_tokenizer"]


def train_tokenizer(arguments: argparse.Namespace) -> None:
    """Train a tokenizer as a recipe says, or print what would be trained and rehearse it."""
    changes = {"data.path": arguments.data, "train.device": arguments.device}
    config = read_recipe(Path(arguments.config), arguments.overrides, changes)
    if arguments.dry_run:
        _print_plan(config)
        return
    _say_where(train(config, _run_folder(arguments), resume=arguments.resume, console=messages()))


def train_generator(arguments: argparse.Namespace) -> None:
    """Train a generator as a recipe says, or print what would be trained and try it."""
    changes = {"latents": arguments.latents, "data.path": arguments.data, "tokenizer": arguments.tokenizer}
    changes["train.device"] = arguments.device
    config = read_generator_recipe(Path(arguments.config), arguments.overrides, changes)
    if not arguments.dry_run:
        _say_where(make_generator(config, _run_folder(arguments), resume=arguments.resume, console=messages()))
        return
    tokenizer_of(config)
    console = results()
    console.print(to_yaml(config), soft_wrap=True)
    images = config.train.steps * config.train.batch_size
    console.print(f"{config.train.steps:,} steps of {config.train.batch_size} images: {images:,} images")
    _print_phases([rehearse_generator(config, messages())], config.train.batch_size)


def read_recipe(path: Path, overrides: list[str], changes: dict[str, Any]) -> TokenizerRunConfig:
    """Read a recipe, strictly.

    Args:
        path: A YAML file.
        overrides: `dotted.key=value` pairs, which overrule the file.
        changes: Values by dotted name that overrule both; None leaves a field as it is.

    Returns:
        The resolved recipe.

    Raises:
        InputError: If the file cannot be read, or a field is unknown, of the wrong type, or out of its range.
    """
    return from_dict(TokenizerRunConfig, expand_preset(_read(path, overrides, changes)), str(path))


def read_generator_recipe(path: Path, overrides: list[str], changes: dict[str, Any]) -> GeneratorRunConfig:
    """Read a recipe, strictly; tokens, channels and classes are those of the latents.

    Args:
        path: A YAML file.
        overrides: `dotted.key=value` pairs, which overrule the file.
        changes: Values by dotted name that overrule both; None leaves a field as it is.

    Returns:
        The resolved recipe.

    Raises:
        InputError: If a file cannot be read, a field is wrong, or there is nothing to train on.
    """
    return generator_recipe_of(path, overrides, changes, None)


def generator_recipe_of(
    path: Path, overrides: list[str], changes: dict[str, Any], shape: dict[str, int] | None
) -> GeneratorRunConfig:
    """Read a recipe for latents of a shape that is known: `num_tokens`, `latent_dim` and `num_classes`."""
    data = _read(path, overrides, changes)
    return from_dict(GeneratorRunConfig, expand_generator(data, shape or _shape(data)), str(path))


def _shape(data: dict[str, Any]) -> dict[str, int]:
    """Look at what the generator is to make: in the cache, or in the tokenizer and the folder of photographs."""
    photographs = data["data"].get("path") if isinstance(data.get("data"), dict) else None
    if isinstance(data.get("latents"), str):
        info = cache_info(data["latents"])
        shape, classes = {"num_tokens": info.plan.tokens, "latent_dim": info.plan.dim}, len(info.classes)
    elif isinstance(data.get("tokenizer"), str) and isinstance(photographs, str):
        config = ImageTokenizer.from_pretrained(data["tokenizer"]).config
        shape = {"num_tokens": config.num_latent_tokens, "latent_dim": config.latent_dim}
        classes = len(open_source(photographs).classes)
    else:
        raise InputError("there is nothing to train on: give --latents, or --data and --tokenizer")
    return {**shape, "num_classes": classes} if classes else shape


def _read(path: Path, overrides: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    data = apply_overrides(read_yaml(path), overrides)
    for name, value in changes.items():
        if value is not None:
            group, _, field = name.rpartition(".")
            fields = data.setdefault(group, {}) if group else data
            if isinstance(fields, dict):  # otherwise `from_dict` says what is wrong with it
                fields[field] = value
    return data


def _run_folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.run_dir or Path("runs") / Path(arguments.config).stem)


def _say_where(folder: Path) -> None:
    if os.environ.get("RANK", "0") == "0":  # torchrun starts one of us for each device
        results().print(str(folder), soft_wrap=True)


def _print_plan(config: TokenizerRunConfig) -> None:
    found = 0 if config.data.path is None else len(open_source(config.data.path).names)
    console = results()
    console.print(to_yaml(config), soft_wrap=True)
    with torch.device("meta"):
        counts = parameter_counts(ImageTokenizer(config.model))
    table = Table("part", "parameters")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    console.print(table)
    images = config.train.steps * config.train.batch_size
    console.print(f"{config.train.steps:,} steps of {config.train.batch_size} images: {images:,} images")
    if found:
        console.print(f"{config.data.path}: {found:,} images, {images / found:.1f} passes", soft_wrap=True)
    _print_phases(rehearse(config, messages(), messages().print), config.train.batch_size)


def _print_phases(phases: Iterable[Phase], batch_size: int) -> None:
    """Run every phase for a few updates, and show what each takes."""
    table = Table("phase", "from step", "parameters", "s/step", "images/s", "peak GiB")
    for phase in phases:
        row = (f"{phase.first_step:,}", f"{phase.parameters:,}", f"{phase.seconds:.3f}")
        table.add_row(phase.name, *row, f"{batch_size / phase.seconds:,.1f}", f"{phase.memory / 2**30:.2f}")
    results().print(table)
