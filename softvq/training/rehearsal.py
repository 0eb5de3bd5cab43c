"""A rehearsal: every phase of a run, for a few updates on noise, before hours are spent on the real one.

Phases differ in what they compute. A discriminator that starts at step 20,000 and does not fit into memory is found
here, not a day later.
"""

import contextlib
import dataclasses
import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console

from softvq.data.folder import Batch
from softvq.data.latent_set import LatentBatch
from softvq.errors import InputError, RunError
from softvq.randomness import normal
from softvq.training import distributed
from softvq.training.adversary import adversarial_weight_at
from softvq.training.generator_recipe import GeneratorRunConfig
from softvq.training.generator_run import build_generator
from softvq.training.generator_task import GeneratorTask
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task, idle_settings
from softvq.training.tokenizer_task import TokenizerTask, perceptual_weight_at
from softvq.training.trainer import Trainer

__all__ = ["Phase", "heaviest_step", "phases", "rehearse", "rehearse_generator"]

Look: TypeAlias = Callable[[Callable[[], object]], object]
UNTIMED_UPDATES, TIMED_UPDATES = 4, 4
STEPS_LOOKED_AT = 64
BYTES_PER_WEIGHT = 20  # weight, gradient, two running means of AdamW, average, in float32


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A part of a run in which the same things are computed."""

    name: str
    """What is computed, such as `pixels + perceptual`."""
    first_step: int
    """Updates made before it begins."""
    parameters: int = 0
    """Numbers that are trained in it, those of its discriminator among them."""
    seconds: float = 0.0
    """Of one update, by the clock."""
    memory: int = 0
    """Largest memory in bytes: of tensors on a GPU, of the whole process so far on the CPU."""


def phases(config: TokenizerRunConfig) -> list[Phase]:
    """Return the phases of a run, in order; those that its steps never reach are left out."""
    loss = config.loss
    adversarial = loss.adversarial
    begins = {0, loss.perceptual_start, loss.perceptual_start + 1} | ({adversarial.start} if adversarial else set())
    found: dict[str, Phase] = {}
    for step in sorted(begins):
        parts = ["pixels"]
        parts += ["perceptual"] if perceptual_weight_at(loss, step) > 0 else []
        parts += ["adversarial"] if adversarial and adversarial_weight_at(adversarial, step) > 0 else []
        parts += ["alignment"] if loss.alignment else []
        name = " + ".join(parts)
        if step < config.train.steps and name not in found:
            found[name] = Phase(name=name, first_step=step)
    return list(found.values())


def rehearse(
    config: TokenizerRunConfig, console: Console, warn: Callable[[str], None], look: Look | None = None
) -> Iterator[Phase]:
    """Go through the phases of a run and yield each with its time and memory.

    Nothing is written, and no photograph is read. The networks are built and, where the recipe says so, compiled as in
    training. What a phase leaves in the weights the next one finds there.

    Args:
        config: The recipe.
        console: For what training would say.
        warn: Takes a sentence about what will not happen.
        look: Is given what makes an update of each phase, once it is measured.

    Yields:
        The phases in order, measured.

    Raises:
        InputError: If something that the recipe asks for cannot be had, naming the phase `build`.
        RunError: If a phase fails, naming it: out of memory, or not finite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a dry run is of one process; run it without torchrun, with train.batch_size of one process")
    for sentence in idle_settings(config):
        warn(sentence)
    device = distributed.choose_device(config.train.device)
    try:
        task = build_task(config, device, say=warn)
        _check_memory(sum(p.numel() for p in task.model.parameters() if p.requires_grad), device)
        optim = config.loss.adversarial.optim if config.loss.adversarial else None
        settings = {"seed": config.seed, "console": console, "critic_optim": optim}
        trainer = Trainer(task, Path(), config.train, config.optim, **settings)
    except (InputError, RunError) as error:
        raise type(error)(f"phase 'build': {error}") from error
    except torch.OutOfMemoryError as error:
        raise RunError("phase 'build': the GPU is too small for weights and their state") from error
    trainer.task.train()
    batch = _noise(config)
    batch = batch.pin_memory() if device.type == "cuda" else batch
    for phase in phases(config):
        trainer.step = heaviest_step(task, phase.first_step)
        try:
            seconds, memory = _measure(trainer, batch)
            if look is not None:
                look(functools.partial(trainer.update, batch))
        except RunError as error:
            raise RunError(f"phase {phase.name!r}, from step {phase.first_step}: {error}") from error
        judged = task.critic is not None and task.critic_counts(phase.first_step)
        trained = [*task.model.parameters(), *(task.critic.parameters() if judged and task.critic else ())]
        parameters = sum(p.numel() for p in trained if p.requires_grad)
        yield dataclasses.replace(phase, parameters=parameters, seconds=seconds, memory=memory)


