"""What latents look like to a generator that is to learn them, in numbers: spread, rank, clusters, classes, neighbours.

All of it is computed in float64 on the CPU, and what is drawn at random is drawn from a key of each photograph's name,
so that neither the batch nor the order of the photographs changes a figure by more than rounding.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.mixture import choose_mixture
from softvq.evaluation.neighbours import nearest
from softvq.evaluation.probing import Labelled, evenly, held_back, probe_classes
from softvq.randomness import fold_in, normal
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.quantizers import code_shape, innermost

__all__ = [
    "NOISE_LEVELS",
    "Gathered",
    "Painted",
    "channel_figures",
    "class_figures",
    "codeword_figures",
    "correlations",
    "effective_rank",
    "has_codewords",
    "interpolation_figures",
    "mode_figures",
    "neighbour_figures",
    "neighbours_of",
    "noise_figures",
    "overlap",
    "principal_components",
    "spectrum_figures",
]

NOISE_LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Deviations of the noise, in deviations of the latents."""
NOISE_PHOTOS, SHOWN = 32, 4
INTERPOLATION_STEPS = 7
NEIGHBOURS = 10
MODE_DIMENSIONS, MOST_MODES = 16, 10
STORED_EIGENVALUES = 256
CODEWORDS = 8
NOISE, JUDGED = 3, 4

Decode = Callable[[Float[Tensor, "batch token dim"]], Float[Tensor, "batch 3 height width"]]
"""Paints normalised latents, however many, on the CPU in [-1, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gathered:
    """Photographs as a tokenizer has them."""

    names: tuple[str, ...]
    """Paths relative to their folder."""
    latents: Float[Tensor, "image token dim"]
    """Normalised, in float64."""
    keys: Int64[Tensor, " image"]
    """See `keys_of_names`."""
    labels: Int64[Tensor, " image"]
    """Numbers of classes; -1 where there are none."""
    classes: tuple[str, ...]
    """Their names, maybe none."""
    pixels: Float[Tensor, "image pixel"]
    """Very small copies of the photographs, in float64."""
    encoder: Float[Tensor, "image feature"] | None = None
    """Features that a vision encoder gives them."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Painted:
    """Figures about decoded images, and some of those images."""

    figures: dict[str, Any]
    """For JSON."""
    images: Float[Tensor, "row column 3 height width"]
    """In [-1, 1]."""


def channel_figures(latents: Float[Tensor, "image token dim"]) -> dict[str, list[float]]:
    """Return mean, deviation, skewness and excess kurtosis of each channel over all tokens of all images.

    A normal distribution has skewness and excess kurtosis 0; a channel that never changes is given 0 too.

    Args:
        latents: Normalised.

    Returns:
        A list for each figure, with a number for each channel.
    """
    values = latents.flatten(0, 1).double()
    mean, std = values.mean(0), values.std(0, correction=0)
    unit = (values - mean) / torch.where(std > 0, std, 1.0)
    kurtosis = torch.where(std > 0, unit.pow(4).mean(0) - 3, 0.0)
    found = {"mean": mean, "std": std, "skewness": unit.pow(3).mean(0), "excess_kurtosis": kurtosis}
    return {name: value.tolist() for name, value in found.items()}


def correlations(latents: Float[Tensor, "image token dim"]) -> Float[Tensor, "dim dim"]:
    """Return how channels go with one another over all tokens; with one that never changes, nothing does."""
    values = latents.flatten(0, 1).double()
    values = values - values.mean(0)
    length = values.norm(dim=0)
    values = values / torch.where(length > 0, length, 1.0)
    return (values.mT @ values).clamp(-1, 1)


def effective_rank(eigenvalues: Float[Tensor, " n"]) -> float:
    """Return over how many directions variance is spread: exp of the entropy of its shares (Roy and Vetterli, 2007).

        exp(- sum_i p_i log p_i),  p_i = eigenvalue_i / sum of all

    Args:
        eigenvalues: Of a covariance; those below 0 are rounding.

    Returns:
        1 if all variance is in one direction, n if it is the same in all; 0 if there is none.
    """
    shares = eigenvalues.double().clamp(min=0)
    if not bool(shares.sum() > 0):
        return 0.0
    return math.exp(float(torch.special.entr(shares / shares.sum()).sum()))


