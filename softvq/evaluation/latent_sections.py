"""A report about latents from end to end: every figure of it, and the sections of its page."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation import latent_report as figures_of
from softvq.evaluation.charts import bar_chart, heat_map, line_chart, photo_map, strips
from softvq.evaluation.latent_report import Decode, Gathered
from softvq.evaluation.pictures import grid
from softvq.evaluation.probing import evenly
from softvq.evaluation.report import Section
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["FEWEST_PHOTOS", "latent_study", "summary_of"]

FEWEST_PHOTOS = 8
QUERIES, NEIGHBOURS_SHOWN = 6, 6


def latent_study(
    tokenizer: ImageTokenizer,
    data: Gathered,
    thumbnails: Sequence[Image.Image],
    indices: Int[Tensor, "image token *stage"] | None,
    decode: Decode,
) -> tuple[dict[str, Any], list[Section]]:
    """Look at latents from all sides.

    Args:
        tokenizer: Whose latents they are.
        data: The photographs.
        thumbnails: Small pictures of them.
        indices: Their codewords, if the quantizer has any.
        decode: Paints latents.

    Returns:
        All figures, for JSON, and the sections of a page.

    Raises:
        InputError: If there are too few photographs, or their latents are all the same.
    """
    if len(data.names) < FEWEST_PHOTOS:
        raise InputError(f"there are {len(data.names)} photographs, expected at least {FEWEST_PHOTOS}")
    matrix = figures_of.correlations(data.latents)
    report: dict[str, Any] = {
        "channels": figures_of.channel_figures(data.latents),
        "correlation": {"mean_off_diagonal": _off_diagonal(matrix), "matrix": matrix.tolist()},
        "spectrum": figures_of.spectrum_figures(data.latents),
        "modes": figures_of.mode_figures(data),
        "classes": figures_of.class_figures(data),
    }
    sections = [_channels(report["channels"]), _correlation(report["correlation"], matrix)]
    sections += [_spectrum(report["spectrum"]), _modes(report["modes"])]
    sections += [] if report["classes"] is None else [_classes(report["classes"])]
    noise, lines = figures_of.noise_figures(data, decode), figures_of.interpolation_figures(data, decode)
    report |= {"noise": noise.figures, "interpolation": lines.figures}
    report["neighbours"], nearest = figures_of.neighbour_figures(data)
    sections += [_noise(noise), _interpolation(lines), _neighbours(report["neighbours"], nearest, thumbnails)]
    variance, places = figures_of.principal_components(data.latents.flatten(1), 2)
    shares = (variance[:2] / variance.sum()).tolist()
    report["map"] = {"variance_shares": shares}
    sections.append(_map(shares, _both(places), thumbnails, data))
    report["codewords"] = None
    if indices is not None:
        painted = figures_of.codeword_figures(tokenizer, data, indices, decode)
        report["codewords"] = painted.figures
        sections.append(_codewords(painted))
    return report, sections


def summary_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the most telling numbers of a report, each after its name."""
    spectrum, noise = report["spectrum"], report["noise"]["levels"]
    ranks = [
        (f"Effective rank, {name}", f"{spectrum[name]['effective_rank']:.1f} of {spectrum[name]['largest_possible']}")
        for name in ("channels", "images")
    ]
    middle = noise[len(noise) // 2]
    found = [*ranks, ("Modes", str(report["modes"]["modes"]))]
    found.append((f"PSNR under noise of {middle['level']:g}", _decibels(middle["psnr"])))
    if report["classes"] is not None:
        found.append(("Linear probe", _percent(report["classes"]["latents"]["linear"])))
    return found


def _channels(found: dict[str, list[float]]) -> Section:
    ends = [(mean - std, mean + std) for mean, std in zip(found["mean"], found["std"], strict=True)]
    rows = [(name.replace("_", " "), _range(values)) for name, values in found.items()]
    return Section(
        title="Channels",
        text="Each channel over all tokens of all images. A generator starts from normal noise: mean 0, deviation 1, "
        "skewness 0 and excess kurtosis 0 are what it need not learn.",
        picture=bar_chart([], found["mean"], ends, across="channel", up="mean, and one deviation to each side"),
        caption=f"Means of {len(ends)} channels, with lines one deviation long to each side.",
        rows=rows,
    )


def _correlation(found: dict[str, Any], matrix: Tensor) -> Section:
    return Section(
        title="Correlation of channels",
        text="Red goes together, blue against one another, white is unrelated.",
        picture=heat_map(matrix),
        caption=f"Correlations of {len(matrix)} channels with one another.",
        rows=[("mean size off the diagonal", f"{found['mean_off_diagonal']:.3f}")],
    )


def _spectrum(found: dict[str, Any]) -> Section:
    series, rows = {}, []
    for name, part in found.items():
        sums = torch.tensor(part["shares"], dtype=torch.float64).cumsum(0).tolist()
        series[name] = [(math.log2(i), value) for i, value in enumerate(sums, 1)]
        rank = f"{part['effective_rank']:.2f} of at most {part['largest_possible']}"
        rows.append((f"effective rank of {name}", f"{rank}; total variance {part['variance']:.4g}"))
    return Section(
        title="Spectrum",
        text="How much of the variance lies in the first directions of three covariances: of channels over all "
        "tokens, of tokens over images, and of whole images. The effective rank is exp of the entropy of the shares; "
        "that of images cannot exceed their number.",
        picture=line_chart(series, across="log2 of the number of directions", up="share of the variance"),
        caption="Variance in the first directions of channels, tokens and images, summed up.",
        rows=rows,
    )


def _modes(found: dict[str, Any]) -> Section:
    criterion = [(float(fit["modes"]), fit["bic"]) for fit in found["tried"]]
    likelihood = ", ".join(f"{fit['modes']}: {fit['nats_per_image']:.3f}" for fit in found["tried"])
    return Section(
        title="Modes",
        text=f"Mixtures of diagonal Gaussians over the images' first {found['dimensions']} principal components, each "
        "of deviation 1. The number with the smallest BIC is taken; few modes are easier to generate.",
        picture=line_chart({"BIC": criterion}, across="modes", up="BIC, lower is better", points=True),
        caption=f"BIC of mixtures; the smallest is that of {found['modes']}.",
        rows=[("modes", str(found["modes"])), ("negative log likelihood an image, nats", likelihood)],
    )


def _classes(found: dict[str, Any]) -> Section:
    scores = {
        f"{kind}, {name}": found[kind][name] for kind in ("latents-pooled", "latents") for name in ("linear", "knn")
    }
    scores["commonest class"] = found["latents"]["majority"]
    values = [score["accuracy"] for score in scores.values()]
    ends = [(score["interval_95"][0], score["interval_95"][1]) for score in scores.values()]
    return Section(
        title="Classes",
        text=f"How often the class of {found['val']} photographs is read off their latents, by a linear probe and by "
        f"nearest neighbours that learned from {found['train']} others; pooled is the mean over tokens.",
        picture=bar_chart(list(scores), values, ends, across="", up="accuracy, with 95 % intervals"),
        caption="Accuracy of a linear probe and of nearest neighbours on latents.",
        rows=[(name, _percent(score)) for name, score in scores.items()],
    )


def _noise(found: figures_of.Painted) -> Section:
    levels = found.figures["levels"]
    return Section(
        title="Noise",
        text="What the decoder makes of latents that are a little off, as a generator's are: noise of so many of their "
        "deviations is added, and PSNR is to the image without.",
        picture=strips(found.images, ["no noise", *(f"noise {row['level']:g}" for row in levels)]),
        caption="Decoded photographs without noise and with more and more of it, from left to right.",
        rows=[(f"noise {row['level']:g}", _decibels(row["psnr"])) for row in levels],
    )


def _interpolation(found: figures_of.Painted) -> Section:
    steps = found.images.shape[1]
    return Section(
        title="Between photographs",
        text="Decoded latents at even steps on straight lines between two photographs' latents. Straightness is the "
        "distance of the ends in pixels to the length of the way: 1 is a cross-fade.",
        picture=strips(found.images, [f"{i / (steps - 1):.2f}" for i in range(steps)]),
        caption="Straight lines in latent space, each from one photograph to another.",
        rows=[
            (f"{line['from']} to {line['to']}", f"straightness {line['straightness']:.3f}")
            for line in found.figures["lines"]
        ],
    )


def _neighbours(found: dict[str, Any], nearest: Tensor, thumbnails: Sequence[Image.Image]) -> Section:
    pictures, captions = [], []
    for query in evenly(len(thumbnails), QUERIES):
        shown = nearest[query, :NEIGHBOURS_SHOWN].tolist()
        pictures += [thumbnails[i] for i in (query, *shown)]
        captions += ["photograph", *(f"nearest {i}" for i in range(1, len(shown) + 1))]
    rows = [("shared with pixels", found["overlap_with_pixels"]), ("shared by chance", found["chance"])]
    rows += [("shared with the vision encoder", found["overlap_with_encoder"]), ("same class", found["same_class"])]
    rows += [("same class by chance", found["same_class_by_chance"])]
    return Section(
        title="Neighbours",
        text=f"The photographs nearest in latents, and how many of the nearest {found['count']} are nearest too by "
        "very small copies of the pictures, or to a vision encoder.",
        picture=grid(pictures, len(pictures) // min(QUERIES, len(thumbnails)), captions),
        caption="Photographs, each with those whose latents are nearest.",
        rows=[(name, f"{100 * value:.1f} %") for name, value in rows if value is not None],
    )


def _map(shares: list[float], places: Tensor, thumbnails: Sequence[Image.Image], data: Gathered) -> Section:
    colours = "; frames and dots are coloured by class" if data.classes else ""
    return Section(
        title="Map",
        text=f"Where photographs lie along the two directions in which their latents differ most{colours}.",
        picture=photo_map(places, thumbnails, data.labels),
        caption="Photographs at their first two principal components.",
        rows=[(f"variance along direction {i}", f"{100 * share:.1f} %") for i, share in enumerate(shares, 1)],
    )


def _codewords(found: figures_of.Painted) -> Section:
    return Section(
        title="Codewords",
        text=f"{found.figures['photograph']}, and the same with one token replaced by a single codeword: a row for a "
        "token, a column for each of the codewords that the photographs use most there.",
        picture=strips(found.images, ["as it is", *(f"codeword {i}" for i in range(1, found.images.shape[1]))]),
        caption="A photograph with one of its tokens replaced by codewords.",
        rows=[
            (f"token {row['token']}", f"{row['used']} codewords used; shown {', '.join(map(str, row['codewords']))}")
            for row in found.figures["tokens"]
        ],
    )


def _both(places: Tensor) -> Tensor:
    """Latents of a single number have one direction only."""
    return torch.nn.functional.pad(places, (0, 2 - places.shape[1]))


def _off_diagonal(matrix: Tensor) -> float:
    others = ~torch.eye(len(matrix), dtype=torch.bool)
    return float(matrix[others].abs().mean()) if len(matrix) > 1 else 0.0


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f}"


def _decibels(value: float | None) -> str:
    return "unchanged" if value is None else f"{value:.1f} dB"


def _percent(score: dict[str, Any]) -> str:
    low, high = score["interval_95"]
    return f"{100 * score['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
