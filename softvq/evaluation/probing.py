"""What a tokenizer's latents, its encoder or a generator's blocks know about classes: a linear probe and neighbours."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.neighbours import nearest
from softvq.evaluation.probe import accuracy, fit_probe, wilson_interval
from softvq.generators.generator import LatentGenerator
from softvq.generators.mar import MAR
from softvq.randomness import fold_in, normal, seed_of, uniform
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = [
    "KINDS",
    "STRENGTHS",
    "Labelled",
    "ProbeResult",
    "Score",
    "evenly",
    "generator_features",
    "held_back",
    "keys_of_names",
    "knn_classes",
    "parse_features",
    "probe_classes",
    "tokenizer_features",
]

KINDS = ("latents-pooled", "latents", "encoder")
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Weights of the penalty that a probe chooses from."""
TEMPERATURE = 0.07
"""Of the neighbours' votes, as DINO (arXiv:2104.14294) has it."""
SWEEP_ITERATIONS, ITERATIONS = 100, 300
SPLIT, NOISE = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """Features of samples, their classes, and a key for each, from which all that is drawn about it follows."""

    features: Float[Tensor, "sample dim"]
    """Float64, on the CPU."""
    labels: Int64[Tensor, " sample"]
    """0 to the number of classes - 1."""
    keys: Int64[Tensor, " sample"]
    """See `keys_of_names`."""

    def at(self, chosen: Bool[Tensor, " sample"]) -> "Labelled":
        """Return some of the samples."""
        return Labelled(features=self.features[chosen], labels=self.labels[chosen], keys=self.keys[chosen])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """How often a class was guessed right."""

    correct: int
    """Samples."""
    total: int
    """Of so many."""

    @property
    def accuracy(self) -> float:
        """The fraction, 0 to 1."""
        return self.correct / self.total

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: accuracy, its 95 % interval (Wilson), and the counts."""
        interval = list(wilson_interval(self.correct, self.total))
        return {"accuracy": self.accuracy, "interval_95": interval, "correct": self.correct, "total": self.total}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What two simple classifiers make of features."""

    linear: Score
    """A multinomial logistic regression."""
    knn: Score
    """Votes of the nearest training samples."""
    majority: Score
    """Always the commonest class of the training samples."""
    l2: float
    """The penalty that was chosen."""
    sweep: dict[float, float]
    """Accuracy on the held-back fifth of the training samples, by penalty."""
    gradient: float
    """Largest entry of the regression's gradient where its fit ended."""
    neighbours: int
    """How many vote."""
    confusion: Int64[Tensor, "true guessed"]
    """How often the regression takes one class for another."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: all but the confusion."""
        scores = {name: getattr(self, name).as_dict() for name in ("linear", "knn", "majority")}
        sweep = [{"l2": l2, "held_back_accuracy": value} for l2, value in self.sweep.items()]
        return {**scores, "l2": self.l2, "sweep": sweep, "gradient": self.gradient, "neighbours": self.neighbours}


def evenly(count: int, most: int) -> list[int]:
    """Return which of `count` things to take if there are to be at most `most`, spread evenly.

    Args:
        count: Things there are.
        most: At least 1.

    Returns:
        Ascending numbers below `count`.
    """
    if count <= most:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * most) for i in range(most)]


def keys_of_names(names: Sequence[str], seed: int = 0) -> Int64[Tensor, " sample"]:
    """Return a key for each name: what is drawn about a photograph depends neither on its batch nor on its place."""
    return torch.tensor([seed_of(seed, "evaluation", name) for name in names], dtype=torch.int64)


def parse_features(text: str) -> tuple[str, int | None]:
    """Read which features are asked for.

    Args:
        text: `latents-pooled`, `latents`, `encoder`, or `generator:LAYER`.

    Returns:
        What is looked at, and the layer of a generator.

    Raises:
        InputError: If it is none of these.
    """
    kind, colon, layer = text.partition(":")
    if kind == "generator" and layer.isascii() and layer.isdecimal() and len(layer) < 6:
        return kind, int(layer)
    if colon or text not in KINDS:
        raise InputError(f"--on is {text!r}, expected {', '.join(KINDS)} or generator:LAYER such as generator:8")
    return text, None