def principal_components(
    vectors: Float[Tensor, "sample dim"], count: int
) -> tuple[Float[Tensor, " n"], Float[Tensor, "sample count"]]:
    """Return the eigenvalues of the covariance, the largest first, and the samples along the first directions.

    Args:
        vectors: At least two; they are centred here.
        count: Directions, at most as many as samples and as dimensions.

    Returns:
        All eigenvalues that can differ from 0, in float64, and coordinates. Each direction points to where its largest
        coordinate is.
    """
    centred = vectors.double() - vectors.double().mean(0)
    samples, dim = centred.shape
    if samples <= dim:
        values, directions = torch.linalg.eigh(centred @ centred.mT / samples)
        values = values.flip(0).clamp(min=0)
        places = directions.flip(1)[:, :count] * (samples * values[:count]).sqrt()
    else:
        values, directions = torch.linalg.eigh(centred.mT @ centred / samples)
        values, places = values.flip(0).clamp(min=0), centred @ directions.flip(1)[:, :count]
    far = places.gather(0, places.abs().argmax(0, keepdim=True))
    return values, places * torch.where(far < 0, -1.0, 1.0)


def spectrum_figures(latents: Float[Tensor, "image token dim"]) -> dict[str, Any]:
    """Return the spectra of three covariances and their effective ranks.

    Args:
        latents: Of at least two images.

    Returns:
        Of `channels` (over all tokens of all images), of `tokens` (over images, mean of the channels), and of `images`
        (all numbers of an image side by side, whose rank cannot exceed the number of images).
    """
    latents = latents.double()
    images, tokens, dim = latents.shape
    channels, _ = principal_components(latents.flatten(0, 1), 1)
    centred = latents - latents.mean(0)
    between = torch.einsum("itd,isd->ts", centred, centred) / (images * dim)
    whole, _ = principal_components(latents.flatten(1), 1)
    found = {
        "channels": (channels, min(dim, images * tokens - 1)),
        "tokens": (torch.linalg.eigvalsh(between).flip(0).clamp(min=0), tokens),
        "images": (whole, min(tokens * dim, images - 1)),
    }
    return {
        name: {
            "effective_rank": effective_rank(values),
            "largest_possible": most,
            "variance": float(values.sum()),
            "shares": (values / values.sum().clamp(min=1e-300))[:STORED_EIGENVALUES].tolist(),
        }
        for name, (values, most) in found.items()
    }


