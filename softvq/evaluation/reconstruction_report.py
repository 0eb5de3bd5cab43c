"""What is said of reconstructions: rows of figures with their names, a page with the worst ones, a table of all."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.evaluation.charts import line_chart
from softvq.evaluation.metrics import bits_per_pixel, compression_ratio
from softvq.evaluation.pair_figures import LABELS
from softvq.evaluation.pictures import side_by_side
from softvq.evaluation.report import Section
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.codebooks import codebook_statistics
from softvq.tokenizers.quantizers import code_shape, innermost

__all__ = [
    "SHOWN",
    "figures_table",
    "image_row",
    "latent_row",
    "median_places",
    "pair_sheet",
    "quality_sections",
    "reconstruction_label",
    "worst_places",
    "worst_rows",
]

SHOWN = 6
"""Pairs in a picture of the page."""
NORMAL_95 = 1.959963984540054
"""How many deviations on both sides of its mean hold 95 % of a normal distribution."""
FEWEST_FOR_INTERVALS = 30
LATENT_BITS = 16
DEVIATION = "deviation of "
PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
HIGHER_IS_BETTER = ("psnr", "mean_colour_psnr", "ssim", "ms_ssim", "legacy_ssim")
LATENT_LABELS = {
    "bits_per_pixel": "bits per pixel of float16 latents",
    "compression_ratio": "compression of raw RGB to float16 latents",
    "code_bits_per_pixel": "bits per pixel of the likeliest codewords alone",
    "codebook_usage": "share of codewords that are some token's likeliest",
    "codebook_perplexity": "perplexity of the mean posterior",
    "posterior_entropy": "entropy of a token's posterior in nats",
    "codewords": "codewords",
    "dead_codewords": "codewords that are no token's likeliest",
}


def image_row(names: Sequence[str], table: Float[Tensor, "image figure"]) -> dict[str, Any]:
    """Return the means of per-image figures as a row of a result.

    The interval of a mean is that of the normal distribution, mean +- 1.96 deviation / sqrt(n): how far it would move
    with other photographs of the same kind. Of fewer than 30 images there is none.

    Args:
        names: Of the figures, as `figure_names` has them.
        table: Float64, on the CPU, all finite but for the `mean_colour_psnr` of pictures of one colour, which are left
            out of its mean.

    Returns:
        `name`, `network` (None), `settings`, `figures`, `labels`, `warnings`, and `intervals_95`: two ends for each
        mean of enough numbers. `psnr_of_mean_error` is the PSNR of the mean squared error of all images together.
    """
    figures: dict[str, float] = {}
    labels: dict[str, str] = {}
    intervals: dict[str, list[float]] = {}
    for name, column in zip(names, table.T, strict=True):
        column = column[column.isfinite()]
        if name == "mse" or not len(column):
            continue
        mean = float(column.mean())
        figures[name], labels[name] = mean, LABELS[name]
        if len(column) >= FEWEST_FOR_INTERVALS:
            half = NORMAL_95 * float(column.std()) / math.sqrt(len(column))
            intervals[name] = [mean - half, mean + half]
    error = float(table[:, list(names).index("mse")].mean())
    if error > 0:
        figures["psnr_of_mean_error"] = 10 * math.log10(255**2 / error)
        labels["psnr_of_mean_error"] = "PSNR of the mean error in dB"
    equal = int((table[:, list(names).index("mse")] == 0).sum())
    warnings = []
    if len(table) < FEWEST_FOR_INTERVALS:
        warnings.append(f"{len(table)} images are too few for intervals, which take at least {FEWEST_FOR_INTERVALS}")
    if "mean_colour_psnr" in figures and figures["psnr"] < figures["mean_colour_psnr"]:
        warnings.append("the mean colour of each photograph is nearer to it; see whether these are its reconstructions")
    if equal:
        warnings.append(
            f"{equal} of {len(table)} reconstructions equal their photographs; their PSNR is that of a difference by "
            "one level in one value"
        )
    row = {"name": "images", "network": None, "settings": {}, "figures": figures, "labels": labels}
    return {**row, "intervals_95": intervals, "warnings": warnings}


def latent_row(
    tokenizer: ImageTokenizer, size: tuple[int, int], averages: dict[str, Tensor], num_tokens: int | None = None
) -> dict[str, Any]:
    """Return what latents cost, and how a codebook is used, as a row of a result.

    Args:
        tokenizer: Whose latents they are.
        size: Height and width of the images in pixels.
        averages: Of `posterior_averages` over all images, in the order of the codebooks; nothing without a codebook.
        num_tokens: How many are kept of an image; all by default. How a codebook is used is told of all of them.

    Returns:
        Like `image_row`, without intervals.
    """
    config = tokenizer.config
    tokens, dim = num_tokens or config.num_latent_tokens, config.latent_dim
    figures: dict[str, float] = {
        "bits_per_pixel": bits_per_pixel(*size, tokens, float(dim * LATENT_BITS)),
        "compression_ratio": compression_ratio(*size, tokens, dim),
    }
    if averages:
        codewords = getattr(innermost(config.quantizer), "codebook_size", 0)
        bits = math.prod(code_shape(config.quantizer)) * math.log2(codewords)
        if bits > 0:
            figures["code_bits_per_pixel"] = bits_per_pixel(*size, tokens, bits)
        found = {name: float(value) for name, value in codebook_statistics(averages).items()}
        figures |= {"codebook_usage": found["usage"], "codebook_perplexity": found["perplexity"]}
        figures["posterior_entropy"] = found["posterior_entropy"]
        figures["codewords"] = averages["likeliest"].numel()
        figures["dead_codewords"] = int((averages["likeliest"] <= 0).sum())
    labels = {name: LATENT_LABELS[name] for name in figures}
    return {"name": "latents", "network": None, "settings": {}, "figures": figures, "labels": labels, "warnings": []}


def reconstruction_label(label: str) -> str:
    """Return how a figure about sets is called where the samples are reconstructions of the reference.

    >>> [reconstruction_label(label) for label in ("FID", "sFID", "Fréchet distance on resnet18", "precision")]
    ['rFID', 'rsFID', 'rFD on resnet18', 'precision of reconstructions']

    Args:
        label: What it is called otherwise.

    Returns:
        The name with an r before it if it is short, as published tables have it.
    """
    if label.startswith(DEVIATION):
        return DEVIATION + reconstruction_label(label.removeprefix(DEVIATION))
    for long, short in (("spatial Fréchet distance", "rsFD"), ("Fréchet distance", "rFD"), ("kernel distance", "rKD")):
        if label.startswith(long):
            return short + label.removeprefix(long)
    word = label.split()[0]
    if any(char.isupper() for char in word[:2]):
        return f"r{label}"
    figure, on, network = label.partition(" on ")
    return f"{figure} of reconstructions{on}{network}"


def worst_places(names: Sequence[str], table: Float[Tensor, "image figure"], name: str, most: int) -> list[int]:
    """Return which images are worst by a figure, the worst first; of equals the first.

    Args:
        names: Of the figures.
        table: All of them.
        name: The figure that counts.
        most: How many.

    Returns:
        Numbers of images.
    """
    return _ordered(names, table, name)[:most]


def median_places(names: Sequence[str], table: Float[Tensor, "image figure"], name: str, most: int) -> list[int]:
    """Return which images are in the middle by a figure; otherwise like `worst_places`."""
    order = _ordered(names, table, name)
    start = max(0, (len(order) - most) // 2)
    return order[start : start + most]


def worst_rows(
    titles: Sequence[str], names: Sequence[str], table: Float[Tensor, "image figure"], places: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the names of images with their figures, for JSON; None stands for what is infinite."""
    return [
        {"name": titles[place], "place": place, **{key: _finite(value) for key, value in _row(names, table, place)}}
        for place in places
    ]


