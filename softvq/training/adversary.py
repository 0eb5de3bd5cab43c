"""A discriminator and how it is trained: what a tokenizer's reconstructions have to pass as real.

It has an optimizer of its own and is neither averaged nor part of the saved tokenizer. Before its first step counts,
nothing of it is computed.
"""

import dataclasses
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from softvq.config import check_finite
from softvq.errors import InputError
from softvq.losses.adversarial import LeCam, consistency_loss, discriminator_loss, generator_loss
from softvq.losses.augment import augment
from softvq.losses.discriminators import DinoConfig, DiscriminatorConfig, build_discriminator
from softvq.randomness import fold_in
from softvq.training.optim import OptimConfig

__all__ = ["AdversarialConfig", "Adversary", "adversarial_weight_at"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AdversarialConfig:
    """The adversarial term of the paper, as released (arXiv:2412.10958, section 3.3)."""

    discriminator: DiscriminatorConfig = dataclasses.field(default_factory=DinoConfig)
    """The network that tells photographs from reconstructions."""
    loss: Literal["hinge", "logistic", "non_saturating"] = "hinge"
    """How its verdicts are scored."""
    weight: float = 0.2
    """Weight of the tokenizer's term, and of the discriminator's own loss but for its consistency."""
    start: int = 20_000
    """Step from which it counts; before it, nothing of it is computed."""
    warmup_steps: int = 0
    """Steps after `start` in which the weight rises in a line from 0."""
    adaptive: bool = False
    """Scale the tokenizer's term so that its gradient at the pixels is as large as that of the other terms."""
    lecam_weight: float = 0.001
    """Weight of the LeCam regulariser (arXiv:2104.03310) beside the discriminator's loss; 0 leaves it out."""
    lecam_decay: float = 0.999
    """Decay of the averages it compares verdicts with."""
    consistency_weight: float = 4.0
    """Weight of the squared difference of verdicts on a weakly and a strongly augmented image; 0 leaves it out."""
    color: bool = True
    """Let the augmentation change brightness, saturation and contrast."""
    translation: float = 0.125
    """Largest shift of the augmentation, as a share of the side; 0 for none."""
    cutout: float = 0.2
    """Side of the square it blanks, as a share of the side; 0 for none. The strong augmentation has 0.5."""
    augment_probability: float = 0.5
    """Probability of each of the three, for each image; the strong augmentation has 1."""
    micro_batches: int = 1
    """Parts in which the discriminator sees a batch, one after the other; with `checkpoint` this saves memory. StyleGAN
    compares neighbouring samples, so that there parts should hold a multiple of its `group`."""
    checkpoint: bool = False
    """Compute the discriminator's activations again in the backward pass instead of keeping them."""
    optim: OptimConfig | None = None
    """How the discriminator is updated; null takes the tokenizer's. Its schedule counts from step 0, as the tokenizer's
    does, so that a warm-up is over by `start` unless it is longer."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_finite(self)
        if not self.weight > 0:
            raise InputError(f"weight is {self.weight}, expected more than 0; leave adversarial out to train without")
        for name in ("start", "warmup_steps", "lecam_weight", "consistency_weight"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 0")
        for name in ("translation", "cutout", "augment_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if not 0 <= self.lecam_decay < 1:
            raise InputError(f"lecam_decay is {self.lecam_decay}, expected at least 0 and below 1")
        if not 1 <= self.micro_batches <= 4096:
            raise InputError(f"micro_batches is {self.micro_batches}, expected 1 to 4096")


def adversarial_weight_at(config: AdversarialConfig, step: int) -> float:
    """Return the weight of the adversarial term after `step` updates: 0, a line, then `weight`.

    The line begins one step up, so that from `start` on the discriminator has something to learn from.
    """
    passed = step - config.start + 1
    if passed <= 0:
        return 0.0
    return config.weight * min(1.0, passed / max(1, config.warmup_steps))


class Adversary(nn.Module):
    """A discriminator with its losses.

    Args:
        config: What it is and how it is trained.
        image_size: Side of the images in pixels.
        dtype: What a frozen backbone computes in, whatever autocast says; the rest follows autocast.
    """

    def __init__(self, config: AdversarialConfig, *, image_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.discriminator = build_discriminator(config.discriminator, image_size=image_size, dtype=dtype)
        self.lecam = LeCam(config.lecam_decay)
        self._augment = augment

    def compile_augmentation(self, **options: Any) -> None:
        """Compile what changes the images, dozens of small steps, into a few."""
        self._augment = torch.compile(augment, **options)

    def forward(
        self,
        fakes: Float[Tensor, "batch 3 height width"],
        images: Float[Tensor, "batch 3 height width"],
        keys: Int64[Tensor, " batch"],
        weight: Tensor | float,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the discriminator's loss and its terms.

        Args:
            fakes: Reconstructions; no gradient flows to them.
            images: The photographs they are of.
            keys: One for each image, for augmentations and crops.
            weight: Of all but the consistency, as `adversarial_weight_at` gives it.

        Returns:
            The loss, and scalars for people.
        """
        config = self.config
        self.discriminator.advance()
        fake, fake_strong = self._weak_and_strong(fakes.detach(), fold_in(keys, 0))
        real, real_strong = self._weak_and_strong(images, fold_in(keys, 1))
        score = discriminator_loss(real, fake, config.loss)
        report = {"discriminator": score, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if config.lecam_weight > 0:
            report["lecam"] = self.lecam(real, fake)
            score = score + config.lecam_weight * report["lecam"]
        loss = weight * score
        if real_strong is not None and fake_strong is not None:
            consistency = consistency_loss(fake, fake_strong) + consistency_loss(real, real_strong)
            report["consistency"] = consistency / 2
            loss = loss + config.consistency_weight * report["consistency"]
        return loss, report

    def fool(self, fakes: Float[Tensor, "batch 3 height width"], keys: Int64[Tensor, " batch"]) -> Float[Tensor, ""]:
        """Return the tokenizer's adversarial loss; the discriminator's weights get no gradient from it.

        Args:
            fakes: Reconstructions, to which the gradient flows.
            keys: One for each image.

        Returns:
            A scalar, not weighted.
        """
        # constants for the recomputation in the backward pass as well, which switching requires_grad would not give
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        logits = self._logits(self._augmented(fakes, fold_in(keys, 2)), fold_in(keys, 2), frozen)
        return generator_loss(logits, self.config.loss)

    def _weak_and_strong(self, images: Tensor, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        weak = self._augmented(images, keys)
        if self.config.consistency_weight == 0:
            return self._logits(weak, keys, {}), None
        strong = self._augmented(images, fold_in(keys, 1), strong=True)
        return self._logits(weak, keys, {}), self._logits(strong, keys, {})

    def _augmented(self, images: Tensor, keys: Tensor, strong: bool = False) -> Tensor:
        config = self.config
        cutout = max(config.cutout, 0.5) if strong else config.cutout
        probability = 1.0 if strong else config.augment_probability
        return self._augment(
            images, keys, color=config.color, translation=config.translation, cutout=cutout, probability=probability
        )

    def _logits(self, images: Tensor, keys: Tensor, weights: dict[str, Tensor]) -> Tensor:
        def run(images: Tensor, keys: Tensor) -> Tensor:
            return functional_call(self.discriminator, weights, (images, keys))

        parts = zip(images.chunk(self.config.micro_batches), keys.chunk(self.config.micro_batches), strict=True)
        if self.config.checkpoint:
            return torch.cat([checkpoint(run, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
        return torch.cat([run(*part) for part in parts])