def mode_figures(data: Gathered) -> dict[str, Any]:
    """Return how many clusters the images form, by a mixture of Gaussians along their first principal components.

    Along those a single Gaussian of any covariance is one component with a diagonal one; each is scaled to deviation 1.

    Args:
        data: At least two photographs.

    Returns:
        The number that BIC chooses, and the criterion and the likelihood of every number that was tried.
    """
    count = max(1, min(MODE_DIMENSIONS, len(data.latents) // 10, data.latents[0].numel()))
    values, points = principal_components(data.latents.flatten(1), count)
    if not bool(values[0] > 0):
        raise InputError("the latents of these photographs are all the same; the model cannot be used")
    points = points / points.std(0, correction=0).clamp(min=1e-150)
    number, found = choose_mixture(points, data.keys, MOST_MODES)
    tried = [
        {"modes": i, "bic": fit.bic, "nats_per_image": -fit.log_likelihood / len(points)}
        for i, fit in enumerate(found, 1)
    ]
    return {"modes": number, "dimensions": count, "shares": found[number - 1].shares.tolist(), "tried": tried}


def class_figures(data: Gathered) -> dict[str, Any] | None:
    """Return how well classes can be read off the latents: a quarter of the photographs judges what others taught.

    Args:
        data: With or without classes.

    Returns:
        Accuracies of the mean over tokens and of all tokens side by side; None without two classes of a few each.
    """
    if len(data.classes) < 2:
        return None
    judged = held_back(data.labels, fold_in(data.keys, JUDGED), 0.25)
    teach = ~judged
    if not bool(judged.any()) or not bool(held_back(data.labels[teach], data.keys[teach]).any()):
        return None
    found: dict[str, Any] = {"train": int(teach.sum()), "val": int(judged.sum()), "classes": len(data.classes)}
    for name, features in (("latents-pooled", data.latents.mean(1)), ("latents", data.latents.flatten(1))):
        whole = Labelled(features=features.double(), labels=data.labels, keys=data.keys)
        votes = min(20, int(teach.sum()))
        found[name] = probe_classes(whole.at(teach), whole.at(judged), len(data.classes), neighbours=votes).as_dict()
    return found


def noise_figures(
    data: Gathered, decode: Decode, levels: Sequence[float] = NOISE_LEVELS, photos: int = NOISE_PHOTOS
) -> Painted:
    """Return how much of an image is left when its latents are off: PSNR of decode(z + s noise) against decode(z).

    Args:
        data: Latents z.
        decode: Paints them.
        levels: Deviations s of the noise, in deviations of the latents.
        photos: How many to take at most.

    Returns:
        Mean PSNR at each level, and rows of images: without noise, and at each level.
    """
    chosen = evenly(len(data.latents), photos)
    latents, keys = data.latents[chosen].float(), fold_in(data.keys[chosen], NOISE)
    deviation = float(data.latents.std(correction=0))
    clean = decode(latents)
    noise = normal(keys, *latents.shape[1:]) * deviation
    shown = evenly(len(chosen), SHOWN)
    columns, rows = [clean[shown]], []
    for level in levels:
        images = decode(latents + level * noise)
        error = (images.double() - clean.double()).square().mean((1, 2, 3))
        finite = error[error > 0]
        psnr = float((10 * (4 / finite).log10()).mean()) if len(finite) else None  # JSON has no infinity
        rows.append({"level": level, "psnr": psnr, "unchanged": int((error == 0).sum())})
        columns.append(images[shown])
    figures = {"photographs": len(chosen), "deviation": deviation, "levels": rows}
    return Painted(figures=figures, images=torch.stack(columns, 1))


def interpolation_figures(data: Gathered, decode: Decode, steps: int = INTERPOLATION_STEPS) -> Painted:
    """Return what lies on straight lines between latents of photographs.

    Args:
        data: Of at least two photographs.
        decode: Paints latents.
        steps: Images on each line, with both ends.

    Returns:
        For each line its straightness in pixels, the distance of the ends to the length of the way; and the images.
    """
    places = evenly(len(data.latents), 2 * SHOWN)
    half = len(places) // 2
    starts, ends = places[:half], places[half : 2 * half]
    weights = torch.linspace(0, 1, steps, dtype=torch.float64)[None, :, None, None]
    lines = torch.lerp(data.latents[starts][:, None].double(), data.latents[ends][:, None].double(), weights)
    images = decode(lines.flatten(0, 1).float()).unflatten(0, (half, steps))
    pixels = images.flatten(2).double()
    way = (pixels[:, 1:] - pixels[:, :-1]).norm(dim=2).sum(1)
    direct = (pixels[:, -1] - pixels[:, 0]).norm(dim=1)
    straight = torch.where(way > 0, direct / way.clamp(min=1e-300), 1.0)
    rows = [
        {"from": data.names[a], "to": data.names[b], "straightness": value}
        for a, b, value in zip(starts, ends, straight.tolist(), strict=True)
    ]
    return Painted(figures={"straightness": float(straight.mean()), "lines": rows}, images=images)


def neighbours_of(
    vectors: Float[Tensor, "sample dim"], count: int, metric: str = "cosine"
) -> Int64[Tensor, "sample count"]:
    """Return the nearest others of each sample, the nearest first; a sample is no neighbour of itself.

    Args:
        vectors: More than `count`.
        count: Neighbours of each.
        metric: `cosine` or `euclidean`.

    Returns:
        Their numbers.
    """
    _, found = nearest(vectors, vectors, metric=metric, count=count + 1)
    itself = found == torch.arange(len(vectors))[:, None]
    itself[:, -1] |= ~itself.any(1)  # pushed out by copies of it
    return found[~itself].reshape(len(vectors), count)


def overlap(first: Int64[Tensor, "sample count"], second: Int64[Tensor, "sample count"]) -> float:
    """Return the mean share of neighbours that are in both lists of a sample."""
    return float((first[:, :, None] == second[:, None]).any(2).double().mean())


def neighbour_figures(data: Gathered) -> tuple[dict[str, Any], Int64[Tensor, "image count"]]:
    """Return whether what is near in latents is near elsewhere too.

    Args:
        data: Of at least two photographs.

    Returns:
        Shares of the nearest ten that latents have in common with pixels and with the vision encoder if there is one,
        and that are of the same class, each with what chance would give; and the neighbours in latents.
    """
    count = min(NEIGHBOURS, len(data.latents) - 1)
    own = neighbours_of(data.latents.flatten(1).double(), count, "euclidean")
    chance = count / (len(data.latents) - 1)
    found: dict[str, Any] = {"count": count, "chance": chance}
    found["overlap_with_pixels"] = overlap(own, neighbours_of(data.pixels, count, "euclidean"))
    found["overlap_with_encoder"] = found["same_class"] = found["same_class_by_chance"] = None
    if data.encoder is not None:
        found["overlap_with_encoder"] = overlap(own, neighbours_of(data.encoder, count))
    if data.classes:
        found["same_class"] = float((data.labels[own] == data.labels[:, None]).double().mean())
        pairs = (data.labels[:, None] == data.labels).double().sum(1) - 1
        found["same_class_by_chance"] = float((pairs / (len(data.labels) - 1)).mean())
    return found, own


@torch.no_grad()
def codeword_figures(
    tokenizer: ImageTokenizer, data: Gathered, indices: Int[Tensor, "image token *stage"], decode: Decode
) -> Painted:
    """Return what single codewords paint: one photograph, with one of its tokens replaced by them.

    Of product and residual quantizers the first part or depth is replaced, the others stay the photograph's.

    Args:
        tokenizer: Whose quantizer has a codebook, see `has_codewords`.
        data: The photographs.
        indices: Their codewords, as `encode_indices` gives them.
        decode: Paints latents.

    Returns:
        For some tokens the codewords they are nearest to most often; rows of images: as it is, then with each of those.
    """
    photo, stages = evenly(len(data.latents), 1)[0], code_shape(tokenizer.config.quantizer)
    size = getattr(innermost(tokenizer.config.quantizer), "codebook_size", 0)
    chosen = evenly(indices.shape[1], SHOWN)
    first, quantizer = (0,) * len(stages), cast(Any, tokenizer.quantizer)  # one with a codebook
    latents, rows = [], []
    for token in chosen:
        used = indices[(slice(None), token, *first)].long().cpu().bincount(minlength=size)
        codes = used.argsort(descending=True, stable=True)[:CODEWORDS]
        swapped = indices[photo].long().cpu().repeat(len(codes), *(1 for _ in indices.shape[1:]))
        swapped[(slice(None), token, *first)] = codes
        raw = quantizer.lookup(swapped.to(tokenizer.latent_mean.device))[:, token]
        ready = data.latents[photo].float().repeat(1 + len(codes), 1, 1)
        ready[1:, token] = ((raw - tokenizer.latent_mean) / tokenizer.latent_std).float().cpu()
        latents.append(ready)
        shares = (used[codes].double() / len(indices)).tolist()
        rows.append({"token": token, "used": int((used > 0).sum()), "codewords": codes.tolist(), "shares": shares})
    images = decode(torch.cat(latents)).unflatten(0, (len(chosen), -1))
    return Painted(figures={"photograph": data.names[photo], "codebook_size": size, "tokens": rows}, images=images)


def has_codewords(tokenizer: ImageTokenizer) -> bool:
    """Return whether the tokenizer's quantizer has a codebook."""
    return getattr(innermost(tokenizer.config.quantizer), "codebook_size", 0) > 0
