"""One HTML file about a reconstruction: pictures, figures and the facts of the run, readable without a network."""

import base64
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

from PIL import Image

from softvq.evaluation.metrics import compression_ratio, mean_colour_psnr, psnr, ssim
from softvq.evaluation.pictures import Pictures, as_images, as_tensor

__all__ = ["Reconstruction", "data_uri", "escaped", "facts_table", "html_page", "measure", "reconstruction_page"]

MAX_SIDE_PX = 1024  # larger pictures are shrunk, the page would grow by megabytes
LOSSLESS_PIXELS = 512 * 512  # up to here PNG, above it JPEG
PIXELATED_BELOW_PX = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """A photograph, what came back of it, and how near that is."""

    name: str
    """What to call the photograph, usually its file name."""
    original: Image.Image
    """What went into the tokenizer: cropped and resized already."""
    reconstruction: Image.Image
    """What came out, of the same size."""
    psnr: float
    """In decibels, infinite for equal pictures."""
    ssim: float
    """At most 1."""
    mean_colour_psnr: float
    """The PSNR of the photograph's mean colour, in decibels."""
    num_latent_tokens: int
    """Tokens that the photograph was encoded to."""
    latent_dim: int
    """Values of one token."""
    credit: str = ""
    """Who took the photograph and under which licence; empty where none is owed."""

    @property
    def compression_ratio(self) -> float:
        """Raw RGB bytes to the bytes of the latents in float16."""
        width, height = self.original.size
        return compression_ratio(height, width, self.num_latent_tokens, self.latent_dim)


def measure(
    originals: Pictures,
    reconstructions: Pictures,
    names: Sequence[str],
    num_latent_tokens: int,
    latent_dim: int,
    credits: Sequence[str] = (),
) -> list[Reconstruction]:
    """Compare pictures of one size with their reconstructions and return what the page needs of each.

    Args:
        originals: A batch in [-1, 1] or PIL images, all of one size from 11 px a side.
        reconstructions: As many of the same size, in the same order; values beyond [-1, 1] are clamped.
        names: One for each.
        num_latent_tokens: Tokens that each was encoded to, >= 1.
        latent_dim: Values of one token, >= 1.
        credits: One for each, or none at all.

    Returns:
        One entry for each picture.
    """
    targets, images = as_tensor(originals), as_tensor(reconstructions)
    figures = zip(
        psnr(images, targets).tolist(), ssim(images, targets).tolist(), mean_colour_psnr(targets).tolist(), strict=True
    )
    pictures = zip(as_images(originals), as_images(reconstructions), strict=True)
    return [
        Reconstruction(
            name=name,
            original=original,
            reconstruction=reconstruction,
            psnr=decibels,
            ssim=similarity,
            mean_colour_psnr=baseline,
            num_latent_tokens=num_latent_tokens,
            latent_dim=latent_dim,
            credit=credit,
        )
        for name, (original, reconstruction), (decibels, similarity, baseline), credit in zip(
            names, pictures, figures, credits or [""] * len(names), strict=True
        )
    ]


def reconstruction_page(title: str, items: Sequence[Reconstruction], facts: Mapping[str, str]) -> str:
    """Return one self-contained HTML page: no script, and nothing is fetched from anywhere.

    Args:
        title: Heading of the page.
        items: The photographs in order of appearance, at least one.
        facts: What a reader needs to get the same page again: model, machine, versions, command; in order.

    Returns:
        The text of the file; names, captions and facts are escaped, so they may come from strangers.
    """
    assert items, "no photographs"
    return html_page(
        title,
        "Each photograph was encoded to a short row of tokens and decoded from nothing else.",
        "\n".join(_tile(label, value, note) for label, value, note in _summary(items)),
        MAIN.substitute(cards="\n".join(_card(item) for item in items), facts=facts_table(facts)),
    )


def html_page(title: str, lead: str, summary: str, main: str, style: str = "") -> str:
    """Return a whole page that fetches nothing and runs no script.

    Args:
        title: Heading, not escaped yet, as is the lead.
        lead: One sentence below it.
        summary: Tiles, as HTML.
        main: What follows them, as HTML.
        style: Rules that stand behind those of all pages.

    Returns:
        The text of the file.
    """
    return PAGE.substitute(title=escaped(title), lead=escaped(lead), summary=summary, main=main, style=STYLE + style)


def _summary(items: Sequence[Reconstruction]) -> list[tuple[str, str, str]]:
    tokens = sorted({item.num_latent_tokens for item in items})
    sizes = sorted({item.num_latent_tokens * item.latent_dim * 2 for item in items})
    ratios = sorted({round(item.compression_ratio, 1) for item in items})
    pixels = {f"{item.original.width} × {item.original.height} pixels" for item in items}
    finite = [item for item in items if math.isfinite(item.psnr - item.mean_colour_psnr)]
    gain = statistics.fmean(item.psnr - item.mean_colour_psnr for item in finite) if finite else 0.0
    return [
        ("Photographs", str(len(items)), pixels.pop() if len(pixels) == 1 else "of several sizes"),
        ("Mean PSNR", _decibels(statistics.fmean(item.psnr for item in items)), f"{gain:+.1f} dB over mean colours"),
        ("Mean SSIM", f"{statistics.fmean(item.ssim for item in items):.3f}", "1 is equal"),
        ("Tokens", _range(tokens), f"{_range(sizes)} bytes in float16"),
        ("Compression", f"{_range(ratios)} : 1", "raw RGB to latents"),
    ]


