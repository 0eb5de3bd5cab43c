"""What a tokenizer does, part by part, and a page of it: fewer tokens, between two photographs, what tokens paint."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.evaluation.attribution import owner_picture, token_attribution, token_maps
from softvq.evaluation.metrics import compression_ratio, psnr
from softvq.evaluation.page import data_uri, escaped, facts_table, html_page
from softvq.evaluation.pictures import Pictures, as_images, grid
from softvq.losses.perceptual import PerceptualDistance
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = [
    "DemoParts",
    "FewerTokens",
    "Samples",
    "TokenPictures",
    "demo_page",
    "demo_pictures",
    "fewer_tokens",
    "interpolated",
    "token_pictures",
]

MAP_PX = 96
MAP_COLUMNS = 8
INTERPOLATED = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class FewerTokens:
    """A photograph and what comes back of it from its first tokens."""

    name: str
    """What to call the photograph."""
    credit: str
    """Who took it and under which licence; empty where none is owed."""
    original: Image.Image
    """What went into the tokenizer."""
    copies: Mapping[int, Image.Image]
    """Reconstructions by the number of tokens, fewest first."""
    psnr: Mapping[int, float]
    """Of each, in decibels."""
    distance: Mapping[int, float]
    """ST-LPIPS of each; empty where its weights are not installed."""
    compression: Mapping[int, float]
    """Raw RGB bytes to the bytes of so many tokens in float16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPictures:
    """What the tokens of one photograph paint."""

    name: str
    """What to call the photograph."""
    original: Image.Image
    """The photograph."""
    copy: Image.Image
    """Its reconstruction from all tokens."""
    owners: Image.Image
    """Each pixel in the colour of the token that changes it most."""
    maps: Sequence[Image.Image]
    """A heat map for each token, in its colour."""
    shares: Sequence[float]
    """Of the pixels, those that each token changes most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Images from a generator, as many for each class."""

    classes: Sequence[str]
    """Names of the rows."""
    images: Float[Tensor, "image 3 height width"]
    """In [-1, 1], row by row."""
    seconds: float
    """For one image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoParts:
    """Everything the page shows."""

    photographs: Sequence[FewerTokens]
    """At least one, all reconstructed from the same numbers of tokens."""
    ends: tuple[str, str]
    """Names of the photographs between which latents are interpolated."""
    between: Float[Tensor, "step 3 height width"]
    """What is on the way, with both ends, in [-1, 1]."""
    tokens: TokenPictures
    """Of one photograph."""
    samples: Samples | None = None
    """Nothing where there is no generator."""


@torch.inference_mode()
def fewer_tokens(
    tokenizer: ImageTokenizer,
    images: Float[Tensor, "batch 3 height width"],
    latents: Float[Tensor, "batch token dim"],
    names: Sequence[str],
    credits: Sequence[str],
    distance: PerceptualDistance | None,
) -> list[FewerTokens]:
    """Reconstruct photographs from a quarter of their tokens, half and all, where the tokenizer can.

    Args:
        tokenizer: In evaluation mode.
        images: Photographs in [-1, 1] of the tokenizer's own size, on its device.
        latents: What it encoded them to.
        names: One for each.
        credits: One for each, maybe empty.
        distance: ST-LPIPS, on the same device; None leaves it out.

    Returns:
        One entry for each photograph.
    """
    config = tokenizer.config
    fewest = config.min_latent_tokens or config.num_latent_tokens
    counts = sorted({n for n in (config.num_latent_tokens // part for part in (1, 2, 4)) if n >= fewest})
    copies = torch.stack([tokenizer.decode(latents[:, :n]).clamp(-1, 1) for n in counts], dim=1)
    height, width = images.shape[2:]
    compression = {n: compression_ratio(height, width, n, config.latent_dim) for n in counts}
    found = []
    for name, credit, image, of_image in zip(names, credits, images, copies, strict=True):
        decibels = psnr(of_image, image.expand_as(of_image)).tolist()
        distances = [] if distance is None else distance(of_image, image[None]).tolist()
        found.append(
            FewerTokens(
                name=name,
                credit=credit,
                original=as_images(image[None].cpu())[0],
                copies=dict(zip(counts, as_images(of_image.cpu()), strict=True)),
                psnr=dict(zip(counts, decibels, strict=True)),
                distance=dict(zip(counts, distances, strict=False)),
                compression=compression,
            )
        )
    return found


@torch.inference_mode()
def interpolated(
    tokenizer: ImageTokenizer, first: Float[Tensor, "token dim"], last: Float[Tensor, "token dim"]
) -> Float[Tensor, "step 3 height width"]:
    """Decode even steps on the straight line between two images' latents, both ends included.

    Args:
        tokenizer: In evaluation mode.
        first: Normalised latents of the image to start at.
        last: Those of the image to end at.

    Returns:
        Seven images in [-1, 1], on the CPU.
    """
    shares = torch.linspace(0, 1, INTERPOLATED, device=first.device)[:, None, None]
    return tokenizer.decode((1 - shares) * first + shares * last).float().clamp(-1, 1).cpu()


def token_pictures(
    tokenizer: ImageTokenizer, photograph: FewerTokens, latents: Float[Tensor, "batch token dim"], place: int
) -> TokenPictures:
    """Draw what each token of a photograph paints, by putting one after another to its mean.

    Args:
        tokenizer: In evaluation mode.
        photograph: The one at `place`.
        latents: Of several photographs, over which the mean is taken.
        place: Which of them to draw.

    Returns:
        Its pictures.
    """
    changes = token_attribution(tokenizer, latents[place : place + 1], latents.mean(0))[0]
    owners = changes.max(0)
    counted = torch.bincount(owners.indices[owners.values > 0], minlength=len(changes))
    return TokenPictures(
        name=photograph.name,
        original=photograph.original,
        copy=photograph.copies[max(photograph.copies)],
        owners=owner_picture(changes),
        maps=token_maps(changes),
        shares=(counted / owners.indices.numel()).tolist(),
    )


def demo_pictures(parts: DemoParts) -> dict[str, Image.Image]:
    """Return the pictures of the demo by their file names.

    Args:
        parts: What was computed.

    Returns:
        RGB images on white; `samples.png` only where there are samples.
    """
    pictures, captions = [], []
    for item in parts.photographs:
        pictures += [item.original, *item.copies.values()]
        captions += [item.name, *(f"{n} tokens · {item.psnr[n]:.1f} dB" for n in item.copies)]
    columns = (2 if len(parts.photographs) > 1 else 1) * (1 + len(parts.photographs[0].copies))
    found = {
        "reconstructions.png": grid(pictures, columns, captions),
        "interpolation.png": grid(parts.between, len(parts.between), _steps(parts)),
        "tokens.png": _tokens_picture(parts.tokens),
    }
    if parts.samples is not None:
        each = len(parts.samples.images) // len(parts.samples.classes)
        captions = [name for name in parts.samples.classes for _ in range(each)]
        found["samples.png"] = grid(parts.samples.images, each, captions)
    return found


def demo_page(title: str, parts: DemoParts, facts: Mapping[str, str]) -> str:
    """Return one self-contained HTML page: no script, and nothing is fetched from anywhere.

    Args:
        title: Heading of the page.
        parts: What it shows.
        facts: What a reader needs to get the same page again, in order.

    Returns:
        The text of the file; names, credits and facts are escaped, so they may come from strangers.
    """
    sections = [_fewer_section(parts), _between_section(parts), _tokens_section(parts.tokens)]
    if parts.samples is not None:
        sections.append(_samples_section(parts.samples))
    sections.append(facts_table(facts))
    lead = "A trained tokenizer turns each photograph into a short row of tokens and paints it again from nothing else."
    tiles = "\n".join(f"<div><dt>{k}</dt><dd>{v}<small>{note}</small></dd></div>" for k, v, note in _summary(parts))
    return html_page(title, lead, tiles, "\n".join(sections), DEMO_STYLE)


def _summary(parts: DemoParts) -> list[tuple[str, str, str]]:
    counts = list(parts.photographs[0].copies)
    found = [("Photographs", str(len(parts.photographs)), "held out, bundled with softvq")]
    items = parts.photographs
    for n in counts:
        note = f"{items[0].compression[n]:.0f} : 1, {statistics.fmean(item.psnr[n] for item in items):.1f} dB"
        if all(item.distance for item in items):
            note += f", ST-LPIPS {statistics.fmean(item.distance[n] for item in items):.3f}"
        found.append(("Tokens", str(n), note))
    if parts.samples is not None:
        found.append(("A new image", f"{parts.samples.seconds:.1f} s", "from the bundled generator"))
    return found


def _fewer_section(parts: DemoParts) -> str:
    counts = [str(n) for n in parts.photographs[0].copies]
    listed = f"{', '.join(counts[:-1])} and {counts[-1]}" if len(counts) > 1 else counts[0]
    measured = any(item.distance for item in parts.photographs)
    nested = "It learned to paint from its first tokens alone, so the rest may be dropped without encoding again. "
    lower = " ST-LPIPS compares what a vision network sees; lower is nearer." if measured else ""
    cards = "\n".join(_card(item) for item in parts.photographs)
    return _section(
        f"The same photograph from {listed} tokens",
        f"{nested if len(counts) > 1 else ''}PSNR is the mean squared error in decibels; higher is nearer.{lower} "
        "Compression is the bytes of raw RGB, in the size shown here, to those of the tokens in float16; a photograph "
        "that was enlarged to this size had fewer to begin with.",
        f'<div class="rows">\n{cards}\n</div>',
    )


def _card(item: FewerTokens) -> str:
    figures = [_figure(item.original, f"{item.name}, the original photograph", "Original")]
    for n, copy in item.copies.items():
        lines = [f"{n} tokens, {item.compression[n]:.0f} : 1", f"PSNR {item.psnr[n]:.1f} dB"]
        lines += [f"ST-LPIPS {item.distance[n]:.3f}"] if item.distance else []
        figures.append(_figure(copy, f"{item.name}, reconstructed from {n} tokens", "\n".join(lines)))
    credit = f'<p class="credit">{escaped(item.credit)}</p>' if item.credit else ""
    return f'<article>\n<h2>{escaped(item.name)}</h2>\n<div class="four">{"".join(figures)}</div>\n{credit}</article>'


def _between_section(parts: DemoParts) -> str:
    images = as_images(parts.between)
    figures = [
        _figure(image, f"Decoded latents, {step}", step) for image, step in zip(images, _steps(parts), strict=True)
    ]
    return _section(
        "Between two photographs",
        f"Latents at even steps on the straight line from {parts.ends[0]} to {parts.ends[1]}, decoded. The ends are "
        "reconstructions.",
        f'<div class="strip">{"".join(figures)}</div>',
    )


def _tokens_section(tokens: TokenPictures) -> str:
    first = [
        _figure(tokens.original, f"{tokens.name}, the original photograph", "Original"),
        _figure(tokens.copy, f"{tokens.name}, reconstructed from all tokens", "From all tokens"),
        _figure(tokens.owners, "Each pixel in the colour of one token", "Which token changes a pixel most"),
    ]
    maps = [
        _figure(picture, f"Where token {i} changes {tokens.name}", f"{i}: {100 * share:.1f} %")
        for i, (picture, share) in enumerate(zip(_small(tokens.maps), tokens.shares, strict=True), 1)
    ]
    return _section(
        "What each token paints",
        f"One token of {tokens.name} after another was replaced by its mean over the photographs of this page, and the "
        "change of every pixel measured. A map is bright, in the colour of its token, where that token changes the "
        "picture; below it stands how many of the pixels no other token changes more.",
        f'<div class="three">{"".join(first)}</div>\n<div class="maps">{"".join(maps)}</div>',
    )


def _samples_section(samples: Samples) -> str:
    each = len(samples.images) // len(samples.classes)
    images = as_images(samples.images)
    rows = [
        f"<article>\n<h2>{escaped(name)}</h2>\n"
        f'<div class="four">{"".join(_figure(image, f"A new image of class {name}") for image in images[:each])}</div>'
        "\n</article>"
        for name, images in ((name, images[i * each :]) for i, name in enumerate(samples.classes))
    ]
    return _section(
        "New images",
        "A generator made these from noise, as latents of the tokenizer that then painted them; a row for each class, "
        f"{samples.seconds:.1f} s an image.",
        f'<div class="rows">\n{"".join(rows)}\n</div>',
    )


def _section(title: str, text: str, content: str) -> str:
    return f'<section>\n<h2>{escaped(title)}</h2>\n<p class="lead">{escaped(text)}</p>\n{content}\n</section>'


def _figure(picture: Image.Image, alternative: str, caption: str = "") -> str:
    width, height = picture.size
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    # About a hundred pictures: as PNG the page would have ten megabytes. The files beside it are lossless.
    source = data_uri(picture, lossless_pixels=0)
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{escaped(alternative)}">'
    return f"<figure>{image}{below}</figure>"


def _steps(parts: DemoParts) -> list[str]:
    last = len(parts.between) - 1
    return [f"{100 * i / last:.0f} %" for i in range(last + 1)]


def _tokens_picture(tokens: TokenPictures) -> Image.Image:
    captions = ["original", "from all tokens", "which token changes a pixel most"]
    above = grid([tokens.original, tokens.copy, tokens.owners], 3, captions)
    names = [f"{i}: {100 * share:.1f} %" for i, share in enumerate(tokens.shares, 1)]
    below = grid(_small(tokens.maps), MAP_COLUMNS, names)
    sheet = Image.new("RGB", (max(above.width, below.width), above.height + below.height), "#ffffff")
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    return sheet


def _small(pictures: Pictures) -> list[Image.Image]:
    return [picture.resize((MAP_PX, MAP_PX), Image.Resampling.BILINEAR) for picture in as_images(pictures)]


DEMO_STYLE = """
section .lead { margin-bottom: 1rem; }
.rows { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 36rem), 1fr)); }
.four, .three, .strip, .maps { display: grid; gap: .5rem; }
.four { grid-template-columns: repeat(4, 1fr); }
.three { grid-template-columns: repeat(3, 1fr); max-width: 50rem; margin-bottom: 1rem; }
.strip { grid-template-columns: repeat(7, 1fr); }
.maps { grid-template-columns: repeat(16, 1fr); }
.maps figcaption { margin-top: 0; font-size: .75rem; font-variant-numeric: tabular-nums; }
.four figcaption { white-space: pre-line; font-variant-numeric: tabular-nums; }
@media (max-width: 70rem) { .maps { grid-template-columns: repeat(8, 1fr); } }
@media (max-width: 40rem) {
  .four { grid-template-columns: repeat(2, 1fr); }
  .strip, .maps { grid-template-columns: repeat(4, 1fr); }
}
"""
