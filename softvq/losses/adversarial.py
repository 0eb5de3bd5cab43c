"""Adversarial losses, functions of a discriminator's logits, all in float32.

Logits are high where the discriminator takes pictures for real. Each loss is a mean over everything it is given, so
that the mean of the ranks' gradients is the whole batch's.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from softvq.ranks import mean_over_ranks

__all__ = ["AdversarialKind", "LeCam", "adaptive_weight", "consistency_loss", "discriminator_loss", "generator_loss"]

AdversarialKind = Literal["hinge", "logistic", "non_saturating"]


def discriminator_loss(
    real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"], kind: AdversarialKind
) -> Float[Tensor, ""]:
    """Return what a discriminator minimises.

        hinge                       (E relu(1 - D(x)) + E relu(1 + D(y))) / 2          arXiv:1705.02894
        logistic, non_saturating    (E softplus(-D(x)) + E softplus(D(y))) / 2         arXiv:1406.2661, Eq. 1

    The second is the binary cross-entropy of the logits with the targets 1 for real and 0 for fake.

    Args:
        real_logits: D(x) of photographs.
        fake_logits: D(y) of reconstructions without gradient to the generator.
        kind: Which of the losses.

    Returns:
        A scalar >= 0.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def generator_loss(fake_logits: Float[Tensor, "*fake"], kind: AdversarialKind) -> Float[Tensor, ""]:
    """Return what a generator minimises to be taken for real.

        hinge, logistic     -E D(y)                  arXiv:1705.02894
        non_saturating      E softplus(-D(y))        arXiv:1406.2661, section 3

    The first has the same slope everywhere; the slope of the second fades where the discriminator is already deceived.

    Args:
        fake_logits: D(y) of reconstructions.
        kind: Which of the losses.

    Returns:
        A scalar.
    """
    fake = fake_logits.float()
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


class LeCam(nn.Module):
    """Regulariser that keeps logits near the running average of the other side's (arXiv:2104.03310).

        R = E relu(D(x) - fake)^2 + E relu(real - D(y))^2

    where `real` and `fake` are exponential averages of the mean logits over all ranks, started at 0. As in the released
    code, only a gap in the expected direction counts (the paper has plain squares), and the averages move
    before they are used, without a correction for their start.

    Args:
        decay: What remains of the averages in a step, 0 to 1.

    Note:
        Call it once for each step of the discriminator, on every rank, and outside of activation checkpointing, which
        would run it, and move the averages, twice. In eval mode the averages stay.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.mean_real: Tensor
        self.mean_fake: Tensor
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    def forward(self, real_logits: Float[Tensor, "*real"], fake_logits: Float[Tensor, "*fake"]) -> Float[Tensor, ""]:
        """Move the averages in training mode and return the regulariser, a scalar >= 0."""
        real, fake = real_logits.float(), fake_logits.float()
        if self.training:
            self._update(torch.stack([real.detach().mean(), fake.detach().mean()]))
        return F.relu(real - self.mean_fake).square().mean() + F.relu(self.mean_real - fake).square().mean()

    @torch.no_grad()
    def _update(self, means: Tensor) -> None:
        averages = torch.stack([self.mean_real, self.mean_fake])
        means = mean_over_ranks(means)
        # one bad step would otherwise stay in the averages for ever
        moved = torch.where(means.isfinite().all(), averages.lerp(means, 1 - self.decay), averages)
        self.mean_real.copy_(moved[0])
        self.mean_fake.copy_(moved[1])


def consistency_loss(
    weak_logits: Float[Tensor, "*logits"], strong_logits: Float[Tensor, "*logits"]
) -> Float[Tensor, ""]:
    """Return the mean squared difference of the logits of two augmentations of the same pictures (arXiv:1910.12027)."""
    return F.mse_loss(strong_logits.float(), weak_logits.float())


def adaptive_weight(
    main_gradient: Float[Tensor, "*parameter"], other_gradient: Float[Tensor, "*parameter"], limit: float = 1e4
) -> Float[Tensor, ""]:
    """Return the weight that makes another loss pull on a parameter as hard as the main ones.

        |grad L_main| / (|grad L_other| + 1e-4)        arXiv:2012.09841, Eq. 7

    The summand is the released code's.

    Args:
        main_gradient: Of the main losses with respect to the decoder's last layer or its output, of the whole batch on
            all ranks: average gradients of a parameter over them before, and where every rank has its own samples'
            give the norms over all of them.
        other_gradient: Of the adversarial loss with respect to the same.
        limit: The largest weight.

    Returns:
        A scalar in [0, limit] without gradient; 0 where a gradient is not finite, so that a bad step adds nothing.
    """
    main, other = (torch.linalg.vector_norm(x.detach().float()) for x in (main_gradient, other_gradient))
    weight = main / (other + 1e-4)
    return torch.where(main.isfinite() & other.isfinite(), weight.clamp(0, limit), 0)