@torch.no_grad()
def tokenizer_features(
    tokenizer: ImageTokenizer, images: Float[Tensor, "batch 3 height width"], kind: str
) -> Float[Tensor, "batch feature"]:
    """Return one vector for each image, in float64 on the CPU.

    Args:
        tokenizer: In evaluation mode.
        images: RGB in [-1, 1], of any device.
        kind: `latents-pooled` is the mean of the normalised latents over tokens, `latents` all of them side by side,
            `encoder` the mean of the encoder's output tokens, before they are cut down to what the quantizer takes.

    Returns:
        The vectors.

    Raises:
        InputError: If there is no such kind, or the tokenizer cannot take the images.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, expected {', '.join(KINDS)}")
    images = images.to(tokenizer.latent_mean.device)
    if kind == "encoder":
        tokens = tokenizer.encoder(images.to(tokenizer.to_latents.weight.dtype))
    else:
        tokens = tokenizer.encode(images)
    tokens = tokens.double().cpu()
    return tokens.flatten(1) if kind == "latents" else tokens.mean(1)


@torch.no_grad()
def generator_features(
    generator: LatentGenerator,
    latents: Float[Tensor, "batch token dim"],
    layer: int,
    keys: Int64[Tensor, " batch"],
    *,
    time: float = 0.2,
) -> Float[Tensor, "batch width"]:
    """Return the mean over tokens of what one block of a generator puts out, its condition being hidden.

    A MAR sees all tokens without noise, and its layers are the encoder's blocks and the decoder's after them.

    Args:
        generator: In evaluation mode.
        latents: Normalised, of the tokenizer it was trained on.
        layer: Number of the block, from 0.
        keys: One for each image, from which its noise is drawn.
        time: How much noise the latents get, from 0 (none) to 1 (nothing else).

    Returns:
        Float64, on the CPU.

    Raises:
        InputError: If there is no such layer or time, the latents have another shape, or the generator never learned
            to do without its condition.
    """
    config, network = generator.config, generator.network
    _check_generator(generator, tuple(latents.shape[1:]), time)
    blocks = [*network.encoder_blocks, *network.decoder_blocks] if isinstance(network, MAR) else [*network.blocks]
    if not 0 <= layer < len(blocks):
        raise InputError(f"layer is {layer}, expected 0 to {len(blocks) - 1}, the blocks of this generator")
    device = next(generator.parameters()).device
    clean, keys = latents.to(device, torch.float32), keys.to(device)
    null = torch.ones(len(clean), dtype=torch.bool, device=device)
    if config.condition == "embedding":
        condition = clean.new_zeros(len(clean), config.condition_dim)
    else:
        condition = torch.zeros_like(keys)
    seen: list[Tensor] = []
    hook = blocks[layer].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        if isinstance(network, MAR):
            orders = torch.arange(config.num_tokens, device=device).expand(len(clean), -1)
            network(clean, orders, network.condition(condition, null))
        else:
            noise = normal(fold_in(keys, NOISE), *clean.shape[1:])
            step = torch.full((len(clean),), generator.process.time_at(time), dtype=torch.float32, device=device)
            noisy = clean if time == 0 else generator.process.noisy(clean, noise, step)
            network(noisy, generator.process.network_time(step.clamp(min=0)), condition, null)
    finally:
        hook.remove()
    return seen[0][:, -config.num_tokens :].double().cpu().mean(1)  # MAR has the condition's tokens in front


def probe_classes(
    train: Labelled,
    val: Labelled,
    num_classes: int,
    *,
    neighbours: int = 20,
    strengths: Sequence[float] = STRENGTHS,
) -> ProbeResult:
    """Say how well classes can be told from features, by a linear probe and by nearest neighbours.

    The penalty of the probe is the one that does best on a fifth of the training samples, held back; of equals the
    strongest. Then it is fitted on all of them.

    Args:
        train: What both learn from.
        val: What both are judged by.
        num_classes: At least 2.
        neighbours: How many vote.
        strengths: Weights of the penalty to choose from.

    Returns:
        Accuracies and how they came about.

    Raises:
        InputError: If there are too few classes or samples.
    """
    if num_classes < 2:
        raise InputError(f"the photographs are of {num_classes} class, expected at least 2 folders of classes")
    if not len(val.labels):
        raise InputError("there is nothing to judge by, expected at least 1 photograph")
    if not 1 <= neighbours <= len(train.labels):
        raise InputError(f"knn is {neighbours}, expected 1 to the {len(train.labels)} training photographs")
    away = held_back(train.labels, train.keys)
    if not bool(away.any()):
        raise InputError("every class has one training photograph, too few to hold some back; give more")
    kept, judged = train.at(~away), train.at(away)
    sweep: dict[float, float] = {}
    for l2 in sorted(strengths):
        probe = fit_probe(kept.features, kept.labels, num_classes, l2=l2, max_iterations=SWEEP_ITERATIONS)
        sweep[l2] = accuracy(probe, judged.features, judged.labels)
    best = max(sweep, key=lambda l2: (sweep[l2], l2))
    probe = fit_probe(train.features, train.labels, num_classes, l2=best, max_iterations=ITERATIONS)
    voted = knn_classes(train.features, train.labels, val.features, num_classes, count=neighbours)
    commonest = train.labels.bincount(minlength=num_classes).argmax()
    guessed = probe.logits(val.features).argmax(1)
    pairs = (val.labels * num_classes + guessed).bincount(minlength=num_classes**2)
    return ProbeResult(
        linear=_score(guessed, val.labels),
        knn=_score(voted, val.labels),
        majority=_score(commonest.expand(len(val.labels)), val.labels),
        l2=best,
        sweep=sweep,
        gradient=probe.gradient,
        neighbours=neighbours,
        confusion=pairs.unflatten(0, (num_classes, num_classes)),
    )


def held_back(
    labels: Int64[Tensor, " sample"], keys: Int64[Tensor, " sample"], share: float = 0.2
) -> Bool[Tensor, " sample"]:
    """Choose a share of the samples of every class, by their keys alone.

    Args:
        labels: Classes.
        keys: Of the samples; their order does not matter.
        share: Above 0 and below 1; it is rounded up, but one of each class stays.

    Returns:
        True for those chosen.
    """
    draws = uniform(fold_in(keys, SPLIT)).double()
    chosen = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique().tolist():
        places = (labels == label).nonzero()[:, 0]
        order = draws[places].argsort(stable=True)
        chosen[places[order[: math.ceil((len(places) - 1) * share)]]] = True
    return chosen


def knn_classes(
    references: Float[Tensor, "reference dim"],
    labels: Int64[Tensor, " reference"],
    queries: Float[Tensor, "query dim"],
    num_classes: int,
    *,
    count: int = 20,
    temperature: float = TEMPERATURE,
) -> Int64[Tensor, " query"]:
    """Return the class that the nearest references vote for (arXiv:2104.14294, section 4.1).

        votes[c] = sum over neighbours i of class c of exp(cos(query, i) / temperature)

    Args:
        references: Of known classes.
        labels: Those.
        queries: Of unknown ones.
        num_classes: How many there are.
        count: Neighbours that vote.
        temperature: The lower, the more the nearest count.

    Returns:
        One class for each query; of equals the first.
    """
    distances, places = nearest(queries, references, count=count)
    weights = ((distances[:, :1] - distances).double() / temperature).exp()  # the nearest has weight 1: no overflow
    votes = torch.zeros(len(queries), num_classes, dtype=torch.float64).scatter_add(1, labels[places], weights)
    return votes.argmax(1)


def _score(found: Tensor, labels: Tensor) -> Score:
    return Score(correct=int((found == labels).sum()), total=len(labels))


def _check_generator(generator: LatentGenerator, shape: tuple[int, ...], time: float) -> None:
    config = generator.config
    own = (config.num_tokens, config.latent_dim)
    if shape != own:
        raise InputError(f"latents are {list(shape)} for each image, expected {list(own)}, which the generator makes")
    if config.condition != "none" and not config.guidable:
        raise InputError("the generator never learned to do without its condition (label_dropout is 0); give another")
    if not 0 <= time <= 1:
        raise InputError(f"time is {time}, expected 0 (no noise) to 1")
