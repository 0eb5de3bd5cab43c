"""The smallest SiT, DiT and MAR, with weights that are nowhere zero, their tokenizer, and a cache to train them on."""

from pathlib import Path
from typing import Any

import torch

from softvq.config import from_dict
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.latent_cache import CachePlan
from softvq.data.latent_writer import write_cache
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator, TokenizerReference
from softvq.generators.recipe import SamplingRecipe
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.generator_recipe import GeneratorRunConfig
from tests.program import DIM, SIZE, TOKENS, make_model, make_photos

KINDS = ("sit", "dit", "mar")
CLASSES = ("ant", "bee", "cat")
STEPS = 6
PHOTOS = tuple(f"{name}/{number}.png" for number in range(4) for name in CLASSES)
TRANSFORMER = {"kind": "transformer", "width": 16, "depth": 2, "num_heads": 2}
MAR = {
    "kind": "mar", "width": 16, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "head_width": 16,
    "head_depth": 1, "condition_tokens": 2, "min_mask_ratio": 0.3,
}  # fmt: skip
NETWORKS = {"sit": TRANSFORMER, "dit": TRANSFORMER, "mar": MAR}
DIFFUSION = {"kind": "diffusion", "schedule": "cosine"}
PROCESSES = {"sit": {"kind": "flow"}, "dit": DIFFUSION, "mar": DIFFUSION}
QUICK = {"sit": {"steps": 3}, "dit": {"steps": 4}, "mar": {"steps": 2, "head_steps": 4}}


def model(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the plain data of a config."""
    shape = {"num_tokens": TOKENS, "latent_dim": DIM, "num_classes": len(CLASSES)}
    return {**shape, "network": NETWORKS[kind], "process": PROCESSES[kind], **changes}


def build(kind: str, seed: int = 0, **changes: Any) -> LatentGenerator:
    """Return a generator, in evaluation mode."""
    return build_with(from_dict(GeneratorConfig, model(kind, **changes)), seed, sampling=quick(kind))


def build_with(config: GeneratorConfig, seed: int = 0, **options: Any) -> LatentGenerator:
    """Return a generator whose weights were all moved: much starts at zero, where nothing can go wrong."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = LatentGenerator(config, **options)
        for parameter in generator.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return generator.eval()


def quick(kind: str, **changes: Any) -> SamplingRecipe:
    """Return a recipe of few steps."""
    return from_dict(SamplingRecipe, {**QUICK[kind], **changes})


def make_generator(folder: Path, kind: str = "sit", seed: int = 0, **changes: Any) -> LatentGenerator:
    """Save a generator with named classes, and its tokenizer inside, as a run leaves them."""
    tokenizer = make_model(folder / "tokenizer")
    config = from_dict(GeneratorConfig, model(kind, **changes))
    generator = build_with(
        config,
        seed,
        classes=CLASSES if config.condition == "class" else (),
        tokenizer=TokenizerReference(name="tokenizer", fingerprint=tokenizer.latent_fingerprint()),
        sampling=quick(kind),
    )
    generator.save_pretrained(folder)
    return generator


def make_cache(root: Path, **changes: Any) -> Path:
    """Write photographs, a tokenizer and the cache of their latents below a folder; return the cache."""
    make_photos(root / "photos", PHOTOS)
    tokenizer = make_model(root / "model")
    plan = {
        "tokenizer": str(root / "model"), "fingerprint": tokenizer.latent_fingerprint(), "tokens": TOKENS, "dim": DIM,
        "shard_size": 5, "softvq_version": "0", **changes,
    }  # fmt: skip
    folder = PhotoFolder(root / "photos", SIZE, DataConfig(crop="center", flip=False), seed=0)
    write_cache(root / "cache", folder, CachePlan(**plan), encoder(tokenizer), batch_size=4)
    return root / "cache"


def encoder(tokenizer: ImageTokenizer) -> Any:
    """Return what a cache is made with."""
    return torch.no_grad()(tokenizer.encode)


def run_config(kind: str, **changes: Any) -> GeneratorRunConfig:
    """Return a run of few steps; `train__steps=3` changes a field of a group."""
    data: dict[str, Any] = {
        "model": model(kind),
        "optim": {"lr": 1e-3, "betas": [0.9, 0.99], "schedule": "cosine", "warmup_steps": 1},
        "train": {
            "batch_size": 4, "steps": STEPS, "log_every": 1, "save_every": 3, "sample_every": 0, "device": "cpu",
            "ema_decay": 0.5,
        },
        "sampling": QUICK[kind],
    }  # fmt: skip
    for dotted, value in changes.items():
        group, _, name = dotted.partition("__")
        if name:
            data[group] = {**data.get(group, {}), name: value}
        else:
            data[group] = str(value) if isinstance(value, Path) else value
    return from_dict(GeneratorRunConfig, data)
