"""The generator's task: one loss, on latents that are cached or encoded on the fly."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softvq.data.folder import Batch
from softvq.data.latent_set import LatentBatch
from softvq.generators.generator import LatentGenerator
from softvq.randomness import keys_of
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.compilation import compile_regions
from softvq.training.task import Task

__all__ = ["GeneratorTask"]


class GeneratorTask(Task):
    """Trains a generator.

    Args:
        generator: What is trained.
        seed: Of the run; decides times, noise and hidden labels, by the position of each sample.
        tokenizer: Encodes photographs, frozen; None where batches hold latents.
    """

    def __init__(self, generator: LatentGenerator, *, seed: int, tokenizer: ImageTokenizer | None = None) -> None:
        super().__init__()
        self.model: nn.Module = generator
        self.seed = seed
        # in a tuple, so that it is neither saved nor trained nor wrapped with what is
        self._frozen = () if tokenizer is None else (tokenizer.eval().requires_grad_(False),)

    @property
    def generator(self) -> LatentGenerator:
        """The generator, by its own type."""
        assert isinstance(self.model, LatentGenerator)
        return self.model

    def forward(
        self, batch: Batch | LatentBatch, step: int, scheduled: Mapping[str, Tensor | float]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor], Any]:
        """Return the loss and its terms; see `Task`."""
        losses = self.generator.losses(
            self._latents(batch), batch.labels, keys_of(self.seed, "generator", batch.positions)
        )
        terms = {name: value.mean() for name, value in losses.items()}
        return torch.stack(list(terms.values())).sum(), terms if len(terms) > 1 else {}, None

    def health(self, batch: Batch | LatentBatch) -> dict[str, Tensor]:
        """Return losses at fixed amounts of noise."""
        keys = keys_of(self.seed, "health", batch.positions)
        return self.generator.losses_by_noise(self._latents(batch), batch.labels, keys)

    def figures(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return them as they are."""
        return averages

    def compile(self, **options: Any) -> None:
        """Compile the blocks, in place."""
        for module in (self.model, *self._frozen):
            compile_regions(module, **options)

    def _apply(self, fn: Any, recurse: bool = True) -> "GeneratorTask":
        for tokenizer in self._frozen:  # hidden, so that it has to be moved by hand
            tokenizer._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _latents(self, batch: Batch | LatentBatch) -> Float[Tensor, "batch token dim"]:
        if isinstance(batch, LatentBatch):
            return batch.latents
        with torch.no_grad():
            return next(iter(self._frozen)).encode(batch.images)
