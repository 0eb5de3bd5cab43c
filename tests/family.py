"""The whole family at the smallest size: every quantizer, and a recipe with every flag on, shared by several tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from softvq.config import from_dict
from softvq.data.folder import Batch
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task
from softvq.training.trainer import Trainer

SOFT = {"kind": "softvq", "codebook_size": 16, "num_codebooks": 2}
VQ = {"kind": "vq", "codebook_size": 16, "num_codebooks": 2, "entropy_weight": 0.01}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "softvq": SOFT,
    "softvq-euclidean": {**SOFT, "similarity": "euclidean", "entropy_per_codebook": True},
    "vq": VQ,
    "kl": {"kind": "kl", "kl_weight": 1e-3},
    "none": {"kind": "none"},
    "gmmvq": {"kind": "gmmvq", "codebook_size": 16},
    "gumbel": {"kind": "gumbel", "codebook_size": 16},
    "gumbel-hard": {"kind": "gumbel", "codebook_size": 16, "hard": True},
    "product": {"kind": "product", "parts": 2, "inner": SOFT},
    "residual": {"kind": "residual", "depth": 3, "inner": VQ},
    "residual-product": {"kind": "residual", "depth": 2, "inner": {"kind": "product", "parts": 2, "inner": SOFT}},
}
PLAIN_LOSS = {"perceptual_weight": 0.0}
EVERY_LOSS = {
    "perceptual_weight": 0.0,
    "adversarial": {
        "discriminator": {
            "kind": "dino", "backbone": "test_vit", "pretrained": False,
            "layers": [1, 2], "image_size": 32, "kernel": 3,
        },
        "start": 1,
        "warmup_steps": 2,
        "adaptive": True,
        "micro_batches": 2,
        "checkpoint": True,
    },
    "alignment": {
        "teacher": "test_vit", "pretrained": False, "hidden": 16, "cosine_margin": 0.5, "distance_weight": 1.0,
        "adaptive": True, "mode": "avg_1d",
    },
    "features": {"decoder": {"width": 16, "depth": 1, "num_heads": 2}},
    "anneal_from": 4.0,
    "anneal_steps": 4,
}  # fmt: skip
EVERY_CORRUPTION = {"mask_ratio": [0.2, 0.6], "latent_noise": 0.5}


def recipe(quantizer: dict[str, Any], *, every_flag: bool = False, **train: Any) -> TokenizerRunConfig:
    """Return a recipe for pictures of 32 px and 4 tokens."""
    vit = {"width": 16, "depth": 1, "num_heads": 2}
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    common = {"batch_size": 8, "steps": 6, "log_every": 1, "save_every": 100, "sample_every": 0, "device": "cpu"}
    data = {
        "model": {"encoder": vit, "decoder": vit, "quantizer": quantizer, **sizes},
        "loss": EVERY_LOSS if every_flag else PLAIN_LOSS,
        "corruption": EVERY_CORRUPTION if every_flag else {},
        "optim": {"lr": 1e-3},
        "train": {**common, "ema_decay": 0.5, **train},
    }
    if every_flag:
        data["model"]["min_latent_tokens"] = 1
    return from_dict(TokenizerRunConfig, data)


def trainer(config: TokenizerRunConfig, run: Path) -> Trainer:
    """Return a trainer of a recipe that looks at no files."""
    run.mkdir(parents=True, exist_ok=True)
    task = build_task(config, torch.device("cpu"))
    return Trainer(task, run, config.train, config.optim, seed=config.seed, console=Console(quiet=True))


def pictures(config: TokenizerRunConfig, step: int, rank: int = 0, ranks: int = 1) -> Batch:
    """Return one rank's part of a step: soft blobs of colour, a function of the step alone."""
    count, size = config.train.batch_size, config.model.image_size
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(step)) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    positions = step * count + torch.arange(count)
    mine = slice(rank * count // ranks, (rank + 1) * count // ranks)
    labels = torch.full((count,), -1)[mine]
    return Batch(images=images[mine], labels=labels, positions=positions[mine], skipped=[])


def stream(config: TokenizerRunConfig, start: int, count: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """Yield one rank's part of some steps."""
    for step in range(start, start + count):
        yield pictures(config, step, rank, ranks)