def _tile(label: str, value: str, note: str) -> str:
    return f"<div><dt>{escaped(label)}</dt><dd>{escaped(value)}<small>{escaped(note)}</small></dd></div>"


def _card(item: Reconstruction) -> str:
    figures = [
        ("PSNR", _decibels(item.psnr)),
        ("mean colour", _decibels(item.mean_colour_psnr)),
        ("SSIM", f"{item.ssim:.3f}"),
        ("tokens", f"{item.num_latent_tokens} × {item.latent_dim}"),
        ("compression", f"{item.compression_ratio:.1f} : 1"),
    ]
    credit = f'<p class="credit">{escaped(item.credit)}</p>' if item.credit else ""
    return f"""<article>
<h2>{escaped(item.name)}</h2>
<div class="pair">
{_figure(item.original, "Original", f"{item.name}, the original photograph")}
{_figure(item.reconstruction, "Reconstruction", f"{item.name}, reconstructed from {item.num_latent_tokens} tokens")}
</div>
<dl class="figures">{"".join(f"<div><dt>{escaped(k)}</dt><dd>{escaped(v)}</dd></div>" for k, v in figures)}</dl>
{credit}</article>"""


def _figure(picture: Image.Image, caption: str, alternative: str) -> str:
    width, height = picture.size
    look = ' class="pixels"' if width < PIXELATED_BELOW_PX else ""
    return (
        f'<figure><img{look} src="{data_uri(picture)}" width="{width}" height="{height}" alt="{escaped(alternative)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def data_uri(picture: Image.Image, lossless_pixels: int = LOSSLESS_PIXELS) -> str:
    """Return a picture as the address of an image that needs no file: PNG up to so many pixels, JPEG above."""
    picture = picture.convert("RGB")
    picture.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    lossless = picture.width * picture.height <= lossless_pixels
    buffer = io.BytesIO()
    if lossless:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def facts_table(facts: Mapping[str, str]) -> str:
    """Return what a reader needs to get a page again, as a table under a heading; nothing where there are no facts."""
    rows = "\n".join(f'<tr><th scope="row">{escaped(k)}</th><td>{escaped(v)}</td></tr>' for k, v in facts.items())
    return f"<h2>How this page was made</h2>\n<table>\n{rows}\n</table>" if rows else ""


def escaped(text: str) -> str:
    """Return text that is nothing but text on a page, whoever wrote it."""
    # A file name may hold bytes that are no text; they must not make the page impossible to write.
    return html.escape(text.encode("utf-8", "replace").decode())


def _decibels(value: float) -> str:
    return "infinite" if value == math.inf else f"{value:.1f} dB"


def _range(values: Sequence[int] | Sequence[float]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --line: #e2e2de; --ink: #1b1b1d; --faint: #5f5f66; --accent: #0a5f73;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #141416; --card: #1e1e21; --line: #323237; --ink: #ececee; --faint: #a2a2aa; --accent: #6cc6da; }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0 0 .25rem; font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 3rem 0 1rem; font-size: 1.2rem; }
.lead { margin: 0 0 2rem; max-width: 50rem; color: var(--faint); }
dl, dd, figure { margin: 0; }
dt, small, figcaption, .credit { color: var(--faint); font-size: .8125rem; }
.summary { display: flex; flex-wrap: wrap; gap: 1px; margin-bottom: 2rem;
  overflow: hidden; border: 1px solid var(--line); border-radius: 12px; background: var(--line); }
.summary div { flex: 1 1 10rem; padding: 1rem 1.25rem; background: var(--card); }
.summary dd { font-size: 1.5rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.summary small { display: block; font-weight: 400; }
.cards { display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
article { padding: 1rem; border: 1px solid var(--line); border-radius: 12px; background: var(--card); }
article h2 { margin: 0 0 .6rem; font-size: .9375rem; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--line); }
img.pixels { image-rendering: pixelated; }
figcaption { margin-top: .25rem; }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; margin-top: .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
.figures dd { font-weight: 600; font-size: .9375rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures div:first-child dd { color: var(--accent); }
.credit { margin: .6rem 0 0; overflow-wrap: anywhere; }
table { width: 100%; border-collapse: collapse; border-top: 1px solid var(--line); font-size: .875rem; }
th, td { padding: .5rem 1rem .5rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { width: min(12rem, 30%); color: var(--faint); font-weight: 500; }
td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
@media print { article { break-inside: avoid; } }
"""
"""The style sheet of all pages."""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="lead">$lead</p>
</header>
<main>
<dl class="summary">
$summary
</dl>
$main
</main>
</body>
</html>
""")

MAIN = Template("""<section class="cards" aria-label="Photographs and their reconstructions">
$cards
</section>
<h2>How to read the figures</h2>
<p class="lead">PSNR is the mean squared error in decibels, higher is nearer; beside it stands what the photograph's
mean colour alone would reach. SSIM compares local structure, 1 is equal. Compression is the bytes of raw RGB to the
bytes of the tokens in float16.</p>
$facts""")
