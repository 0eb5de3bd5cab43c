"""What of a model can be exported: modules without softvq's own arguments, and what goes in and comes out of them."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softvq.config import to_dict
from softvq.errors import InputError
from softvq.generators.mar import MARConfig
from softvq.generators.recipe import SamplingRecipe
from softvq.pipeline import GenerationPipeline
from softvq.randomness import keys_of, normal, uniform
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["Part", "Port", "decoder_part", "encoder_part", "sampler_part"]

DETERMINISTIC = ("euler", "heun", "ab2", "dpm++", "ddim")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Port:
    """One input or output of a part."""

    name: str
    """As in the file."""
    shape: tuple[int, ...]
    """Of one sample; the batch stands before it."""
    values: Literal["pixels", "normal", "classes", "embeddings"]
    """RGB around [-1, 1]; numbers of mean 0 and deviation 1; class numbers from 0; any numbers."""
    count: int = 0
    """Of classes."""

    def examples(self, batch: int) -> Tensor:
        """Return values to check with, the same ones every time: `[batch, *shape]`."""
        keys = keys_of(0, f"export {self.name}", torch.arange(batch))
        if self.values == "classes":
            return torch.arange(batch) % self.count
        return 2 * uniform(keys, *self.shape) - 1 if self.values == "pixels" else normal(keys, *self.shape)

    def facts(self) -> dict[str, Any]:
        """Return what a user has to know."""
        ranges = {
            "pixels": "RGB, -1 to 1",
            "normal": "mean 0, deviation 1",
            "classes": f"whole numbers from 0 to {self.count - 1}",
            "embeddings": "as in training",
        }
        dtype = "int64" if self.values == "classes" else "float32"
        return {"name": self.name, "dtype": dtype, "shape": ["batch", *self.shape], "values": ranges[self.values]}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What is to be written: a module without softvq's own arguments, and what goes in and comes out."""

    kind: Literal["encoder", "decoder", "sampler"]
    """Its name on the command line."""
    module: nn.Module
    """Takes the inputs in order, and gives one tensor."""
    inputs: tuple[Port, ...]
    """In order."""
    output: Port
    """What comes out."""
    facts: dict[str, Any]
    """Which model it is of, and what was decided when it was written."""


class _Encoder(nn.Module):
    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer.encode(images).float()


class _Decoder(nn.Module):
    def __init__(self, tokenizer: ImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, latents: Tensor) -> Tensor:
        return self.tokenizer.decode(latents).float()


class _Sampler(nn.Module):
    def __init__(self, pipeline: GenerationPipeline, recipe: SamplingRecipe, *, pixels: bool) -> None:
        super().__init__()
        self.generator, self.recipe = pipeline.generator, recipe
        self.tokenizer = pipeline.tokenizer if pixels else None

    def forward(self, noise: Tensor, condition: Tensor) -> Tensor:
        latents = self.generator.solve(condition, self.recipe.temperature * noise, self.recipe, _no_draw)
        return latents if self.tokenizer is None else self.tokenizer.decode(latents).float()


class _Unconditional(nn.Module):
    def __init__(self, sampler: _Sampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, noise: Tensor) -> Tensor:
        return self.sampler(noise, noise.new_zeros(noise.shape[0], dtype=torch.int64))


def encoder_part(tokenizer: ImageTokenizer) -> Part:
    """Return the encoder: square images of the config's size to normalised latents."""
    side = tokenizer.config.image_size
    return Part(
        kind="encoder",
        module=_Encoder(tokenizer),
        inputs=(Port(name="images", shape=(3, side, side), values="pixels"),),
        output=_latents_of(tokenizer, tokenizer.config.num_latent_tokens),
        facts={"tokenizer": tokenizer.fingerprint(), "latents": tokenizer.latent_fingerprint()},
    )


def decoder_part(tokenizer: ImageTokenizer, tokens: int | None = None) -> Part:
    """Return the decoder: normalised latents to square images of the config's size.

    Args:
        tokenizer: In evaluation mode.
        tokens: The first so many, of a tokenizer with `min_latent_tokens`; None is all.

    Returns:
        The part.

    Raises:
        InputError: If the tokenizer does not decode so many.
    """
    config, side = tokenizer.config, tokenizer.config.image_size
    most = config.num_latent_tokens
    count = most if tokens is None else tokens
    if not (config.min_latent_tokens or most) <= count <= most:
        raise InputError(f"tokens is {count}, this tokenizer decodes {config.min_latent_tokens or most} to {most}")
    return Part(
        kind="decoder",
        module=_Decoder(tokenizer),
        inputs=(_latents_of(tokenizer, count),),
        output=Port(name="images", shape=(3, side, side), values="pixels"),
        facts={"tokenizer": tokenizer.fingerprint(), "latents": tokenizer.latent_fingerprint()},
    )


def sampler_part(pipeline: GenerationPipeline, recipe: SamplingRecipe | None = None, *, pixels: bool = True) -> Part:
    """Return a generator with its sampler, steps and guidance: standard normal noise and labels to images.

    Args:
        pipeline: In float32 on the CPU.
        recipe: How it samples; by default the generator's own.
        pixels: Paint the latents with the tokenizer; else they come out as they are.

    Returns:
        The part; it takes `noise` and, if there is a condition, `labels` or `embeddings`.

    Raises:
        InputError: If the generator is MAR, is guided by another, or the sampler draws noise in every step.
    """
    generator, tokenizer = pipeline.generator, pipeline.tokenizer
    if isinstance(generator.config.network, MARConfig):
        raise InputError("MAR draws at random in every step, so that it cannot be exported; take a SiT or DiT")
    if pipeline.guide is not None:
        raise InputError("a generator with a guide cannot be exported; leave the guide out")
    recipe = generator.checked(recipe)
    if recipe.sampler not in DETERMINISTIC:
        raise InputError(
            f"sampler is {recipe.sampler}, which draws noise in every step; take one of {', '.join(DETERMINISTIC)}"
        )
    config, side = generator.config, tokenizer.config.image_size
    latents = (config.num_tokens, config.latent_dim)
    noise = Port(name="noise", shape=latents, values="normal")
    conditions = {
        "class": (Port(name="labels", shape=(), values="classes", count=config.num_classes),),
        "embedding": (Port(name="embeddings", shape=(config.condition_dim,), values="embeddings"),),
        "none": (),
    }
    sampler = _Sampler(pipeline, recipe, pixels=pixels)
    image = Port(name="images", shape=(3, side, side), values="pixels")
    return Part(
        kind="sampler",
        module=_Unconditional(sampler) if config.condition == "none" else sampler,
        inputs=(noise, *conditions[config.condition]),
        output=image if pixels else Port(name="latents", shape=latents, values="normal"),
        facts={
            "generator": generator.fingerprint(),
            "tokenizer": tokenizer.fingerprint(),
            "sampling": to_dict(recipe),
            "classes": list(generator.classes),
        },
    )


def _latents_of(tokenizer: ImageTokenizer, count: int) -> Port:
    return Port(name="latents", shape=(count, tokenizer.config.latent_dim), values="normal")


def _no_draw(step: int) -> Tensor:
    raise AssertionError(f"a deterministic sampler drew noise in step {step}")
