"""Training a tokenizer from a config and a folder of photographs: everything from files to files.

Beside what `run_folder` describes, the folder of such a run has at the end `tokenizer/`, which
`ImageTokenizer.from_pretrained` loads.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from softvq.data.folder import Batch, PhotoFolder, batches
from softvq.data.images import center_crop, to_image, to_tensor
from softvq.data.sources import open_source
from softvq.errors import InputError
from softvq.files import replacing
from softvq.ranks import is_main, rank, world_size
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training import checkpoint as checkpoints
from softvq.training import distributed, run_folder
from softvq.training.cards import card_facts
from softvq.training.prefetch import on_device
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task, idle_settings
from softvq.training.tokenizer_task import TokenizerTask
from softvq.training.tracking import run_status
from softvq.training.trainer import Trainer

__all__ = ["train_tokenizer"]

NUM_STATISTICS_IMAGES = 512
NUM_SAMPLES = 8
FREE_FIELDS = {"held_out", *(f"data.{name}" for name in ("path", "num_workers", "cache_megabytes", "max_bad_fraction"))}
"""What a resumed run may change beside `run_folder.FREE_FIELDS`; photographs count by name and size."""


def train_tokenizer(
    config: TokenizerRunConfig, run: Path | str, *, resume: bool = False, console: Console | None = None
) -> Path:
    """Train a tokenizer, or go on training it.

    Args:
        config: What to train, on what, for how long.
        run: Folder for everything the run writes.
        resume: Go on from the newest checkpoint of `run`, as if it had never stopped.
        console: For people; silent by default.

    Returns:
        The folder that `ImageTokenizer.from_pretrained` loads: the averaged weights with their latent statistics.

    Raises:
        InputError: If the data set cannot be used, the folder is another run's, or the config or the data changed.
        RunError: If training fails midway.
        Interrupted: On SIGINT, SIGTERM or SIGHUP, after a checkpoint was written.
    """
    run = Path(run)
    if config.data.path is None:
        raise InputError("data.path is not set, expected a folder of photographs")
    train = functools.partial(_train, config, run, resume)
    return run_folder.carry_out(train, run, config.train.device, resume=resume, console=console)


def _train(config: TokenizerRunConfig, run: Path, resume: bool, console: Console) -> Path:
    assert config.data.path is not None
    folder = PhotoFolder(config.data.path, config.model.image_size, config.data, config.seed)
    for sentence in folder.source.remarks:
        run_folder.say(console, f"warning: {sentence}")
    main = is_main()
    data = {"images": len(folder), "fingerprint": folder.fingerprint}
    if main:
        run_folder.claim(run, config, data, folder.root, free=FREE_FIELDS, resume=resume)
        checkpoints.recover(run, lambda text: run_folder.say(console, f"warning: {text}"))
    distributed.wait_for_all()
    saved = checkpoints.latest(run)
    trainer = _build(config, run, console, fresh=saved is None)
    if main:
        run_folder.register(run, config, data)
        for sentence in idle_settings(config):
            trainer.warn(sentence)
    run_folder.restore(trainer, saved, resume=resume)

    def stream(start: int, count: int) -> Iterator[Batch]:
        size, workers = config.train.batch_size, config.data.num_workers
        return on_device(batches(folder, size, start, count, workers, rank(), world_size()), trainer.device)

    with run_status(run, lambda: trainer.step, trainer.warn) if main else contextlib.nullcontext():
        trainer.fit(stream)
        if main or trainer.sharded:
            _export(trainer, config, run / "tokenizer", data)
        distributed.wait_for_all()
    return run / "tokenizer"


def _build(config: TokenizerRunConfig, run: Path, console: Console, fresh: bool) -> Trainer:
    device = distributed.choose_device(config.train.device)
    task = build_task(config, device, fresh=fresh, say=functools.partial(run_folder.say, console))
    sampled = is_main() and config.train.sample_every > 0
    return Trainer(
        task,
        run,
        config.train,
        config.optim,
        seed=config.seed,
        console=console,
        critic_optim=config.loss.adversarial.optim if config.loss.adversarial is not None else None,
        info=run_folder.info(config),
        sample=_sampler(task.tokenizer, _first_images(config), run / "samples") if sampled else None,
    )


def _sampler(
    tokenizer: ImageTokenizer, images: Float[Tensor, "batch 3 height width"], folder: Path
) -> Callable[[int], dict[str, float]]:
    def sample(step: int) -> dict[str, float]:
        originals = images.to(tokenizer.latent_mean.device)
        pictures = tokenizer.decode_raw(tokenizer.encode_raw(originals)).float().clamp(-1, 1)
        rows = [torch.cat(list(row), dim=2) for row in (originals, pictures)]
        with replacing(folder / f"step-{step:08d}.png") as temporary:
            to_image(torch.cat(rows, dim=1)).save(temporary, format="PNG")
        errors = (pictures - originals).square().mean(dim=(1, 2, 3))
        return {"psnr": float((10 * torch.log10(4 / errors)).mean())}  # the range from -1 to 1 is 2 wide

    return sample


def _first_images(config: TokenizerRunConfig) -> Float[Tensor, "batch 3 height width"]:
    """Return the first readable held-out photographs, cropped in the middle."""
    path = config.held_out or config.data.path
    assert path is not None
    images: list[Tensor] = []
    source = open_source(path)
    for index in range(len(source.names)):
        with contextlib.suppress(InputError):
            photograph = source.image(index, config.data.max_pixels)
            images.append(to_tensor(center_crop(photograph, config.model.image_size)))
        if len(images) == NUM_SAMPLES:
            break
    if not images:
        raise InputError(f"{path}: none of its images can be read, expected photographs for the sample grids")
    return torch.stack(images)


def _export(trainer: Trainer, config: TokenizerRunConfig, folder: Path, data: Mapping[str, Any]) -> None:
    """Save the averaged weights, with latent statistics fitted on photographs from all over the data set."""
    assert isinstance(trainer.task, TokenizerTask)
    assert config.data.path is not None
    tokenizer = trainer.task.tokenizer
    plain = dataclasses.replace(config.data, crop="center", flip=False)
    photographs = PhotoFolder(config.data.path, config.model.image_size, plain, config.seed)
    count = min(len(photographs), NUM_STATISTICS_IMAGES)
    size = min(count, config.train.batch_size)
    with trainer.averaged():
        if not is_main():
            return
        stream = batches(photographs, size, 0, -(-count // size), config.data.num_workers)
        if not config.decoder_only:  # otherwise the latents, and files of them, stay valid
            tokenizer.fit_statistics(batch.images for batch in stream)
        tokenizer.save_pretrained(folder, facts=card_facts(trainer.run, config, data))
