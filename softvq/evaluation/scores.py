"""Figures that compare two sets of pictures by their features, or judge one set by what a classifier says of it.

All of them compute in float64, in chunks, so that no matrix of all pairs is ever there, and are the same every time.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from softvq.errors import InputError
from softvq.randomness import generator

__all__ = ["biased_because", "cmmd", "density_coverage", "inception_score", "kernel_distance", "precision_recall"]

Kernel = Callable[[Tensor, Tensor], Tensor]

CHUNK = 2048
ROUNDING = 1e-12
"""Of the squared lengths: by so much a point may lie outside a ball and still be on its edge."""


def biased_because(n: int, dim: int) -> str | None:
    """Return why a Fréchet distance of so few samples is too large, or None where there are enough.

    >>> biased_because(50_000, 2048) is None
    True

    Args:
        n: Samples of the smaller set.
        dim: Of the features.

    Returns:
        A sentence; n samples make a covariance of rank n - 1 at most.
    """
    if n > dim:
        return None
    return (
        f"{n} samples of {dim} feature dimensions make a covariance without full rank, so the Fréchet distance is too "
        f"large; compare it only with distances of as many samples, or take more than {dim}"
    )


@torch.no_grad()
def inception_score(
    values: Float[Tensor, "sample category"],
    splits: int = 10,
    *,
    probabilities: bool = False,
    seed: int | None = 0,
    chunk: int = CHUNK,
) -> tuple[float, float]:
    """Return the inception score (arXiv:1606.03498): exp of the mean of KL(p(y | x) || p(y)), in each split.

    With more than one split it depends on which sample is in which: samples in the order of their classes would have
    a much lower score, hence they are shuffled.

    Args:
        values: Logits of a classifier.
        splits: Parts of (nearly) equal size, each with its own p(y); 10 is customary, with 5000 samples in each.
        probabilities: Say that the values are p(y | x) already.
        seed: Of the shuffling; None takes the samples as they are.
        chunk: Samples that are in float64 at once.

    Returns:
        The mean over the splits, 1 to the number of categories, and their standard deviation (divisor `splits`).

    Raises:
        InputError: If there are too few samples, or values are not finite or no probabilities.
    """
    _check_features(values, "values", 1)
    _check_chunk(chunk)
    if not 1 <= splits <= len(values):
        raise InputError(f"splits is {splits}, expected 1 to the {len(values)} samples")
    order = torch.arange(len(values))
    if seed is not None:
        order = torch.randperm(len(values), generator=generator(seed, "inception score"))
    found = []
    for part in order.to(values.device).tensor_split(splits):
        total = values.new_zeros(values.shape[1], dtype=torch.float64)
        negative_entropy = total.new_zeros(())
        for rows in part.split(chunk):
            likely = values[rows].double()
            likely = _checked_probabilities(likely) if probabilities else likely.softmax(1)
            total += likely.sum(0)
            negative_entropy += torch.xlogy(likely, likely).sum()
        mean = total / len(part)
        found.append((negative_entropy / len(part) - torch.xlogy(mean, mean).sum()).exp())
    return _mean_and_deviation(found)


@torch.no_grad()
def kernel_distance(
    real: Float[Tensor, "real dim"],
    fake: Float[Tensor, "fake _dim"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    chunk: int = CHUNK,
) -> tuple[float, float]:
    """Return the kernel distance, KID where the features are Inception's (arXiv:1801.01401).

    It is the unbiased estimate of the squared maximum mean discrepancy with the kernel (x . y / dim + 1)^3, averaged
    over subsets. Being unbiased it can fall below 0, and means the same for any number of samples.

    Args:
        real: Features of photographs.
        fake: Features of what is judged.
        subsets: Drawn from both sets, >= 1.
        subset_size: Samples in each, drawn without putting back, >= 2; the size of both sets takes them whole.
        seed: Of the drawing.
        chunk: Rows and columns of the kernel's matrix that are computed at once.

    Returns:
        The mean over the subsets, and their standard deviation (divisor `subsets`).

    Raises:
        InputError: If there are too few samples, the dimensions differ or a value is not finite.
    """
    _check_pair(real, fake, 2)
    _check_chunk(chunk)
    if subsets < 1:
        raise InputError(f"subsets is {subsets}, expected at least 1")
    if not 2 <= subset_size <= min(len(real), len(fake)):
        raise InputError(f"subset_size is {subset_size}, expected 2 to the {min(len(real), len(fake))} samples")
    dim = real.shape[1]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1) ** 3

    found = []
    for i in range(subsets):
        ours = real[_chosen(real, subset_size, seed, "real", i)]
        theirs = fake[_chosen(fake, subset_size, seed, "fake", i)]
        found.append(_discrepancy(ours, theirs, kernel, chunk, unbiased=True))
    return _mean_and_deviation(found)


@torch.no_grad()
def cmmd(
    real: Float[Tensor, "real dim"],
    fake: Float[Tensor, "fake _dim"],
    *,
    sigma: float = 10.0,
    scale: float = 1000.0,
    unbiased: bool = False,
    chunk: int = CHUNK,
) -> float:
    """Return the mean discrepancy with a Gaussian kernel, CMMD where the features are CLIP's (arXiv:2401.09603).

        scale (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)),   k(a, b) = exp(-|a - b|^2 / (2 sigma^2))

    Published figures are of CLIP embeddings of length 1; the features are taken as they are.

    Args:
        real: Features of photographs.
        fake: Features of what is judged.
        sigma: Of the kernel, > 0.
        scale: What the figure is multiplied by, to be readable.
        unbiased: Leave the pairs of a sample with itself out; published figures keep them, and are larger for small
            sets.
        chunk: Rows and columns of the kernel's matrix that are computed at once.

    Returns:
        At least 0 unless `unbiased`, up to rounding; 0 for equal sets.

    Raises:
        InputError: If there are too few samples, the dimensions differ or a value is not finite.
    """
    _check_pair(real, fake, 2 if unbiased else 1)
    _check_chunk(chunk)
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma is {sigma}, expected a number above 0")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(_squares(a, b).clamp(min=0) / (-2 * sigma**2))

    return scale * float(_discrepancy(real, fake, kernel, chunk, unbiased=unbiased))


@torch.no_grad()
def precision_recall(
    real: Float[Tensor, "real dim"], fake: Float[Tensor, "fake _dim"], k: int = 3, *, chunk: int = CHUNK
) -> tuple[float, float]:
    """Return improved precision and recall (arXiv:1904.06991).

    A set's region is the union of balls about its points, each as large as the distance to its k-th nearest neighbour
    in the set. Edges belong to the balls.

    Args:
        real: Features of photographs.
        fake: Features of what is judged.
        k: Which neighbour, >= 1.
        chunk: Rows and columns of the distances that are computed at once.

    Returns:
        The fraction of `fake` in the region of `real`, and of `real` in that of `fake`.

    Raises:
        InputError: If there are too few samples, the dimensions differ or a value is not finite.
    """
    _check_balls(real, fake, k, chunk)
    return _visits(real, fake, k, chunk).precision, _visits(fake, real, k, chunk).precision


@torch.no_grad()
def density_coverage(
    real: Float[Tensor, "real dim"], fake: Float[Tensor, "fake _dim"], k: int = 5, *, chunk: int = CHUNK
) -> tuple[float, float]:
    """Return density and coverage (arXiv:2002.09797), which outliers disturb less than precision and recall.

    The balls are those of `precision_recall` about the real points; edges belong to them.

    Args:
        real: Features of photographs.
        fake: Features of what is judged.
        k: Which neighbour, >= 1.
        chunk: Rows and columns of the distances that are computed at once.

    Returns:
        How many of the balls about real points hold a fake one, over k, on average, which may pass 1; and the fraction
        of the balls that hold a fake one at all.

    Raises:
        InputError: If there are too few samples, the dimensions differ or a value is not finite.
    """
    _check_balls(real, fake, k, chunk)
    visits = _visits(real, fake, k, chunk)
    return visits.density, visits.coverage


class _Visits(NamedTuple):
    """What points find about the balls of other points."""

    precision: float
    density: float
    coverage: float


def _visits(centres: Tensor, points: Tensor, k: int, chunk: int) -> _Visits:
    middle = torch.stack([part.double().sum(0) for part in centres.split(chunk)]).sum(0) / len(centres)
    radii = _radii(centres, middle, k, chunk)
    count = torch.zeros(len(points), dtype=torch.int64, device=centres.device)
    is_hit = torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
    for rows, theirs in _parts(points, chunk):
        theirs = theirs.to(centres.device).double() - middle
        for columns, ours in _parts(centres, chunk):
            inside = _squares(theirs, ours.double() - middle, slack=ROUNDING) <= radii[columns]
            count[rows] += inside.sum(1)
            is_hit[columns] |= inside.any(0)
    density = float(count.double().mean()) / k
    return _Visits(float((count > 0).double().mean()), density, float(is_hit.double().mean()))


def _radii(points: Tensor, middle: Tensor, k: int, chunk: int) -> Tensor:
    """Return the squared distance of each point to the k-th nearest of the others, with the middle for origin."""
    found = []
    for rows, ours in _parts(points, chunk):
        ours = ours.double() - middle
        best = ours.new_empty(len(ours), 0)
        for columns, theirs in _parts(points, chunk):
            squares = _squares(ours, theirs.double() - middle)
            if rows == columns:
                squares.fill_diagonal_(float("inf"))
            best = torch.cat([best, squares], 1)
            best = best.topk(min(k, best.shape[1]), dim=1, largest=False).values
        found.append(best[:, k - 1])
    return torch.cat(found).clamp(min=0)


def _discrepancy(real: Tensor, fake: Tensor, kernel: Kernel, chunk: int, *, unbiased: bool) -> Tensor:
    """Return the squared maximum mean discrepancy; without the pairs of a sample with itself it is unbiased."""
    within = [_kernel_mean(features, features, kernel, chunk, skip_self=unbiased) for features in (real, fake)]
    across = _kernel_mean(real, fake.to(real.device), kernel, chunk, skip_self=False)
    return within[0] + within[1].to(real.device) - 2 * across


def _kernel_mean(a: Tensor, b: Tensor, kernel: Kernel, chunk: int, *, skip_self: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows, ours in _parts(a, chunk):
        ours = ours.double()
        for columns, theirs in _parts(b, chunk):
            values = kernel(ours, theirs.double())
            if skip_self and rows == columns:
                values.fill_diagonal_(0)
            total += values.sum()
    return total / (len(a) * (len(b) - skip_self))


def _squares(a: Tensor, b: Tensor, slack: float = 0.0) -> Tensor:
    """Return the squared distances of all pairs, less a fraction of the squared lengths."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(lengths, a, b.T, beta=1 - slack, alpha=-2)


