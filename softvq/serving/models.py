"""What a server has loaded, and how it computes a batch of requests."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

import softvq
from softvq.errors import InputError, RunError
from softvq.generators.generator import LatentGenerator
from softvq.generators.mar import MARConfig
from softvq.generators.recipe import SamplingRecipe
from softvq.pipeline import GenerationPipeline
from softvq.serving.batching import Job
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["Models"]


class Models:
    """A tokenizer and perhaps a generator on its latents, in evaluation mode on one device.

    Args:
        tokenizer: For all requests.
        generator: Made on the tokenizer's latents.
        device: Where they compute.
        precision: Of the networks; auto is bf16 on CUDA.

    Raises:
        InputError: If the generator is of another tokenizer, or is asked by embeddings.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        generator: LatentGenerator | None = None,
        *,
        device: torch.device | str = "cpu",
        precision: Literal["auto", "bf16", "fp32"] = "auto",
    ) -> None:
        if generator is not None and generator.config.condition == "embedding":
            raise InputError("the generator is asked by embeddings, which softvq serve does not take; leave it out")
        self.tokenizer, self.device = tokenizer.eval(), torch.device(device)
        # of the weights as they are stored, whatever they are computed in
        self.fingerprint, self.latent_fingerprint = tokenizer.fingerprint(), tokenizer.latent_fingerprint()
        self.generator_fingerprint = None if generator is None else generator.fingerprint()
        self.pipeline = None if generator is None else GenerationPipeline(generator, tokenizer)
        self._low = precision == "bf16" or (precision == "auto" and self.device.type == "cuda")
        if self.pipeline is not None:
            self.recipe = self.pipeline.generator.checked()
            self.pipeline.to(self.device, precision)
        self.tokenizer.to(self.device).requires_grad_(False)

    @classmethod
    def load(
        cls, tokenizer: Path | str, generator: Path | str | None, *, device: torch.device, precision: Any
    ) -> "Models":
        """Load models from folders, or by their names; see `Models`."""
        made = None if generator is None else LatentGenerator.from_pretrained(generator)
        return cls(ImageTokenizer.from_pretrained(tokenizer), made, device=device, precision=precision)

    @property
    def tokens(self) -> tuple[int, int]:
        """The fewest and the most tokens that can be decoded."""
        config = self.tokenizer.config
        return config.min_latent_tokens or config.num_latent_tokens, config.num_latent_tokens

    def most_steps(self, limit: int) -> int:
        """Return the most steps that may be asked for: MAR has no more than tokens."""
        config = None if self.pipeline is None else self.pipeline.generator.config
        return min(limit, config.num_tokens) if config and isinstance(config.network, MARConfig) else limit

    def changed_recipe(self, steps: int | None, guidance: float | None) -> SamplingRecipe:
        """Return the generator's recipe with what a request overrules; an InputError says if it cannot be so."""
        assert self.pipeline is not None
        recipe = self.recipe if steps is None else dataclasses.replace(self.recipe, steps=steps)
        if guidance is not None:
            recipe = dataclasses.replace(recipe, guidance=dataclasses.replace(recipe.guidance, scale=guidance))
        return self.pipeline.generator.checked(recipe)

    def describe(self) -> dict[str, Any]:
        """Return what is loaded, as plain data."""
        config = self.tokenizer.config
        said: dict[str, Any] = {
            "softvq": softvq.__version__,
            "device": str(self.device),
            "precision": "bf16" if self._low else "fp32",
            "tokenizer": {
                "fingerprint": self.fingerprint,
                "latent_fingerprint": self.latent_fingerprint,
                "image_size": config.image_size,
                "tokens": config.num_latent_tokens,
                "min_tokens": self.tokens[0],
                "dim": config.latent_dim,
                "quantizer": config.quantizer.kind,
                "parameters": sum(one.numel() for one in self.tokenizer.parameters()),
            },
            "generator": None,
        }
        if self.pipeline is not None:
            generator = self.pipeline.generator
            said["generator"] = {
                "fingerprint": self.generator_fingerprint,
                "condition": generator.config.condition,
                "classes": list(generator.classes),
                "num_classes": generator.config.num_classes if generator.config.condition == "class" else 0,
                "guidable": generator.config.guidable,
                "sampler": self.recipe.sampler,
                "steps": self.recipe.steps,
                "guidance": self.recipe.guidance.scale,
                "parameters": sum(one.numel() for one in generator.parameters()),
            }
        return said

    @torch.inference_mode()
    def compute(self, jobs: Sequence[Job]) -> list[Any]:
        """Compute jobs of one group.

        Groups are `("encode", None)`, `("reconstruct", tokens)`, `("decode", tokens)` and `("generate", recipe)`.

        Args:
            jobs: An image `[3, height, width]`, latents `[token, dim]`, or conditions and keys as their payload.

        Returns:
            For each latents, an image, or images `[image, 3, height, width]`, on the CPU; or a RunError where values
            are not finite, which leaves the others alone.
        """
        kind, choice = jobs[0].group
        if kind == "generate":
            return self._generate(jobs, choice)
        stack = torch.stack([job.payload for job in jobs]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._low):
            if kind != "decode":
                stack = self.tokenizer.encode(stack)
                if kind == "encode":
                    return _finite(stack.float().cpu())
            return self._painted(stack[:, :choice])

    def _generate(self, jobs: Sequence[Job], recipe: SamplingRecipe) -> list[Any]:
        assert self.pipeline is not None
        condition, keys = (torch.cat([job.payload[part] for job in jobs]) for part in (0, 1))
        sizes = [job.size for job in jobs]

        def watch(step: int, latents: Tensor) -> None:
            if all(job.future.cancelled() for job in jobs):
                raise _GivenUp
            for job, part in zip(jobs, latents.split(sizes), strict=True):
                if job.show is not None and step in job.previews and not job.future.cancelled():
                    images = self._painted(part)
                    if not any(isinstance(image, RunError) for image in images):  # the last ones may be well
                        job.show(step, images)

        try:
            painted = self._painted(self.pipeline.latents(condition, keys, recipe, watch))
        except _GivenUp:
            return [RunError("nobody waited for the images")] * len(jobs)
        answers = []
        for size in sizes:
            images, painted = painted[:size], painted[size:]
            wrong = next((image for image in images if isinstance(image, RunError)), None)
            answers.append(wrong or images)
        return answers

    def _painted(self, latents: Float[Tensor, "batch token dim"]) -> list[Any]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._low):
            images = self.tokenizer.decode(latents).float()
        return _finite(images.clamp(-1, 1).cpu())


class _GivenUp(Exception):
    """Nobody waits for any of a batch any more."""


def _finite(batch: Tensor) -> list[Any]:
    """Return the rows of a batch, and a RunError in place of those that are not finite."""
    fine = batch.isfinite().flatten(1).all(dim=1).tolist()
    error = RunError("the models gave values that are not finite for this; try other values")
    return [row if good else error for row, good in zip(batch, fine, strict=True)]
