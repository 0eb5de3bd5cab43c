"""A linear probe: how much about classes can be read off features by a multinomial logistic regression."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError

__all__ = ["Probe", "accuracy", "fit_probe", "wilson_interval"]

MEMORY = 20
"""Steps that L-BFGS remembers the curvature of."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A fitted linear classifier of standardised features."""

    mean: Float[Tensor, " dim"]
    """Of the features it was fitted on."""
    scale: Float[Tensor, " dim"]
    """Their deviation; 1 where a feature never changes."""
    weight: Float[Tensor, "num_classes dim"]
    """Of standardised features."""
    bias: Float[Tensor, " num_classes"]
    """Of the classes."""
    gradient: float
    """Largest entry of the gradient where the fit ended; near 0 if it is at its minimum."""

    def logits(self, features: Float[Tensor, "sample dim"]) -> Float[Tensor, "sample num_classes"]:
        """Return the logits of samples, in the precision of the fit."""
        return F.linear((features.to(self.mean) - self.mean) / self.scale, self.weight, self.bias)


def fit_probe(
    features: Float[Tensor, "sample dim"],
    labels: Int64[Tensor, " sample"],
    num_classes: int,
    *,
    l2: float = 1e-3,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    dtype: torch.dtype = torch.float64,
) -> Probe:
    """Fit a multinomial logistic regression on standardised features, by L-BFGS over all samples from zero weights.

        minimise  mean_i -log softmax(W x_i + b)[y_i] + l2 / 2 |W|^2

    The sum is strictly convex in W and nothing is drawn at random, so that the result is a function of the data alone.

    Args:
        features: Of the training samples.
        labels: Their classes, 0 to `num_classes` - 1; a class may be absent.
        num_classes: At least 2.
        l2: Weight of the penalty, positive; the biases are free.
        max_iterations: Steps after which the fit ends at the latest.
        tolerance: Largest entry of the gradient at which it is done.
        dtype: Of the computation, on the features' device.

    Returns:
        The classifier.

    Raises:
        InputError: If labels are out of range, features are not finite, or a setting is out of its range.
    """
    with torch.inference_mode(False):  # also for features that were made in it
        return _fitted(features.clone(), labels.clone(), num_classes, l2, max_iterations, tolerance, dtype)


def _fitted(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    max_iterations: int,
    tolerance: float,
    dtype: torch.dtype,
) -> Probe:
    _check(features, labels, num_classes, l2, max_iterations)
    features, labels = features.detach().to(dtype), labels.to(features.device)
    mean, scale = features.mean(0), features.std(0, correction=0)
    constant = scale <= torch.finfo(dtype).eps * features.abs().amax(0)
    scale = torch.where(constant, 1.0, scale)
    inputs = (features - mean) / scale
    weight = torch.zeros(num_classes, features.shape[1], dtype=dtype, device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=dtype, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=MEMORY,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        optimizer.step(objective)
        objective()
    gradient = max(float(parameter.grad.abs().max()) for parameter in (weight, bias) if parameter.grad is not None)
    return Probe(mean=mean, scale=scale, weight=weight.detach(), bias=bias.detach(), gradient=gradient)


def accuracy(probe: Probe, features: Float[Tensor, "sample dim"], labels: Int64[Tensor, " sample"]) -> float:
    """Return the fraction of samples whose likeliest class is theirs.

    Args:
        probe: Fitted on other samples.
        features: Of at least one sample.
        labels: Their classes.

    Returns:
        0 to 1.

    Raises:
        InputError: If there are no samples.
    """
    if not len(features):
        raise InputError("features has 0 samples, expected at least 1")
    found = probe.logits(features).argmax(1)
    return float((found == labels.to(found.device)).double().mean())


def wilson_interval(correct: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a fraction (E. B. Wilson, JASA 22, 1927).

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        correct: Successes, 0 to `total`.
        total: Trials n, at least 1.
        z: Deviations of the normal distribution; the default is for 95 %.

    Returns:
        Lower and upper end, both from 0 to 1.

    Raises:
        InputError: If the counts do not fit together.
    """
    if not 0 <= correct <= total or total < 1:
        raise InputError(f"correct is {correct} of {total}, expected 0 to {max(total, 1)} of at least 1")
    p = correct / total
    middle = p + z**2 / (2 * total)
    reach = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    low, high = ((middle + sign * reach) / (1 + z**2 / total) for sign in (-1, 1))
    return (0.0 if correct == 0 else low), (1.0 if correct == total else high)


def _check(features: Tensor, labels: Tensor, num_classes: int, l2: float, max_iterations: int) -> None:
    if num_classes < 2:
        raise InputError(f"num_classes is {num_classes}, expected at least 2")
    if not len(features):
        raise InputError("features has 0 samples, expected at least 1")
    if not bool(features.isfinite().all()):
        raise InputError("features holds values that are not finite; look at the pictures or the network they are from")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"labels go from {low} to {high}, expected 0 to {num_classes - 1}")
    if not 0 < l2 < math.inf:
        raise InputError(f"l2 is {l2}, expected a positive number")
    if max_iterations < 1:
        raise InputError(f"max_iterations is {max_iterations}, expected at least 1")