def _parts(features: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(features), chunk):
        rows = slice(start, start + chunk)
        yield rows, features[rows]


def _chosen(features: Tensor, count: int, seed: int, name: str, i: int) -> Tensor:
    order = torch.randperm(len(features), generator=generator(seed, "kernel distance", name, i))
    return order[:count].to(features.device)


def _mean_and_deviation(values: list[Tensor]) -> tuple[float, float]:
    whole = torch.stack(values)
    return float(whole.mean()), float(whole.std(correction=0))


def _checked_probabilities(values: Tensor) -> Tensor:
    sums = values.sum(1)
    if bool((values < 0).any() | ((sums - 1).abs() > 1e-3).any()):
        raise InputError("values holds rows that are no probabilities, expected numbers from 0 with the sum 1")
    return values / sums[:, None]


def _check_pair(real: Tensor, fake: Tensor, least: int) -> None:
    if real.shape[1] != fake.shape[1]:
        raise InputError(f"real has {real.shape[1]} dimensions and fake {fake.shape[1]}, expected the same features")
    _check_features(real, "real", least)
    _check_features(fake, "fake", least)


def _check_balls(real: Tensor, fake: Tensor, k: int, chunk: int) -> None:
    _check_chunk(chunk)
    if k < 1:
        raise InputError(f"k is {k}, expected at least 1")
    _check_pair(real, fake, k + 1)


def _check_features(features: Tensor, name: str, least: int) -> None:
    if len(features) < least:
        raise InputError(f"{name} has {len(features)} samples, expected at least {least}")
    if features.shape[1] < 1:
        raise InputError(f"{name} has 0 dimensions, expected at least 1")
    if not bool(features.isfinite().all()):
        raise InputError(f"{name} holds values that are not finite; look at the pictures or the network they are from")


def _check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, expected at least 1")