def figures_table(titles: Sequence[str], names: Sequence[str], table: Float[Tensor, "image figure"]) -> str:
    """Return all figures of all images as CSV with a header; bytes of a name that are no text are escaped."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["name", *names])
    for title, values in zip(titles, table.tolist(), strict=True):
        name = title.encode("utf-8", "backslashreplace").decode()
        writer.writerow([name, *(f"{value:.10g}" for value in values)])
    return buffer.getvalue()


def pair_sheet(
    pictures: Mapping[int, tuple[Image.Image, Image.Image]],
    places: Sequence[int],
    titles: Sequence[str],
    names: Sequence[str],
    table: Float[Tensor, "image figure"],
) -> Image.Image:
    """Draw photographs beside their reconstructions, with names and the first figures above.

    Args:
        pictures: Pairs by number of the image.
        places: Which to draw, at least one, in order.
        titles: Names of all images.
        names: Of the figures.
        table: All of them.

    Returns:
        An RGB image on white.
    """
    captions = []
    for place in places:
        values = dict(_row(names, table, place))
        extra = [f"{key.replace('_', '-')} {values[key]:.3f}" for key in names if "lpips" in key]
        captions.append("  ".join([titles[place].rpartition("/")[2], f"{values['psnr']:.2f} dB", *extra]))
    return side_by_side([pictures[i][0] for i in places], [pictures[i][1] for i in places], captions)


def quality_sections(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    table: Float[Tensor, "image figure"],
    sheets: Mapping[str, Image.Image],
) -> list[Section]:
    """Return the sections of a page.

    Args:
        rows: Of the result.
        names: Of the per-image figures.
        table: Those.
        sheets: Pictures with pairs, by what they show.

    Returns:
        All figures, how they are spread over the images, and the pictures.
    """
    sections = [_figures(row) for row in rows]
    for name in names:
        if name == "psnr" or "lpips" in name:
            sections += _spread(name, table[:, list(names).index(name)])
    for title, sheet in sheets.items():
        text = "Originals on the left, reconstructions on the right."
        sections.append(Section(title=title, text=text, picture=sheet, caption=f"{title}, with their figures."))
    return sections


def _figures(row: Mapping[str, Any]) -> Section:
    title = {"images": "Pairs of pictures", "latents": "Latents"}.get(row["name"], f"Sets, seen by {row['network']}")
    texts = {
        "images": "Means over all images, and the 95 % interval of each mean.",
        "latents": "What the tokens cost, without any entropy coding, and how the codebook is used.",
    }
    cells = []
    for key, value in row["figures"].items():
        ends = row.get("intervals_95", {}).get(key)
        spread = row["figures"].get(f"{key}_std")
        if not key.endswith("_std"):
            text = f"{value:.6g}" + (f"  ({ends[0]:.6g} to {ends[1]:.6g})" if ends else "")
            cells.append((str(row["labels"].get(key, key)), text + (f" ± {spread:.3g}" if spread is not None else "")))
    text = texts.get(row["name"], "The set of reconstructions compared with the set of photographs, not pair by pair.")
    return Section(title=title, text=" ".join([text, *(f"Note: {each}." for each in row["warnings"])]), rows=cells)


def _spread(name: str, column: Tensor) -> list[Section]:
    column = column[column.isfinite()]
    if not len(column):
        return []
    # torch.quantile takes 16 million numbers at most
    ordered = column.sort().values
    values = [float(ordered[round(share / 100 * (len(ordered) - 1))]) for share in range(101)]
    if name not in HIGHER_IS_BETTER:
        values.reverse()  # so that the worst is on the left everywhere
    line = [(float(share), value) for share, value in enumerate(values)]
    label = LABELS[name]
    return [
        Section(
            title=f"Spread of {label}",
            text="From the worst image on the left to the best on the right.",
            picture=line_chart({label: line}, across="per cent of the images", up=label),
            caption=f"{label} over the share of the images that are no better.",
            rows=[(f"{share} % are no better than", f"{values[share]:.6g}") for share in PERCENTILES],
        )
    ]


def _ordered(names: Sequence[str], table: Tensor, name: str) -> list[int]:
    column = table[:, list(names).index(name)]
    return (column if name in HIGHER_IS_BETTER else -column).sort(stable=True).indices.tolist()


def _row(names: Sequence[str], table: Tensor, place: int) -> list[tuple[str, float]]:
    return list(zip(names, table[place].tolist(), strict=True))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
