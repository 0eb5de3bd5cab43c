"""Training: `softvq train tokenizer`."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from softvq.commands.common import messages, results
from softvq.commands.inspect import parameter_counts
from softvq.config import apply_overrides, from_dict, read_yaml, to_yaml
from softvq.data.images import find_images
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.rehearsal import rehearse
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset
from softvq.training.tokenizer_run import train_tokenizer as train

__all__ = ["read_recipe", "train_tokenizer"]


def train_tokenizer(arguments: argparse.Namespace) -> None:
    """Train a tokenizer as a recipe says, or print what would be trained and rehearse it."""
    changes = {"data.path": arguments.data, "train.device": arguments.device}
    config = read_recipe(Path(arguments.config), arguments.overrides, changes)
    if arguments.dry_run:
        _print_plan(config)
        return
    run = Path(arguments.run_dir or Path("runs") / Path(arguments.config).stem)
    folder = train(config, run, resume=arguments.resume, console=messages())
    if os.environ.get("RANK", "0") == "0":  # torchrun starts one of us for each device
        results().print(str(folder), soft_wrap=True)


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
    data = apply_overrides(read_yaml(path), overrides)
    for name, value in changes.items():
        if value is not None:
            group, _, field = name.rpartition(".")
            fields = data.setdefault(group, {}) if group else data
            if isinstance(fields, dict):  # otherwise `from_dict` says what is wrong with it
                fields[field] = value
    return from_dict(TokenizerRunConfig, expand_preset(data), str(path))


def _print_plan(config: TokenizerRunConfig) -> None:
    found = 0 if config.data.path is None else len(find_images(config.data.path))
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
    _print_rehearsal(config)


def _print_rehearsal(config: TokenizerRunConfig) -> None:
    """Run every phase for a few updates, and show what each takes."""
    table = Table("phase", "from step", "parameters", "s/step", "images/s", "peak GiB")
    for phase in rehearse(config, messages(), messages().print):
        speed = f"{config.train.batch_size / phase.seconds:,.1f}"
        row = (f"{phase.first_step:,}", f"{phase.parameters:,}", f"{phase.seconds:.3f}", speed)
        table.add_row(phase.name, *row, f"{phase.memory / 2**30:.2f}")
    results().print(table)
