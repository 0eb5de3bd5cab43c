"""Training a tokenizer from a config and a folder of photographs: everything from files to files.

A run folder holds

    config.yaml            the config, complete, with which the run can be repeated
    run.json               hash of the config, fingerprint of the data set, versions
    log.jsonl              one line a log step
    status.json            running, finished, interrupted or failed
    checkpoints/, samples/
    tokenizer/             at the end: what `ImageTokenizer.from_pretrained` loads
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

import softvq
from softvq.config import flat, from_dict, read_json, read_yaml, to_dict, to_yaml
from softvq.data.folder import Batch, PhotoFolder, batches
from softvq.data.images import center_crop, find_images, read_image, to_image, to_tensor
from softvq.errors import InputError
from softvq.files import replacing, write_json, write_text
from softvq.ranks import is_main, rank, world_size
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training import checkpoint as checkpoints
from softvq.training import distributed
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task, idle_settings
from softvq.training.tokenizer_task import TokenizerTask
from softvq.training.tracking import run_status
from softvq.training.trainer import Trainer

__all__ = ["train_tokenizer"]

NUM_STATISTICS_IMAGES = 512
NUM_SAMPLES = 8
FREE_FIELDS = {
    "held_out",
    *(f"data.{name}" for name in ("path", "num_workers", "cache_megabytes", "max_bad_fraction")),
    *(f"train.{name}" for name in ("device", "log_every", "save_every", "sample_every", "keep", "tensorboard")),
}
"""What a resumed run may change, because it alters nothing that is computed; photographs count by name and size."""


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
        Interrupted: On SIGINT or SIGTERM, after a checkpoint was written.
    """
    run = Path(run)
    if config.data.path is None:
        raise InputError("data.path is not set, expected a folder of photographs")
    if resume and not run.is_dir():
        raise InputError(f"{run}: no such run to resume; leave --resume out to start it")
    distributed.join(distributed.choose_device(config.train.device))
    try:
        if not is_main():
            return _train(config, run, resume, Console(quiet=True))
        with checkpoints.run_lock(run):
            return _train(config, run, resume, console or Console(quiet=True))
    finally:
        distributed.leave()


def _train(config: TokenizerRunConfig, run: Path, resume: bool, console: Console) -> Path:
    assert config.data.path is not None
    folder = PhotoFolder(config.data.path, config.model.image_size, config.data, config.seed)
    main = is_main()
    if main:
        _claim(run, config, folder, resume)
        checkpoints.recover(run, lambda text: _say(console, f"warning: {text}"))
    distributed.wait_for_all()
    saved = checkpoints.latest(run)
    trainer = _build(config, run, console, fresh=saved is None)
    if main:
        _register(run, config, folder)
        for sentence in idle_settings(config):
            trainer.warn(sentence)
    if saved:
        _compare_versions(trainer.restore(saved), trainer)
        done = saved.step >= config.train.steps
        _say(console, f"{run}: {'is finished' if done else 'goes on'}, at step {saved.step}")
    elif resume:
        _say(console, f"{run}: has no checkpoint yet, starts at step 0")

    def stream(start: int, count: int) -> Iterator[Batch]:
        size, workers = config.train.batch_size, config.data.num_workers
        return batches(folder, size, start, count, workers, rank(), world_size())

    with run_status(run, lambda: trainer.step, trainer.warn) if main else contextlib.nullcontext():
        trainer.fit(stream)
        if main:
            _export(trainer, config, run / "tokenizer")
        distributed.wait_for_all()
    return run / "tokenizer"


