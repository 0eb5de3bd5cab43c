"""How many clusters a cloud of points has: mixtures of diagonal Gaussians, fitted by EM and chosen by BIC."""

import dataclasses
import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.randomness import fold_in, uniform

__all__ = ["Mixture", "choose_mixture", "fit_mixture"]

FLOOR = 1e-3
"""Smallest variance of a component, as a share of the data's: one that shrinks onto a point would have any likelihood.
"""
RESTARTS = 3
ROUNDS = 200
TOLERANCE = 1e-5
"""Of the likelihood, in nats for each point."""
LOG_2_PI = math.log(2 * math.pi)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Components with means and variances of their own in every dimension."""

    shares: Float[Tensor, " component"]
    """Of the points; they add up to 1."""
    means: Float[Tensor, "component dim"]
    """Centres."""
    variances: Float[Tensor, "component dim"]
    """Of each dimension."""
    log_likelihood: float
    """Sum over the points it was fitted on."""
    bic: float
    """`parameters log(points) - 2 log_likelihood`; the smaller, the better."""

    def responsibilities(self, points: Float[Tensor, "point dim"]) -> Float[Tensor, "point component"]:
        """Return how likely each point is of each component."""
        middle = self.means.mean(0)
        return _joint(points.double() - middle, self.shares, self.means - middle, self.variances).softmax(1)


def choose_mixture(
    points: Float[Tensor, "point dim"], keys: Int64[Tensor, " point"], most: int = 10
) -> tuple[int, list[Mixture]]:
    """Choose the number of components by the Bayesian information criterion (G. Schwarz, Annals of Statistics 6, 1978).

    Args:
        points: The cloud.
        keys: One for each point, so that their order does not matter.
        most: Components to try: 1 to this many, and no more than a tenth of the points.

    Returns:
        The number with the smallest criterion, and the mixtures of 1, 2, ... components.

    Raises:
        InputError: If there are too few points, or they do not vary.
    """
    if most < 1:
        raise InputError(f"most is {most}, expected at least 1 component")
    found = [fit_mixture(points, keys, number) for number in range(1, max(1, min(most, len(points) // 10)) + 1)]
    return 1 + min(range(len(found)), key=lambda i: found[i].bic), found


def fit_mixture(points: Float[Tensor, "point dim"], keys: Int64[Tensor, " point"], number: int) -> Mixture:
    """Fit a mixture by expectation and maximisation in float64, from the best of a few keyed starts.

    Args:
        points: The cloud.
        keys: One for each point, from which the starts are drawn: by k-means++, each next centre far from those before.
        number: Of components, at least 1.

    Returns:
        The likeliest mixture that was found.

    Raises:
        InputError: If there are fewer points than components, or they do not vary or are not finite.
    """
    points = points.detach().double().cpu()
    if not 1 <= number <= len(points):
        raise InputError(f"number is {number}, expected 1 to the {len(points)} points")
    if not bool(points.isfinite().all()):
        raise InputError("points hold values that are not finite; look at what they were made from")
    spread = points.var(0, correction=0)
    if not bool((spread > 0).any()):
        raise InputError("the points are all the same, so they have no clusters")
    # near 0 and of deviation 1, squares can be expanded
    middle, scale = points.mean(0), torch.where(spread > 0, spread.sqrt(), 1.0)
    points = (points - middle) / scale
    runs = 1 if number == 1 else RESTARTS
    fits = [_climb(points, _start(points, fold_in(keys.cpu(), run), number)) for run in range(runs)]
    likelihood, shares, means, variances = max(fits, key=lambda fit: fit[0])
    means, variances = means * scale + middle, variances * scale.square()
    likelihood -= len(points) * float(scale.log().sum())
    parameters = number * (2 * points.shape[1] + 1) - 1
    bic = parameters * math.log(len(points)) - 2 * likelihood
    return Mixture(shares=shares, means=means, variances=variances, log_likelihood=likelihood, bic=bic)


def _start(points: Tensor, keys: Tensor, number: int) -> Tensor:
    """Draw centres, each with a chance that grows with its squared distance to the nearest one before."""
    centres: list[Tensor] = []
    weights = torch.ones(len(points), dtype=torch.float64)
    for turn in range(number):
        # the smallest of exponential clocks rings with a chance proportional to its rate, whatever their order
        clocks = -uniform(fold_in(keys, turn)).double().log() / weights.clamp(min=1e-300)
        centres.append(points[clocks.argmin()])
        distance = (points - centres[-1]).square().sum(1)
        weights = distance if turn == 0 else torch.minimum(weights, distance)
    return torch.stack(centres)


def _climb(points: Tensor, centres: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """Repeat both steps until the likelihood stands still."""
    owners = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    weights = torch.nn.functional.one_hot(owners, len(centres)).double()
    best, parts = -math.inf, _maximised(points, weights)
    for _ in range(ROUNDS):
        joint = _joint(points, *parts)
        likelihood = float(joint.logsumexp(1).sum())
        if likelihood - best <= TOLERANCE * len(points):
            break
        best, parts = likelihood, _maximised(points, joint.softmax(1))
    return float(_joint(points, *parts).logsumexp(1).sum()), *parts


def _maximised(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = weights.sum(0).clamp(min=1e-12)
    means = weights.mT @ points / counts[:, None]
    variances = weights.mT @ points.square() / counts[:, None] - means.square()
    return counts / counts.sum(), means, variances.clamp(min=FLOOR)


def _joint(points: Tensor, shares: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return log of share times density, [point, component]."""
    precise = 1 / variances
    far = points.square() @ precise.mT - 2 * points @ (means * precise).mT + (means.square() * precise).sum(1)
    return shares.log() - 0.5 * (far + (variances.log() + LOG_2_PI).sum(1))
