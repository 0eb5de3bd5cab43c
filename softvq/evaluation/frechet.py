"""The Fréchet distance between two clouds of features, each taken for a Gaussian."""

import torch
from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.moments import Moments

__all__ = ["covariance_root", "frechet_distance", "moments"]

ROUNDING = 1e-6
"""Negative eigenvalues up to this fraction of the largest one are taken for rounding."""


def moments(
    features: Float[Tensor, "sample dim"],
) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Return the mean and the unbiased covariance of features, in float64.

    Args:
        features: At least two samples; fewer samples than dimensions make a covariance without full rank, and distances
            that are too large.

    Returns:
        The mean, and the covariance with the divisor n - 1.

    Raises:
        InputError: If there are too few samples, or a feature is not finite.
    """
    found = Moments(features.shape[1], features.device)
    found.add(features)
    covariance = found.covariance
    return found.mean, covariance


def covariance_root(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
    """Return the symmetric square root of a covariance, for distances of several clouds from one.

    Args:
        covariance: Symmetric and without negative eigenvalues.

    Returns:
        Float64, symmetric, without negative eigenvalues.

    Raises:
        InputError: If a value is not finite, or the matrix is no covariance.
    """
    return _root(_checked(covariance.diagonal(), covariance, "a"))


def frechet_distance(
    mean_a: Float[Tensor, " dim"],
    cov_a: Float[Tensor, "dim dim"],
    mean_b: Float[Tensor, " dim"],
    cov_b: Float[Tensor, "dim dim"],
    *,
    root_a: Float[Tensor, "dim dim"] | None = None,
) -> float:
    """Return the squared Fréchet distance of two Gaussians (arXiv:1706.08500, equation 6).

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))

    A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2), so that no root of a matrix without symmetry is needed;
    of those eigenvalues rounding can make small ones negative, which count as zero.

    Args:
        mean_a: Of one cloud.
        cov_a: Its covariance A, symmetric and without negative eigenvalues.
        mean_b: Of the other.
        cov_b: Its covariance B.
        root_a: `covariance_root(cov_a)`, if it is there already: that takes longer than all else.

    Returns:
        At least 0, which means equal moments.

    Raises:
        InputError: If a value is not finite, or a matrix is no covariance.
    """
    cov_a, cov_b = _checked(mean_a, cov_a, "a"), _checked(mean_b, cov_b, "b")
    root = _root(cov_a) if root_a is None else root_a
    product = root @ cov_b @ root
    roots = _clipped(torch.linalg.eigvalsh((product + product.T) / 2), "cov_b").sqrt()
    shift = (mean_a.double() - mean_b.double()).square().sum()
    return max(0.0, float(shift + cov_a.trace() + cov_b.trace() - 2 * roots.sum()))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * _clipped(values, "cov_a").sqrt()) @ vectors.T


def _checked(mean: Tensor, covariance: Tensor, name: str) -> Tensor:
    """Return a covariance in float64, made symmetric where rounding left it otherwise."""
    covariance = covariance.detach().double()
    if not bool(mean.isfinite().all() & covariance.isfinite().all()):
        raise InputError(f"mean_{name} or cov_{name} holds values that are not finite; make them of finite features")
    difference = (covariance - covariance.T).abs().max()
    if bool(difference > ROUNDING * covariance.abs().max()):
        raise InputError(f"cov_{name} is not symmetric, expected a covariance as `moments` returns it")
    return (covariance + covariance.T) / 2


def _clipped(values: Tensor, name: str) -> Tensor:
    if bool(values.min() < -ROUNDING * values.abs().max()):
        raise InputError(f"{name} has negative eigenvalues, expected a covariance as `moments` returns it")
    return values.clamp(min=0)
