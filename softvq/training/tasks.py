"""What is learned: models and losses joined. The only place where the two meet."""

import dataclasses
from typing import Any, Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.data.folder import Batch
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import TokenizerOutput
from softvq.training.trainer import Task

__all__ = ["LossConfig", "TokenizerTask", "perceptual_weight_at"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What a tokenizer is trained to minimise, besides its quantizer's own terms (arXiv:2412.10958, section 3.3)."""

    reconstruction: Literal["l2", "l1"] = "l2"
    """Mean squared or absolute difference of pixels in [-1, 1], with weight 1."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance after its warm-up; 0 leaves it out."""
    perceptual_start: int = 0
    """Step before which the perceptual distance is left out."""
    perceptual_warmup_steps: int = 10_000
    """Steps after `perceptual_start` in which its weight rises in a line from 0."""
    perceptual_size: int | None = None
    """Side in pixels, a divisor of theirs, that images are averaged down to before it; null keeps them as they are."""
    perceptual_weights: str | None = None
    """File with the weights of the perceptual distance; null takes those that are installed."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        if not self.perceptual_weight >= 0:
            raise InputError(f"perceptual_weight is {self.perceptual_weight}, expected at least 0")
        for name in ("perceptual_start", "perceptual_warmup_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.perceptual_size is not None and self.perceptual_size < 18:
            raise InputError(f"perceptual_size is {self.perceptual_size}, expected at least 18, or null")


def perceptual_weight_at(config: LossConfig, step: int) -> float:
    """Return the weight of the perceptual distance after `step` updates: 0, a line, then `perceptual_weight`."""
    passed = step - config.perceptual_start
    if passed < 0:
        return 0.0
    if passed >= config.perceptual_warmup_steps:
        return config.perceptual_weight
    return config.perceptual_weight * passed / config.perceptual_warmup_steps


class TokenizerTask(Task):
    """Reconstruct images: pixels, a perceptual distance, and the quantizer's own terms.

    loss = |x - D(E(x))|^2 + weight(step) d(x, D(E(x))) + sum of the quantizer's terms     arXiv:2412.10958, section 3.3

    Args:
        tokenizer: Gives a `TokenizerOutput` for images.
        config: Weights and schedule.
        perceptual: Gives one distance per pair of images; may be left out if its weight is 0.
    """

    def __init__(self, tokenizer: nn.Module, config: LossConfig, perceptual: nn.Module | None) -> None:
        super().__init__()
        assert perceptual is not None or config.perceptual_weight == 0
        self.model = tokenizer
        self.config = config
        self.perceptual = perceptual

    def forward(self, batch: Batch, step: int) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the loss and each of its terms: pixels and perceptual distance unweighted, the quantizer's weighted.

        Args:
            batch: Images in [-1, 1].
            step: Finished updates; decides the weight of the perceptual distance, left out while that is 0.

        Returns:
            The loss, and its terms by name.
        """
        output: TokenizerOutput = self.model(batch.images)
        distance = F.mse_loss if self.config.reconstruction == "l2" else F.l1_loss
        loss = distance(output.images.float(), batch.images)
        report = {"reconstruction": loss, **output.losses}
        weight = perceptual_weight_at(self.config, step)
        if weight > 0:
            assert self.perceptual is not None
            report["perceptual"] = self.perceptual(self._shrink(output.images), self._shrink(batch.images)).mean()
            loss = loss + weight * report["perceptual"]
        for term in output.losses.values():
            loss = loss + term
        return loss, report

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the tokenizer and the perceptual network, in place."""
        super().compile(*args, **kwargs)
        if self.perceptual is not None:
            self.perceptual.compile(*args, **kwargs)

    def _shrink(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 h w"]:
        images = images.float()
        size = self.config.perceptual_size
        return images if size is None else F.avg_pool2d(images, images.shape[-1] // size)
