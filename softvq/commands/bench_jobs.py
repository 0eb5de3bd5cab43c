"""What `softvq bench` times: models with random weights, on which speed does not depend, and the calls of them."""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softvq.backbones import compute_dtype
from softvq.commands.common import messages, precision_of
from softvq.commands.train import generator_recipe_of, read_recipe
from softvq.errors import InputError
from softvq.evaluation.profiling import Share, profiled
from softvq.evaluation.timing import Timing, count_flops, time_in_turns
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.guidance import Guidance
from softvq.generators.presets import generator_preset
from softvq.generators.recipe import SamplingRecipe
from softvq.inference.accelerate import accelerate
from softvq.pipeline import GenerationPipeline
from softvq.randomness import keys_of
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.presets import preset
from softvq.tokenizers.vit import ViTConfig
from softvq.training.compilation import compile_regions
from softvq.training.rehearsal import Phase, rehearse, rehearse_generator
from softvq.training.train_config import TrainConfig

__all__ = ["Row", "bench_generator_training", "bench_sampling", "bench_tokenizer", "bench_tokenizer_training"]

ONE_EVALUATION = ("euler", "euler_maruyama", "ab2", "dpm++", "dpm++_sde", "ddpm", "ddim")
"""Samplers that evaluate the network once a step."""
NETWORK_STEPS = 4
"""Steps of the solver in a timed call of `sample`; the others would take as long."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    job: str
    """What was timed: `encode`, `decode`, a `step` of sampling with guidance, an `update` of a training."""
    model: str
    """Of what."""
    batch: int
    """Images at once."""
    seconds: float
    """Median of one."""
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    images_per_sec: float
    """Through the whole job: for `sample` all steps and the decoding."""
    flops: int | None
    """Floating-point operations of one."""
    memory: int
    """Most bytes of tensors at once on a GPU, of the whole process on the CPU where it trains; 0 where not known."""
    precision: str
    """Of the networks."""
    compiled: bool
    """Whether they were."""
    note: str = ""
    """What else is to be known of it."""
    profile: tuple[Share, ...] = ()
    """Where the time goes, if it was asked for."""


def bench_tokenizer(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time encoding or decoding, and the bare timm transformer of equal shapes if it is asked for."""
    config = _tokenizer_config(arguments.preset, arguments.size)
    with torch.device(device):
        tokenizer = ImageTokenizer(config).eval()
        shape = (3, config.image_size, config.image_size)
        latents = (config.num_latent_tokens, config.latent_dim)
        given = torch.rand(arguments.batch, *(shape if arguments.job == "encode" else latents)) * 2 - 1
        images = torch.rand(arguments.batch, *shape)
        vit = config.encoder if arguments.job == "encode" else config.decoder
        stock = _stock_vit(config, vit) if arguments.baseline else None
    flops = count_flops(lambda one: getattr(ImageTokenizer(config), arguments.job)(one), (1, *given.shape[1:]))
    fast = arguments.compile and device.type == "cuda" and arguments.precision != "float32"
    if fast:
        accelerate(tokenizer, arguments.precision)
    for model in filter(None, (None if fast else tokenizer, stock) if arguments.compile else ()):
        compile_regions(model)

    def ours() -> Tensor:
        with torch.inference_mode(), precision_of(device, arguments.precision):
            return getattr(tokenizer, arguments.job)(given)

    def theirs() -> Tensor:
        assert stock is not None
        with torch.inference_mode(), precision_of(device, arguments.precision):
            return stock.forward_features(images)

    calls, how = [ours, theirs] if arguments.baseline else [ours], (arguments.precision, arguments.compile)
    timings = time_in_turns(calls, device, rounds=arguments.rounds)
    yield _row(arguments.job, arguments.preset, arguments.batch, timings[0], arguments.batch * flops, how)
    if arguments.baseline:
        ratio = statistics.median(a / b for a, b in zip(timings[0].rounds, timings[1].rounds, strict=True))
        note = f"ours takes {ratio:.3f} of its time"
        yield _row(arguments.job, "timm's ViT of equal shapes", arguments.batch, timings[1], None, how, note)


