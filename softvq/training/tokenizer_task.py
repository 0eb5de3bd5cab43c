"""What a tokenizer learns: models and losses joined, the only place where the two meet."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from softvq.backbones import FrozenBackbone
from softvq.config import check_finite
from softvq.data.folder import Batch
from softvq.errors import InputError
from softvq.losses.adversarial import adaptive_weight
from softvq.losses.augment import crop, view
from softvq.losses.semantic import SemanticConfig, SemanticDistance
from softvq.randomness import fold_in, keys_of, seed_of
from softvq.ranks import mean_over_ranks
from softvq.tokenizers.alignment import (
    AlignmentConfig,
    Projector,
    alignment_loss,
    distance_matrix_loss,
    patch_features,
)
from softvq.tokenizers.autoencoder import ImageTokenizer, TokenizerOutput
from softvq.tokenizers.codebooks import codebook_statistics
from softvq.tokenizers.corruption import CorruptionConfig, token_counts
from softvq.tokenizers.quantizers import VQConfig, innermost
from softvq.tokenizers.vit import FeatureDecoder, ViTConfig
from softvq.training.adversary import AdversarialConfig, Adversary, adversarial_weight_at
from softvq.training.compilation import compile_regions
from softvq.training.task import Task

__all__ = ["FeatureConfig", "LossConfig", "TokenizerTask", "perceptual_weight_at", "softening_at"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """An auxiliary decoder that predicts the teacher's features of hidden patches (MAETok, arXiv:2502.03444)."""

    weight: float = 1.0
    """Weight of one minus the cosine similarity, over the hidden patches, or all where none are."""
    decoder: ViTConfig = dataclasses.field(default_factory=lambda: ViTConfig(width=384, depth=3, num_heads=6))
    """Its transformer."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_finite(self)
        if not self.weight >= 0:
            raise InputError(f"weight is {self.weight}, expected at least 0")
        if self.decoder.pretrained is not None:
            raise InputError(f"decoder.pretrained is {self.decoder.pretrained!r}, expected null: it starts at random")


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
    """Side in pixels, a divisor of theirs, of what it sees of images; null for all of them as they are."""
    perceptual_view: Literal["whole", "crop", "either"] = "whole"
    """What it sees at `perceptual_size`: images averaged down to it, a square cut out at random, or one of the two by
    the toss of a coin. Averages tell nothing of what is finer than them."""
    perceptual_weights: str | None = None
    """File with the weights of the perceptual distance; null takes those that are installed."""
    semantic: SemanticConfig | None = None
    """A frozen vision network whose features reconstructions should keep; null for none."""
    adversarial: AdversarialConfig | None = None
    """A discriminator that reconstructions have to deceive; null for none."""
    alignment: AlignmentConfig | None = None
    """A frozen vision encoder that latents are drawn to; null for none."""
    features: FeatureConfig | None = None
    """A decoder from latents to that encoder's features; null for none."""
    anneal_from: float = 1.0
    """What the quantizer's temperature is multiplied by at the first step; it falls to 1 over `anneal_steps`."""
    anneal_steps: int = 0
    """Steps in which the temperature falls, by the same factor each."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_finite(self)
        if not self.perceptual_weight >= 0:
            raise InputError(f"perceptual_weight is {self.perceptual_weight}, expected at least 0")
        for name in ("perceptual_start", "perceptual_warmup_steps", "anneal_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 0")
        if self.perceptual_size is not None and self.perceptual_size < 18:
            raise InputError(f"perceptual_size is {self.perceptual_size}, expected at least 18, or null")
        if self.perceptual_size is None and self.perceptual_view != "whole":
            raise InputError(f"perceptual_view is {self.perceptual_view!r}, which needs perceptual_size, its side")
        if self.semantic is not None and self.perceptual_weight == 0:
            raise InputError("semantic is part of the perceptual distance, but perceptual_weight is 0")
        if not 1e-3 <= self.anneal_from <= 1e3:
            raise InputError(f"anneal_from is {self.anneal_from}, expected 0.001 to 1000")
        if self.features is not None and self.alignment is None:
            raise InputError(
                "features needs the teacher of alignment; add alignment, with weight 0 if it is only for this"
            )


def perceptual_weight_at(config: LossConfig, step: int) -> float:
    """Return the weight of the perceptual distance after `step` updates: 0, a line, then `perceptual_weight`."""
    passed = step - config.perceptual_start
    if passed < 0:
        return 0.0
    if passed >= config.perceptual_warmup_steps:
        return config.perceptual_weight
    return config.perceptual_weight * passed / config.perceptual_warmup_steps


def softening_at(config: LossConfig, step: int) -> float:
    """Return the factor on the temperature after `step` updates: `anneal_from` to the power 1 - step / anneal_steps."""
    if step >= config.anneal_steps:
        return 1.0
    return config.anneal_from ** (1 - step / config.anneal_steps)


class TokenizerTask(Task):
    """Reconstruct images: pixels, a perceptual distance, a discriminator, a teacher, and the quantizer's own terms.

        loss = |x - D(E(x))|^2 + w1 d(x, D(E(x))) + w2 adversarial + w3 alignment + the quantizer's terms

    after arXiv:2412.10958, section 3.3. What is measured at the pixels is differentiated there, one term after the
    other, so that no two of those networks' activations are held at once.

    Args:
        tokenizer: Gives a `TokenizerOutput` for images.
        config: Weights and schedule.
        seed: Of everything the training draws.
        corruption: What is hidden from the tokenizer.
        perceptual: Gives one distance per pair of images; may be left out if its weight is 0.
        semantic: Gives another; may be left out if there is none.
        teacher: Of the alignment; may be left out if there is none.
        adversary: The discriminator; may be left out if there is none.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        config: LossConfig,
        *,
        seed: int = 0,
        corruption: CorruptionConfig | None = None,
        perceptual: nn.Module | None = None,
        semantic: SemanticDistance | None = None,
        teacher: FrozenBackbone | None = None,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        assert perceptual is not None or config.perceptual_weight == 0
        assert (semantic is None) == (config.semantic is None)
        assert (teacher is None) == (config.alignment is None)
        assert (adversary is None) == (config.adversarial is None)
        self.config, self.seed, self.corruption = config, seed, corruption or CorruptionConfig()
        self.tokenizer, self.perceptual, self.semantic, self.teacher = tokenizer, perceptual, semantic, teacher
        self.heads = _heads(tokenizer, config, teacher)
        self.model = nn.ModuleDict({"tokenizer": tokenizer, **self.heads})
        self._critic = (adversary,)  # a tuple, lest it count as a part of what the task trains

    @property
    def critic(self) -> Adversary | None:
        """The discriminator, if there is one."""
        return self._critic[0]

    def critic_counts(self, step: int) -> bool:
        """Return whether the discriminator is trained after `step` updates."""
        return self.config.adversarial is not None and adversarial_weight_at(self.config.adversarial, step) > 0

    def scheduled(self, step: int) -> dict[str, float]:
        """Return the weights of the perceptual and the adversarial term, and the factor on the temperature."""
        found = {"perceptual": perceptual_weight_at(self.config, step), "softening": softening_at(self.config, step)}
        if self.config.adversarial is not None:
            found["adversarial"] = adversarial_weight_at(self.config.adversarial, step)
        return found

    def phase(self, step: int) -> tuple[bool, bool, int | None]:
        """Return whether the perceptual and the adversarial term count, and how many tokens are decoded."""
        return perceptual_weight_at(self.config, step) > 0, self.critic_counts(step), self._num_tokens(step)

    def forward(
        self, batch: Batch, step: int, scheduled: Mapping[str, Tensor | float] | None = None
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor], Any]:
        """Return the loss, its terms, unweighted but for the quantizer's, and what the discriminator is to judge.

        Args:
            batch: Images in [-1, 1].
            step: Finished updates, which decide the phase.
            scheduled: What `scheduled(step)` gives, which is the default, as floats or as tensors.

        Returns:
            The loss, its terms by name, and reconstructions, images, keys and weight for the discriminator.
        """
        scheduled, phase = self.scheduled(step) if scheduled is None else scheduled, self.phase(step)
        keys = keys_of(self.seed, "model", batch.positions)
        output: TokenizerOutput = self.tokenizer(
            batch.images,
            fold_in(keys, 0),
            corruption=self.corruption,
            num_tokens=phase[2],
            softening=self._softening(scheduled["softening"], batch.images.device),
        )
        report = dict(output.losses)
        loss = self._pixel_loss(output.images, batch.images, fold_in(keys, 1), phase, scheduled, report)
        if self.teacher is not None and self.config.alignment is not None:
            loss = loss + self._teacher_loss(output, batch.images, loss, report)
        for term in output.losses.values():
            loss = loss + term
        weight = scheduled.get("adversarial", 0.0)
        return loss, report, (output.images.detach(), batch.images, fold_in(keys, 2), weight)

    @torch.no_grad()
    def health(self, batch: Batch) -> dict[str, Tensor]:
        """Return means over this batch's tokens, from which `figures` tells the health of the codebook."""
        return self.tokenizer.quantizer.averages(self.tokenizer.encode_pre(batch.images))

    def figures(self, averages: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return usage, perplexity and the rest for averages of `health`, taken over parts and ranks."""
        return codebook_statistics(averages)

    def warnings(self, figures: Mapping[str, float]) -> dict[str, str]:
        """Say so when the codebook has collapsed."""
        size = getattr(innermost(self.tokenizer.config.quantizer), "codebook_size", None)
        if size is None or "perplexity" not in figures:
            return {}
        found = {}
        if figures["perplexity"] < 1.5:
            found["one"] = "all tokens have the same likeliest codeword; lower optim.lr, or raise entropy_weight"
        if figures["posterior_entropy"] > 0.98 * math.log(size):
            found["uniform"] = "the posterior is nearly uniform over the codewords; lower the quantizer's temperature"
        if not isinstance(innermost(self.tokenizer.config.quantizer), VQConfig) and figures["max_probability"] > 0.99:
            found["one-hot"] = "the posterior is nearly one-hot, as in VQ; raise the quantizer's temperature"
        return found

    def compile(self, **options: Any) -> None:
        """Compile the networks in place, region by region; the step, a Python number, stays outside."""
        parts: list[nn.Module | None] = [self.tokenizer.encoder, self.tokenizer.quantizer, self.tokenizer.decoder]
        parts += [self.perceptual, self.semantic, self.teacher, *self.heads.values(), self.critic]
        for part in parts:
            if part is not None:
                compile_regions(part, **options)

    def _pixel_loss(
        self,
        images: Tensor,
        targets: Tensor,
        keys: Int64[Tensor, " batch"],
        phase: tuple[bool, bool, int | None],
        scheduled: Mapping[str, Tensor | float],
        report: dict[str, Tensor],
    ) -> Tensor:
        """Return a scalar with the value and, at the images, the gradient of every term that looks at pixels."""
        pixels = images.detach().float().requires_grad_()
        distance = F.mse_loss if self.config.reconstruction == "l2" else F.l1_loss
        report["reconstruction"], gradient = _differentiated(distance(pixels, targets), pixels)
        loss = report["reconstruction"]
        perceptual_counts, adversarial_counts, _ = phase
        if perceptual_counts and self.perceptual is not None:
            apart = self.perceptual(*(self._seen(one, fold_in(keys, 0)) for one in (pixels, targets))).mean()
            report["perceptual"], slope = _differentiated(apart, pixels)
            weight = scheduled["perceptual"]
            loss, gradient = loss + weight * report["perceptual"], gradient + weight * slope
            if self.semantic is not None and self.config.semantic is not None:
                report["semantic"], slope = _differentiated(self.semantic(pixels, targets).mean(), pixels)
                weight = weight * self.config.semantic.weight
                loss, gradient = loss + weight * report["semantic"], gradient + weight * slope
        if adversarial_counts and self.critic is not None:
            weight = scheduled["adversarial"]
            report["adversarial"], slope = _differentiated(self.critic.fool(pixels, keys), pixels)
            if self.critic.config.adaptive:
                report["adaptive_weight"] = adaptive_weight(_norm(gradient), _norm(slope))
                weight = weight * report["adaptive_weight"]
            loss, gradient = loss + weight * report["adversarial"], gradient + weight * slope
        return loss + ((images.float() - pixels.detach()) * gradient).sum()

    def _teacher_loss(
        self, output: TokenizerOutput, images: Tensor, pixel_loss: Tensor, report: dict[str, Tensor]
    ) -> Tensor:
        config, latents = self.config.alignment, output.latents
        assert config is not None
        assert self.teacher is not None
        features = patch_features(self.teacher, images)
        total = latents.new_zeros(())
        if config.weight > 0:
            projected = self.heads["projector"](latents)
            report["alignment"] = alignment_loss(projected, features, config.mode, config.cosine_margin)
            total = total + report["alignment"]
            if config.distance_weight > 0:
                report["distance_matrix"] = distance_matrix_loss(latents, features, config.distance_margin)
                total = total + config.distance_weight * report["distance_matrix"]
            weight: Tensor | float = config.weight
            if config.adaptive and latents.requires_grad:
                with torch.autocast(latents.device.type, enabled=False):
                    (ours,) = torch.autograd.grad(pixel_loss, latents, retain_graph=True)
                    (theirs,) = torch.autograd.grad(total, latents, retain_graph=True)
                report["alignment_weight"] = adaptive_weight(_norm(ours), _norm(theirs))
                weight = weight * report["alignment_weight"]
            total = weight * total
        if self.config.features is not None:
            side = math.isqrt(features.shape[1])  # of the teacher's map, which need not be that of our patches
            predicted = self.heads["feature_decoder"](latents, (side, side))
            report["features"] = _feature_loss(predicted, features, output.masked)
            total = total + self.config.features.weight * report["features"]
        return total

    def _num_tokens(self, step: int) -> int | None:
        """Draw how many tokens the decoder sees; all samples of a step share it, so that no token has to be masked."""
        least, most = self.tokenizer.config.min_latent_tokens, self.tokenizer.config.num_latent_tokens
        if least is None:
            return None
        counts = token_counts(least, most)
        return counts[seed_of(self.seed, "tokens", step) % len(counts)]

    def _softening(self, value: Tensor | float, device: torch.device) -> Tensor | float:
        # a tensor while it changes, so that a compiled graph does not take each value for a constant
        if isinstance(value, Tensor) or self.config.anneal_from == 1 or self.config.anneal_steps == 0:
            return value
        return torch.full((), value, device=device)

    def _seen(
        self, images: Float[Tensor, "batch 3 height width"], keys: Int64[Tensor, " batch"]
    ) -> Float[Tensor, "batch 3 h w"]:
        images, size, kind = images.float(), self.config.perceptual_size, self.config.perceptual_view
        if size is None:
            return images
        if kind == "whole":
            return F.avg_pool2d(images, images.shape[-1] // size)
        return crop(images, keys, size) if kind == "crop" else view(images, keys, size)


def _heads(tokenizer: ImageTokenizer, config: LossConfig, teacher: FrozenBackbone | None) -> dict[str, nn.Module]:
    if teacher is None or config.alignment is None:
        return {}
    model = tokenizer.config
    heads: dict[str, nn.Module] = {}
    if config.alignment.weight > 0:
        heads["projector"] = Projector(model.latent_dim, config.alignment.hidden, teacher.channels[-1])
    if config.features is not None:
        heads["feature_decoder"] = FeatureDecoder(
            config.features.decoder,
            image_size=model.image_size,
            patch_size=model.patch_size,
            num_latent_tokens=model.num_latent_tokens,
            latent_dim=model.latent_dim,
            features=teacher.channels[-1],
        )
    return heads


def _differentiated(loss: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss as a constant and its gradient; what autograd kept for it is free from then on."""
    with torch.autocast(at.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(loss, at)
    return loss.detach(), gradient


def _norm(gradient: Tensor) -> Tensor:
    """The root mean square, over all ranks, of a mean's gradient times the number of values: free of their number."""
    return (mean_over_ranks(gradient.float().square().sum()) * gradient.numel()).sqrt()


def _feature_loss(predicted: Tensor, features: Tensor, masked: Tensor | None) -> Tensor:
    """One minus the cosine similarity over what is hidden of each image; over all of it where nothing is."""
    with torch.autocast(predicted.device.type, enabled=False):
        apart = 1 - F.cosine_similarity(predicted.float(), features.float(), dim=-1)
        hidden = torch.ones_like(apart)
        if masked is not None:
            ours, theirs = (math.isqrt(x.shape[1]) for x in (masked, apart))
            hidden = F.adaptive_avg_pool2d(masked.float().reshape(-1, 1, ours, ours), theirs).flatten(1)
            hidden = torch.where(hidden.sum(dim=1, keepdim=True) > 0, hidden, 1.0)
        return ((apart * hidden).sum(dim=1) / hidden.sum(dim=1)).mean()
