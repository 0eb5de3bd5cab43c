"""What the app computes of a photograph: reconstructions, what is between two of them, and pictures of a generator."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softvq.app.photographs import Bundled, Photograph, Photographs
from softvq.app.pictures import difference_picture, error_picture, picture_address, thumbnail_address
from softvq.errors import InputError, RunError
from softvq.evaluation.metrics import compression_ratio, psnr
from softvq.pipeline import GenerationPipeline, class_numbers, keys_of_images
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["MAX_GUIDANCE", "MAX_STEPS", "Stopped", "Studio", "decibels", "finite"]

MAX_STEPS = 250
MAX_GUIDANCE = 20.0
MAX_CLASSES_LISTED = 1000


class Stopped(Exception):
    """Whoever asked went away, so the rest need not be computed."""


class Studio:
    """Models and photographs, and what the page asks of them; calls must follow one another.

    Args:
        tokenizer: In evaluation mode.
        pipeline: Draws new pictures; None leaves that out.
        bundled: Photographs to offer.
        names: What to call tokenizer and generator on the page.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        pipeline: GenerationPipeline | None,
        bundled: Sequence[Bundled],
        names: tuple[str, str] = ("tokenizer", "generator"),
    ) -> None:
        self.tokenizer, self.pipeline, self.names = tokenizer, pipeline, names
        self.photographs = Photographs(tokenizer, bundled)

    def about(self) -> dict[str, Any]:
        """Return what the page has to know before anything is asked of it."""
        config = self.tokenizer.config
        most, least = config.num_latent_tokens, config.min_latent_tokens or config.num_latent_tokens
        return {
            "tokenizer": {"name": self.names[0], "tokens": most, "fewest": least, "size": config.image_size},
            "generator": None if self.pipeline is None else self._about_generator(self.pipeline),
            "photographs": [described(photograph) for photograph in self.photographs.shown()],
        }

    def add(self, data: bytes, name: str) -> dict[str, Any]:
        """Take in a photograph; see `Photographs.add`."""
        return described(self.photographs.add(data, name))

    @torch.inference_mode()
    def reconstruct(self, key: str, tokens: int) -> dict[str, Any]:
        """Return a photograph beside what comes back of its first tokens.

        Args:
            key: Of the photograph.
            tokens: How many.

        Returns:
            Pictures and figures.

        Raises:
            InputError: If there is no such photograph, or the tokenizer decodes no such number.
        """
        photograph, config = self.photographs[key], self.tokenizer.config
        copy = finite(self.tokenizer.decode(photograph.latents[:, :tokens]))
        original = photograph.image[0]
        ratio = compression_ratio(original.shape[1], original.shape[2], tokens, config.latent_dim)
        return {
            "original": picture_address(original),
            "copy": picture_address(copy),
            "difference": picture_address(difference_picture(copy, original)),
            "error": picture_address(error_picture(copy, original)),
            "psnr": decibels(copy, original),
            "ratio": ratio,
            "bytes": 2 * tokens * config.latent_dim,
            "raw_bytes": original.numel(),
        }

    @torch.inference_mode()
    def between(self, first: str, last: str, share: float) -> dict[str, Any]:
        """Return what is on the straight line between the latents of two photographs.

        Args:
            first: Key of the photograph at 0.
            last: Key of the one at 1.
            share: From 0 to 1.

        Returns:
            The picture there, and the photographs at both ends.

        Raises:
            InputError: If there is no such photograph.
        """
        start, end = self.photographs[first], self.photographs[last]
        latents = (1 - share) * start.latents + share * end.latents
        return {
            "picture": picture_address(finite(self.tokenizer.decode(latents))),
            "first": picture_address(start.image[0]),
            "last": picture_address(end.image[0]),
        }

    def generate(
        self,
        label: str,
        seed: int,
        guidance: float,
        steps: int,
        show: Callable[[dict[str, Any]], None],
        stop: threading.Event,
    ) -> None:
        """Draw a picture, and show it as it comes.

        Args:
            label: Name or number of a class; anything where the generator has no condition.
            seed: What all noise is drawn from.
            guidance: Scale of guidance.
            steps: Of the sampler.
            show: Called with each step's number and picture, and at last with the final picture and its seconds.
            stop: Once it is set, the sampling ends.

        Raises:
            InputError: If there is no generator, or it cannot be sampled so.
            RunError: If the picture is not finite.
            Stopped: If it was.
        """
        pipeline = self.pipeline
        if pipeline is None:
            raise InputError("the app was started without a generator; start it with --generator MODEL")
        generator = pipeline.generator
        recipe = dataclasses.replace(
            generator.sampling,
            steps=steps,
            guidance=dataclasses.replace(generator.sampling.guidance, scale=guidance),
        )
        condition = class_numbers([label], generator).to(pipeline.device)
        keys = keys_of_images(seed, 1).to(pipeline.device)
        started = time.perf_counter()

        def watch(step: int, latents: Tensor) -> None:
            if stop.is_set():
                raise Stopped
            picture = picture_address(pipeline.paint(latents)[0])
            show({"step": step, "steps": recipe.steps, "picture": picture})

        latents = generator.sample(condition, keys, recipe, guide=pipeline.guide, watch=watch)
        picture = picture_address(pipeline.paint(latents)[0])
        show({"done": True, "steps": steps, "picture": picture, "seconds": time.perf_counter() - started})

    def _about_generator(self, pipeline: GenerationPipeline) -> dict[str, Any]:
        generator, config = pipeline.generator, pipeline.generator.config
        if config.condition == "embedding":
            raise InputError(
                f"{self.names[1]} is asked by embeddings, which a page has none of; give another generator"
            )
        numbers = [str(i) for i in range(min(config.num_classes, MAX_CLASSES_LISTED))]
        most = config.num_tokens if config.network.kind == "mar" else MAX_STEPS
        return {
            "name": self.names[1],
            "classes": [] if config.condition == "none" else list(generator.classes) or numbers,
            "steps": min(generator.sampling.steps, most),
            "most_steps": most,
            "guidance": generator.sampling.guidance.scale if config.guidable else 1.0,
            "most_guidance": MAX_GUIDANCE if config.guidable else 1.0,
        }


def described(photograph: Photograph) -> dict[str, Any]:
    """Return a photograph as the page lists it."""
    return {
        "key": photograph.key,
        "name": photograph.name,
        "size": photograph.size,
        "credit": photograph.credit,
        "picture": thumbnail_address(photograph.image[0]),
    }


def decibels(copy: Float[Tensor, "3 height width"], original: Float[Tensor, "3 height width"]) -> float | None:
    """Return the PSNR of two pictures in [-1, 1], None where they are equal: JSON has no infinity."""
    found = float(psnr(copy[None], original[None]))
    return found if found != float("inf") else None


def finite(images: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "3 height width"]:
    """Return the one picture in [-1, 1].

    Args:
        images: As the tokenizer decodes it.

    Returns:
        The picture.

    Raises:
        RunError: If it is not finite.
    """
    if not bool(images.isfinite().all()):
        raise RunError("the model paints values that are not finite; start the app with another model")
    return images[0].float().clamp(-1, 1)