def _claim(run: Path, config: TokenizerRunConfig, folder: PhotoFolder, resume: bool) -> None:
    """Make the folder this run's, or see that it is."""
    if not resume and any(path.name != ".lock" for path in run.iterdir()):
        raise InputError(f"{run}: is not empty; add --resume to go on with the run in it, or choose another folder")
    others = [path.name for path in run.iterdir() if path.name != ".lock"]
    if others and not (run / "config.yaml").exists() and not (run / "checkpoints").exists():
        raise InputError(f"{run}: is no run to resume, it holds {min(others)}; choose another folder")
    if (run / "config.yaml").exists() or (run / "checkpoints").exists():
        _check_config(run, config)
    data = {"images": len(folder), "fingerprint": folder.fingerprint}
    if (run / "run.json").exists():
        before = read_json(run / "run.json").get("data", {})
        if before != data:
            numbers = f"it had {before.get('images')} images, now {len(folder)}"
            raise InputError(f"{folder.root}: is not the data set {run} was started with ({numbers}); restore it")


def _register(run: Path, config: TokenizerRunConfig, folder: PhotoFolder) -> None:
    """Write down what the run is; not before everything is built, so that a mistake in a recipe leaves nothing."""
    write_text(run / "config.yaml", to_yaml(config))
    data = {"images": len(folder), "fingerprint": folder.fingerprint}
    write_json(run / "run.json", {"config_sha256": _hash(config), "data": data, "versions": _versions()})


def _check_config(run: Path, config: TokenizerRunConfig) -> None:
    path = run / "config.yaml"
    before = flat(to_dict(from_dict(TokenizerRunConfig, read_yaml(path), str(path))))
    now = flat(to_dict(config))
    free = FREE_FIELDS | ({"train.steps"} if config.optim.schedule == "constant" else set())
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and name not in free
    ]
    if changed:
        raise InputError(
            f"{path}: the run was started with another config ({'; '.join(changed)}); undo that or start anew"
        )


def _build(config: TokenizerRunConfig, run: Path, console: Console, fresh: bool) -> Trainer:
    device = distributed.choose_device(config.train.device)
    task = build_task(config, device, fresh=fresh, say=functools.partial(_say, console))
    sampled = is_main() and config.train.sample_every > 0
    return Trainer(
        task,
        run,
        config.train,
        config.optim,
        seed=config.seed,
        console=console,
        critic_optim=config.loss.adversarial.optim if config.loss.adversarial is not None else None,
        info={"config_sha256": _hash(config), "versions": _versions()},
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
    for name in find_images(Path(path)):
        with contextlib.suppress(InputError):
            photograph = read_image(name, config.data.max_pixels)
            images.append(to_tensor(center_crop(photograph, config.model.image_size)))
        if len(images) == NUM_SAMPLES:
            break
    if not images:
        raise InputError(f"{path}: none of its images can be read, expected photographs for the sample grids")
    return torch.stack(images)


def _export(trainer: Trainer, config: TokenizerRunConfig, folder: Path) -> None:
    """Save the averaged weights, with latent statistics fitted on photographs from all over the data set."""
    assert isinstance(trainer.task, TokenizerTask)
    assert config.data.path is not None
    tokenizer = trainer.task.tokenizer
    plain = dataclasses.replace(config.data, crop="center", flip=False)
    photographs = PhotoFolder(config.data.path, config.model.image_size, plain, config.seed)
    count = min(len(photographs), NUM_STATISTICS_IMAGES)
    size = min(count, config.train.batch_size)
    with trainer.averaged():
        stream = batches(photographs, size, 0, -(-count // size), config.data.num_workers)
        if not config.decoder_only:  # otherwise the latents, and files of them, stay valid
            tokenizer.fit_statistics(batch.images for batch in stream)
        tokenizer.save_pretrained(folder)


def _compare_versions(info: Mapping[str, Any], trainer: Trainer) -> None:
    before, now = info.get("versions", {}), _versions()
    changed = [f"{name} {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        trainer.warn(f"the checkpoint was made with {'; '.join(changed)}: results may differ in the last bits")


def _versions() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"softvq": softvq.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "device": device, "threads": str(torch.get_num_threads())}


def _hash(config: TokenizerRunConfig) -> str:
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
