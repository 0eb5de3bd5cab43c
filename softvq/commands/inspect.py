"""What is inside a model: `softvq inspect`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from torch import nn

from softvq import hub
from softvq.commands.common import load_tokenizer, results
from softvq.config import flat, read_json, to_dict
from softvq.evaluation.metrics import compression_ratio
from softvq.evaluation.timing import count_flops
from softvq.files import sha256
from softvq.generators import released
from softvq.generators.generator import LatentGenerator
from softvq.generators.recipe import resolved
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["describe", "describe_generator", "inspect", "parameter_counts"]


def inspect(arguments: argparse.Namespace) -> None:
    """Print what is inside a model, as tables or as JSON."""
    folder = hub.locate(arguments.model)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if config.get("format") == "softvq-generator" or released.is_released(config):
        facts = describe_generator(LatentGenerator.from_pretrained(arguments.model))
    else:
        facts = describe(load_tokenizer(arguments.model, torch.device("cpu")))
    report = {"model": arguments.model, **facts, "files": _files(Path(arguments.model))}
    if arguments.json:
        results().print(json.dumps(report, indent=2), soft_wrap=True)
        return
    for title, content in report.items():
        if isinstance(content, dict):
            table = Table("", Column(overflow="fold"), title=title, title_justify="left", show_header=False)
            for name, value in content.items():
                table.add_row(name, _text(value))
            results().print(table)
        else:
            results().print(f"{title}: {content}", soft_wrap=True)


def describe(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Return the facts about a tokenizer as plain data.

    FLOPs count a multiplication and an addition as two, for one image of the model's own size.
    """
    config = tokenizer.config
    size = config.image_size
    mean, std = tokenizer.latent_mean, tokenizer.latent_std
    return {
        "fingerprint": tokenizer.fingerprint(),
        "parameters": parameter_counts(tokenizer),
        "latents": {
            "image_size": size,
            "patch_size": config.patch_size,
            "num_latent_tokens": config.num_latent_tokens,
            "latent_dim": config.latent_dim,
            "compression_ratio": compression_ratio(size, size, config.num_latent_tokens, config.latent_dim),
            "fingerprint": tokenizer.latent_fingerprint(),
        },
        "latent_statistics": {
            "fitted": bool((mean != 0).any() or (std != 1).any()),
            "per_channel": bool((mean != mean[0]).any() or (std != std[0]).any()),
            "mean": [mean.min().item(), mean.max().item()],
            "std": [std.min().item(), std.max().item()],
        },
        "quantizer": to_dict(config.quantizer),
        "flops": _flops(tokenizer),
    }


def describe_generator(generator: LatentGenerator) -> dict[str, Any]:
    """Return the facts about a generator as plain data."""
    config, classes = generator.config, generator.classes
    asked = {"condition": config.condition, "num_classes": config.num_classes, "label_dropout": config.label_dropout}
    return {
        "fingerprint": generator.fingerprint(),
        "tokenizer": to_dict(generator.tokenizer),
        "parameters": parameter_counts(generator.network),
        "latents": {"num_tokens": config.num_tokens, "latent_dim": config.latent_dim},
        "condition": {**asked, "classes": ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")},
        "network": to_dict(config.network),
        "process": to_dict(config.process),
        "sampling": flat(to_dict(resolved(generator.sampling, config))),
    }


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Return how many numbers are learned in each part; every parameter is counted once."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    own = sum(parameter.numel() for parameter in model.parameters(recurse=False))
    total = sum(p.numel() for p in model.parameters())
    return {**counts, **({"itself": own} if own else {}), "total": total}


def _flops(tokenizer: ImageTokenizer) -> dict[str, int]:
    config = tokenizer.config
    images = (1, 3, config.image_size, config.image_size)
    latents = (1, config.num_latent_tokens, config.latent_dim)
    return {"encode": count_flops(tokenizer.encode, images), "decode": count_flops(tokenizer.decode, latents)}


def _files(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        return {}
    return {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " to ".join(dict.fromkeys(_text(item) for item in value))
    return str(value)
