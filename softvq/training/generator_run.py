"""Training a generator from a config and latents: everything from files to files.

Beside what `run_folder` describes, the folder of such a run has at the end `generator/`, which
`GenerationPipeline.from_pretrained` loads: the averaged weights, and the tokenizer if that was a folder.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from softvq.data.folder import PhotoFolder, batches
from softvq.data.images import to_image
from softvq.data.latent_cache import cache_info, read_cache
from softvq.data.latent_set import LatentSet
from softvq.errors import InputError
from softvq.files import replacing, write_text
from softvq.generators.generator import LatentGenerator, TokenizerReference
from softvq.pipeline import GenerationPipeline, keys_of_images
from softvq.randomness import manual_seed
from softvq.ranks import is_main, rank, world_size
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training import checkpoint as checkpoints
from softvq.training import distributed, run_folder
from softvq.training.cards import card_facts
from softvq.training.generator_recipe import GeneratorRunConfig
from softvq.training.generator_task import GeneratorTask
from softvq.training.prefetch import on_device
from softvq.training.tracking import run_status
from softvq.training.trainer import Trainer

__all__ = ["build_generator", "tokenizer_of", "train_generator"]

SAMPLED = 16
SAMPLING = ("sampler", "steps", "head_steps", "shift", "temperature", "ema")
FREE_FIELDS = {
    "latents",
    "tokenizer",
    *(f"data.{name}" for name in ("path", "num_workers", "cache_megabytes", "max_bad_fraction")),
    *(f"sampling.{name}" for name in SAMPLING),
    *(f"sampling.guidance.{name}" for name in ("scale", "interval", "schedule")),
}
"""What a resumed run may change beside `run_folder.FREE_FIELDS`; latents count by content, photographs by name."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """What is trained on."""

    tokenizer: ImageTokenizer
    name: str
    classes: tuple[str, ...]
    data: dict[str, Any]
    stream: Callable[[int, int], Iterator[Any]]


def train_generator(
    config: GeneratorRunConfig, run: Path | str, *, resume: bool = False, console: Console | None = None
) -> Path:
    """Train a generator, or go on training it.

    Args:
        config: What to train, on what, for how long.
        run: Folder for everything the run writes.
        resume: Go on from the newest checkpoint of `run`, as if it had never stopped.
        console: For people; silent by default.

    Returns:
        The folder that `GenerationPipeline.from_pretrained` loads: the averaged weights.

    Raises:
        InputError: If the latents cannot be used, the folder is another run's, or the config or the data changed.
        RunError: If training fails midway.
        Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint was written.
    """
    run = Path(run)
    if config.latents is None and config.data.path is None:
        raise InputError("there is nothing to train on: set latents to a cache, or data.path to photographs")
    train = functools.partial(_train, config, run, resume)
    return run_folder.carry_out(train, run, config.train.device, resume=resume, console=console)


def build_generator(config: GeneratorRunConfig, **options: Any) -> LatentGenerator:
    """Return the generator of a recipe with its initial weights, on the CPU: the same on every rank.

    Args:
        config: The recipe.
        **options: As `LatentGenerator` takes them.

    Returns:
        The generator.
    """
    manual_seed(config.seed, "init")
    average = f"{config.train.ema_decay:g}" if config.sampling.ema is None else config.sampling.ema
    return LatentGenerator(config.model, sampling=dataclasses.replace(config.sampling, ema=average), **options)


def tokenizer_of(config: GeneratorRunConfig) -> tuple[str, ImageTokenizer]:
    """Load the tokenizer of a recipe.

    Args:
        config: With a cache, or with a tokenizer of its own.

    Returns:
        What the tokenizer is called, and the tokenizer.

    Raises:
        InputError: If it cannot be found, or is not the one that made the cache.
    """
    if config.latents is None:
        if config.tokenizer is None:
            raise InputError("tokenizer is not set, which encodes the photographs of data.path")
        return config.tokenizer, ImageTokenizer.from_pretrained(config.tokenizer)
    plan = cache_info(config.latents).plan
    name = config.tokenizer or plan.tokenizer
    tokenizer = ImageTokenizer.from_pretrained(name)
    if tokenizer.latent_fingerprint() != plan.fingerprint:
        raise InputError(f"{name}: is not the tokenizer that made the latents; give that one, or cache again")
    return name, tokenizer


def _train(config: GeneratorRunConfig, run: Path, resume: bool, console: Console) -> Path:
    device = distributed.choose_device(config.train.device)
    source = _source(config, device, console)
    main = is_main()
    if main:
        where = config.latents or str(config.data.path)
        run_folder.claim(run, config, source.data, where, free=FREE_FIELDS, resume=resume)
        checkpoints.recover(run, lambda text: run_folder.say(console, f"warning: {text}"))
    distributed.wait_for_all()
    saved = checkpoints.latest(run)
    trainer = _build(config, run, source, console)
    if main:
        run_folder.register(run, config, source.data)
    run_folder.restore(trainer, saved, resume=resume)
    with run_status(run, lambda: trainer.step, trainer.warn) if main else contextlib.nullcontext():
        trainer.fit(source.stream)
        if main or trainer.sharded:
            _export(trainer, source, run / "generator", card_facts(run, config, source.data))
        distributed.wait_for_all()
    return run / "generator"


def _source(config: GeneratorRunConfig, device: torch.device, console: Console) -> _Source:
    size, seed = config.train.batch_size, config.seed
    if config.latents is not None:
        cache = read_cache(config.latents)
        name, tokenizer = tokenizer_of(config)
        images = LatentSet(cache, device, seed, flip=config.flip)
        data = {"images": len(cache.labels), "fingerprint": cache.digest}

        def stream(start: int, count: int) -> Iterator[Any]:
            return images.batches(size, start, count, rank(), world_size())

        classes, labels = cache.classes, cache.labels.tolist()
    else:
        name, tokenizer = tokenizer_of(config)
        assert config.data.path is not None
        folder = PhotoFolder(config.data.path, tokenizer.config.image_size, config.data, seed)
        for sentence in folder.source.remarks:
            run_folder.say(console, f"warning: {sentence}")
        data = {"images": len(folder), "fingerprint": folder.fingerprint}

        def stream(start: int, count: int) -> Iterator[Any]:
            loaded = batches(folder, size, start, count, config.data.num_workers, rank(), world_size())
            return on_device(loaded, device)

        classes, labels = tuple(folder.classes), folder.labels
    _check_classes(config, classes, labels)
    return _Source(tokenizer=tokenizer, name=name, classes=classes, data=data, stream=stream)


def _check_classes(config: GeneratorRunConfig, classes: tuple[str, ...], labels: list[int]) -> None:
    count = config.model.num_classes
    if config.model.condition == "class" and (not classes or max(labels) >= count or min(labels) < 0):
        raise InputError(
            f"model.condition is 'class' with num_classes {count}, but the images have {len(classes)} classes; sort "
            "them into one folder for each class, or set model.condition to none"
        )


def _build(config: GeneratorRunConfig, run: Path, source: _Source, console: Console) -> Trainer:
    names = source.classes if len(source.classes) == config.model.num_classes else ()
    generator = build_generator(
        config,
        classes=names,
        tokenizer=TokenizerReference(name=source.name, fingerprint=source.tokenizer.latent_fingerprint()),
    )
    task = GeneratorTask(generator, seed=config.seed, tokenizer=None if config.latents else source.tokenizer)
    sampled = is_main() and config.train.sample_every > 0
    return Trainer(
        task,
        run,
        config.train,
        config.optim,
        seed=config.seed,
        console=console,
        info=run_folder.info(config),
        sample=_sampler(generator, source, run / "samples") if sampled else None,
    )


def _sampler(generator: LatentGenerator, source: _Source, folder: Path) -> Callable[[int], dict[str, float]]:
    """Return what draws the same grid again and again: classes in turn, noise as it was."""
    count = generator.config.num_classes if generator.config.condition == "class" else 1
    labels = torch.tensor([place % count for place in range(SAMPLED)])
    pipeline = GenerationPipeline(generator, source.tokenizer)

    def sample(step: int) -> dict[str, float]:
        source.tokenizer.to(next(generator.parameters()).device)
        latents = pipeline.latents(labels, keys_of_images(0, SAMPLED))
        pictures = pipeline.paint(latents)
        rows = [torch.cat(list(row), dim=2) for row in pictures.chunk(4)]
        with replacing(folder / f"step-{step:08d}.png") as temporary:
            to_image(torch.cat(rows, dim=1)).save(temporary, format="PNG")
        return {"latent_std": float(latents.std())}

    return sample


def _export(trainer: Trainer, source: _Source, folder: Path, facts: dict[str, str]) -> None:
    """Save the averaged weights; a tokenizer that is a folder goes with them, so that they can be moved together."""
    assert isinstance(trainer.task, GeneratorTask)
    generator = trainer.task.generator
    with trainer.averaged():
        if not is_main():
            return
        if Path(source.name).is_dir():
            card, copy = (at / "README.md" for at in (Path(source.name), folder / "tokenizer"))
            if card.is_file() and not copy.exists():
                write_text(copy, card.read_text(encoding="utf-8"))
            GenerationPipeline(generator, source.tokenizer).save_pretrained(folder, facts=facts)
        else:
            generator.save_pretrained(folder, facts=facts)