def rehearse_generator(config: GeneratorRunConfig, console: Console, look: Look | None = None) -> Phase:
    """Train a generator for a few updates on latents of noise, and measure one.

    Args:
        config: The recipe, with a cache or without: encoding photographs on the fly is not measured.
        console: For what training would say.
        look: Is given what makes an update, once it is measured.

    Returns:
        Its only phase.

    Raises:
        RunError: If it does not fit into memory, or is not finite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("a dry run is of one process; run it without torchrun, with train.batch_size of one process")
    device = distributed.choose_device(config.train.device)
    task = GeneratorTask(build_generator(config), seed=config.seed)
    parameters = sum(p.numel() for p in task.model.parameters() if p.requires_grad)
    _check_memory(parameters, device)
    trainer = Trainer(task, Path(), config.train, config.optim, seed=config.seed, console=console)
    trainer.task.train()
    count, model = config.train.batch_size, config.model
    positions = torch.arange(count, device=device)
    latents = normal(positions, model.num_tokens, model.latent_dim)
    batch = LatentBatch(latents=latents, labels=positions % model.num_classes, positions=positions)
    seconds, memory = _measure(trainer, batch)
    if look is not None:
        look(functools.partial(trainer.update, batch))
    return Phase(name=model.process.kind, first_step=0, parameters=parameters, seconds=seconds, memory=memory)


def heaviest_step(task: TokenizerTask, first: int) -> int:
    """Return a step of the phase that begins at `first`, one that decodes the most tokens where their number varies."""
    steps = [step for step in range(first, first + STEPS_LOOKED_AT) if task.phase(step)[:2] == task.phase(first)[:2]]
    return max(steps, key=lambda step: task.phase(step)[2] or 0)


def _measure(trainer: Trainer, batch: Batch | LatentBatch) -> tuple[float, int]:
    on_gpu = trainer.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    for _ in range(UNTIMED_UPDATES):  # compiling, choosing kernels, recording
        trainer.update(batch)
        trainer.check_finite()
    started = time.perf_counter()
    for _ in range(TIMED_UPDATES):
        trainer.update(batch)
    trainer.check_finite()  # waits for the GPU
    seconds = (time.perf_counter() - started) / TIMED_UPDATES
    if on_gpu:
        return seconds, torch.cuda.max_memory_allocated(trainer.device)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _noise(config: TokenizerRunConfig) -> Batch:
    count, size = config.train.batch_size, config.model.image_size
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(config.seed)) * 2 - 1
    labels, positions = torch.full((count,), -1), torch.arange(count)
    return Batch(images=images, labels=labels, positions=positions, skipped=[])


def _check_memory(weights: int, device: torch.device) -> None:
    needed = weights * BYTES_PER_WEIGHT
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available_memory()
    if needed > free:
        raise RunError(
            f"{needed / 2**30:.1f} GiB are needed for weights and their state alone, {free / 2**30:.1f} GiB are free"
        )


def _available_memory() -> int:
    """Return the bytes that programs can have, caches given up for them counted in."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
