"""All figures that compare two sets of images through one network, with what they are to be called."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.extractors import Extractor
from softvq.evaluation.frechet import covariance_root, frechet_distance
from softvq.evaluation.scores import (
    biased_because,
    cmmd,
    density_coverage,
    inception_score,
    kernel_distance,
    precision_recall,
)
from softvq.evaluation.set_features import SetFeatures

__all__ = ["DEVIATION", "FIGURES", "SetFigures", "set_figures"]

FIGURES = (
    "frechet_distance",
    "spatial_frechet_distance",
    "inception_score",
    "precision",
    "recall",
    "density",
    "coverage",
    "kernel_distance",
    "cmmd",
)
DEVIATION = "_std"
"""After the name of a figure: its deviation over splits or subsets."""
NAMES = {"frechet_distance": "Fréchet distance", "spatial_frechet_distance": "spatial Fréchet distance", "cmmd": "CMMD"}
SPLITS = 10
SUBSETS, SUBSET_SIZE = 100, 1000
PRECISION_NEIGHBOUR, DENSITY_NEIGHBOUR = 3, 5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SetFigures:
    """Figures of one set against another, through one network."""

    values: dict[str, float]
    """By the names in `FIGURES`, in that order, those that can be had; a deviation has the name with `_std`."""
    labels: dict[str, str]
    """What each of them must be called."""
    warnings: list[str]
    """Sentences: what a reader must know before they believe them."""


@torch.no_grad()
def set_figures(reference: SetFeatures, samples: SetFeatures, network: Extractor, *, seed: int = 0) -> SetFigures:
    """Compute all figures that two sets allow, in float64 on the network's device.

    Args:
        reference: Photographs, or statistics of them; without their features there is only what needs no more.
        samples: What is judged.
        network: That both were seen by.
        seed: Of what is drawn: splits of the inception score (10) and subsets of the kernel distance (100, of up to
            1000 images).

    Returns:
        Figures, their names, and warnings.

    Raises:
        InputError: If the sets were seen by other networks, or hold values that are not finite.
    """
    _check(reference, samples, network)
    values: dict[str, float] = {}
    warnings = _warnings(reference, samples, network)
    values["frechet_distance"] = _distance(reference, samples, "mean", "covariance")
    if reference.spatial_mean is not None and samples.spatial_mean is not None:
        values["spatial_frechet_distance"] = _distance(reference, samples, "spatial_mean", "spatial_covariance")
    logits, real, fake = _ordered(samples, "logits"), _ordered(reference, "features"), _ordered(samples, "features")
    if logits is not None:
        _add_inception_score(values, warnings, logits, seed)
    if real is not None and fake is not None:
        _add_pairwise(values, warnings, real, fake, seed)
    ordered = {key: values[key] for name in FIGURES for key in (name, name + DEVIATION) if key in values}
    return SetFigures(values=ordered, labels={key: _label(network, key) for key in ordered}, warnings=warnings)


def _label(network: Extractor, key: str) -> str:
    name = key.removesuffix(DEVIATION)
    label = network.label(NAMES.get(name, name.replace("_", " ")))
    return label if key == name else f"deviation of {label}"


def _ordered(found: SetFeatures, name: str) -> Tensor | None:
    """Return features or logits in an order that does not depend on how the images lie, where one is known."""
    tensor, order = getattr(found, name), found.order
    is_whole = tensor is not None and order is not None and len(order) == len(tensor)
    return tensor[order] if is_whole else tensor


def _distance(reference: SetFeatures, samples: SetFeatures, mean: str, covariance: str) -> float:
    ours, theirs = getattr(reference, mean), getattr(samples, mean)
    cov_ours, cov_theirs = getattr(reference, covariance), getattr(samples, covariance)
    try:
        if covariance not in reference.roots:
            reference.roots[covariance] = covariance_root(cov_ours)
        return frechet_distance(ours, cov_ours, theirs, cov_theirs, root_a=reference.roots[covariance])
    except InputError as error:
        raise InputError(f"{samples.source} has no distance from {reference.source}: {error}") from error


def _add_inception_score(values: dict[str, float], warnings: list[str], logits: Tensor, seed: int) -> None:
    if len(logits) < SPLITS:
        warnings.append(f"{len(logits)} samples are too few for an inception score, which takes at least {SPLITS}")
        return
    score, deviation = inception_score(logits, SPLITS, seed=seed)
    values |= {"inception_score": score, "inception_score" + DEVIATION: deviation}


def _add_pairwise(values: dict[str, float], warnings: list[str], real: Tensor, fake: Tensor, seed: int) -> None:
    least = min(len(real), len(fake))
    balls: dict[tuple[str, str], tuple[int, Callable[..., tuple[float, float]]]] = {
        ("precision", "recall"): (PRECISION_NEIGHBOUR, precision_recall),
        ("density", "coverage"): (DENSITY_NEIGHBOUR, density_coverage),
    }
    for names, (neighbour, figure) in balls.items():
        if least > neighbour:
            values |= dict(zip(names, figure(real, fake, neighbour), strict=True))
        else:
            needed = f"{' and '.join(names)}, which take at least {neighbour + 1}"
            warnings.append(f"{least} images are too few for {needed}")
    size = min(least, SUBSET_SIZE)
    subsets = 1 if size == max(len(real), len(fake)) else SUBSETS  # all subsets would be the whole sets
    distance, deviation = kernel_distance(real, fake, subsets=subsets, subset_size=size, seed=seed)
    values["kernel_distance"] = distance
    if size < least:  # subsets that are all of the smaller set tell nothing of its chance
        values["kernel_distance" + DEVIATION] = deviation
    values["cmmd"] = cmmd(F.normalize(real.double(), dim=1), F.normalize(fake.double(), dim=1))


def _check(reference: SetFeatures, samples: SetFeatures, network: Extractor) -> None:
    for found in (reference, samples):
        if found.extractor_sha256 != network.sha256 or found.extractor != network.name:
            raise InputError(f"{found.source}: was seen by {found.extractor}, not by {network.name}; look at it again")
        tensors = (found.mean, found.covariance, found.spatial_mean, found.spatial_covariance)
        for tensor in (*tensors, found.features, found.logits):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise InputError(
                    f"{found.source}: {network.name} gives values that are not finite; look at its weights"
                )


def _warnings(reference: SetFeatures, samples: SetFeatures, network: Extractor) -> list[str]:
    counts = [each.statistics_count for each in (reference, samples) if each.statistics_count is not None]
    biased = biased_because(min(counts), network.dim) if counts else None
    warnings = [] if biased is None else [biased]
    warnings += [
        f"{found.source}: only {found.distinct} of the {found.count} images differ from one another, so that figures "
        "about the set mislead; look for copies"
        for found in (reference, samples)
        if found.distinct is not None and found.distinct < found.count
    ]
    if reference.pixels is not None and reference.pixels == samples.pixels:
        warnings.append(f"{samples.source} holds the same images as {reference.source}, so there is nothing to compare")
    return warnings