def bench_sampling(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time a step of a generator with guidance, and the decoding of its latents."""
    config = generator_preset(arguments.generator, num_tokens=arguments.tokens, latent_dim=arguments.dim)
    pipeline = _pipeline(config, arguments, device)
    seen = arguments.batch * (1 if arguments.guidance == 1 else 2)
    # of MAR and of solvers with two evaluations a step the share would be of something else
    counted = not arguments.generator.startswith("mar") and arguments.sampler in ONE_EVALUATION
    flops = seen * _evaluation_flops(config) if counted else None
    pipeline = pipeline.to(device, "fp32" if arguments.precision == "float32" else "bf16")
    if arguments.compile:
        pipeline.compile(fp8=arguments.precision == "fp8")
    recipe = SamplingRecipe(sampler=arguments.sampler, steps=NETWORK_STEPS, guidance=Guidance(scale=arguments.guidance))
    condition = (torch.arange(arguments.batch) % config.num_classes).to(device)
    keys = keys_of(0, "speed", torch.arange(arguments.batch, device=device))
    latents = pipeline.latents(condition, keys, recipe)

    def decode() -> Tensor:  # without the copy to the CPU that `paint` ends with
        with torch.inference_mode(), precision_of(device, arguments.precision):
            return pipeline.tokenizer.decode(latents)

    calls = [lambda: pipeline.latents(condition, keys, recipe), *([] if arguments.latents_only else [decode])]
    sampling, *decoding = time_in_turns(calls, device, rounds=arguments.rounds)
    step = _divided(sampling, NETWORK_STEPS)
    whole = arguments.steps * step.seconds + sum(timing.seconds for timing in decoding)
    name, how = f"{arguments.generator}, {arguments.tokens} tokens", (arguments.precision, arguments.compile)
    note = f"{arguments.sampler}, {arguments.steps} steps{'' if arguments.latents_only else ' and decoding'}"
    yield dataclasses.replace(
        _row("step", name, arguments.batch, step, flops, how, note), images_per_sec=arguments.batch / whole
    )
    for timing in decoding:
        yield _row("decode", arguments.preset, arguments.batch, timing, None, how)


def bench_tokenizer_training(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time an update of each phase of a recipe; frozen networks whose weights are not there may be random ones."""
    changes: dict[str, Any] = {"train.device": str(device)}
    config = read_recipe(Path(arguments.config), arguments.overrides, changes)
    found: list[tuple[Share, ...]] = []
    for phase in rehearse(config, Console(quiet=True), messages().print, _look(arguments, device, found)):
        row = _phase_row(phase, Path(arguments.config).stem, config.train, device)
        yield dataclasses.replace(row, profile=found[-1] if found else ())


def bench_generator_training(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Time an update of a recipe on latents in memory."""
    shape = {"num_tokens": arguments.tokens, "latent_dim": arguments.dim, "num_classes": arguments.classes}
    changes = {"train.device": str(device)}
    config = generator_recipe_of(Path(arguments.config), arguments.overrides, changes, shape)
    found: list[tuple[Share, ...]] = []
    phase = rehearse_generator(config, Console(quiet=True), _look(arguments, device, found))
    name = f"{Path(arguments.config).stem}, {arguments.tokens} tokens"
    row = _phase_row(phase, name, config.train, device)
    yield dataclasses.replace(row, profile=found[-1] if found else ())


def _look(
    arguments: argparse.Namespace, device: torch.device, found: list[tuple[Share, ...]]
) -> Callable[[Callable[[], object]], object] | None:
    """Return what takes the profile of an update, if that is asked for."""
    if not arguments.profile:
        return None
    if device.type != "cuda":
        raise InputError(f"--profile is of a GPU's kernels, but the device is {device}; leave it out")
    return lambda update: found.append(tuple(profiled(update)))


def _row(
    job: str, model: str, batch: int, timing: Timing, flops: int | None, how: tuple[str, bool], note: str = ""
) -> Row:
    return Row(
        job=job,
        model=model,
        batch=batch,
        seconds=timing.seconds,
        low=timing.low,
        high=timing.high,
        images_per_sec=batch / timing.seconds,
        flops=flops,
        memory=timing.memory,
        precision=how[0],
        compiled=how[1],
        note=note,
    )


def _phase_row(phase: Phase, model: str, train: TrainConfig, device: torch.device) -> Row:
    timing = Timing(seconds=phase.seconds, low=phase.seconds, high=phase.seconds, rounds=(), memory=phase.memory)
    low = compute_dtype(train.precision, device) == torch.bfloat16
    how = "bf16" if low else "float32", train.compile
    return _row("update", model, train.batch_size, timing, None, how, phase.name)


def _divided(timing: Timing, parts: int) -> Timing:
    spent = {name: getattr(timing, name) / parts for name in ("seconds", "low", "high")}
    return dataclasses.replace(timing, **spent)


def _tokenizer_config(name: str, size: int | None) -> TokenizerConfig:
    config = preset(name)
    encoder, decoder = (dataclasses.replace(vit, pretrained=None) for vit in (config.encoder, config.decoder))
    return dataclasses.replace(config, encoder=encoder, decoder=decoder, image_size=size or config.image_size)


def _stock_vit(config: TokenizerConfig, vit: ViTConfig) -> VisionTransformer:
    """Return timm's transformer, whose register tokens stand for the latent tokens, so that both see as many."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.num_heads,
        reg_tokens=config.num_latent_tokens,
        init_values=1.0,
        num_classes=0,
    ).eval()


def _pipeline(config: GeneratorConfig, arguments: argparse.Namespace, device: torch.device) -> GenerationPipeline:
    tokens = {"num_latent_tokens": config.num_tokens, "latent_dim": config.latent_dim, "min_latent_tokens": None}
    with torch.device(device):
        tokenizer = ImageTokenizer(dataclasses.replace(_tokenizer_config(arguments.preset, arguments.size), **tokens))
        return GenerationPipeline(LatentGenerator(config), tokenizer)


def _evaluation_flops(config: GeneratorConfig) -> int:
    """Count one evaluation of the network for one image."""

    def evaluate(noisy: Tensor, time: Tensor) -> object:
        network = LatentGenerator(config).network
        return network(noisy, time, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.bool))

    return count_flops(evaluate, (1, config.num_tokens, config.latent_dim), (1,))
