"""Pictures made of pictures: originals beside their reconstructions, and plain grids."""

import itertools
import math
import unicodedata
from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from softvq.data.images import to_image, to_tensor

__all__ = ["Pictures", "as_images", "as_tensor", "grid", "side_by_side"]

Pictures = Float[Tensor, "_ 3 _ _"] | Sequence[Image.Image]

PAPER = "#ffffff"
INK = "#1c1c1e"
FAINT_INK = "#6e6e73"
MARGIN_PX = 16
GAP_PX = 4  # between a photograph and its reconstruction
FONT_PX = 13
LINE_PX = 20
MIN_PICTURE_PX = 96  # the width that the word "reconstruction" needs
MAX_COLUMNS_OF_PAIRS = 3


def side_by_side(
    originals: Pictures, reconstructions: Pictures, captions: Sequence[str] = (), columns: int | None = None
) -> Image.Image:
    """Draw every original with its reconstruction to the right of it and a caption above.

    Args:
        originals: A batch in [-1, 1] or PIL images, at least one; those narrower than 96 px are shown enlarged.
        reconstructions: As many.
        captions: One line for each pair, cut short where it is wider than the pair; none at all leaves out the lines.
        columns: Pairs in a row, >= 1; None chooses at most 3, so that the whole is about as wide as high.

    Returns:
        An RGB image on white.
    """
    left, right = as_images(originals), as_images(reconstructions)
    assert len(left) == len(right), f"{len(left)} originals and {len(right)} reconstructions"
    assert len(captions) in (0, len(left)), f"{len(captions)} captions for {len(left)} pairs"
    if columns is None:
        columns = max(1, min(MAX_COLUMNS_OF_PAIRS, round(math.sqrt(len(left) / 2))))
    cells = [
        _cell([_enlarged(a), _enlarged(b)], ["original", "reconstruction"], caption)
        for a, b, caption in itertools.zip_longest(left, right, captions)
    ]
    return _arranged(cells, columns)


def grid(images: Pictures, columns: int, captions: Sequence[str] = ()) -> Image.Image:
    """Lay pictures out in rows, left to right.

    Args:
        images: A batch in [-1, 1] or PIL images, at least one; sizes may differ.
        columns: Pictures in a row, >= 1.
        captions: One line below each picture, cut short where it is wider; none at all leaves out the lines.

    Returns:
        An RGB image on white.
    """
    pictures = as_images(images)
    assert len(captions) in (0, len(pictures)), f"{len(captions)} captions for {len(pictures)} pictures"
    labels = [[caption] for caption in captions] or [[]] * len(pictures)
    return _arranged([_cell([picture], label) for picture, label in zip(pictures, labels, strict=True)], columns)


def as_images(pictures: Pictures) -> list[Image.Image]:
    """Return a batch in [-1, 1], or PIL images of any mode, as a list of RGB images."""
    if isinstance(pictures, Tensor):
        return [to_image(picture) for picture in pictures]
    return [picture.convert("RGB") for picture in pictures]


def as_tensor(pictures: Pictures) -> Float[Tensor, "batch 3 height width"]:
    """Return a batch as it is, or PIL images of one size as a batch in [-1, 1]."""
    return pictures if isinstance(pictures, Tensor) else torch.stack([to_tensor(picture) for picture in pictures])


def _cell(pictures: Sequence[Image.Image], labels: Sequence[str], title: str | None = None) -> Image.Image:
    """Put pictures in a row, the title above the row and a label below each."""
    top = LINE_PX if title is not None else 0
    height = max(picture.height for picture in pictures)
    width = sum(picture.width for picture in pictures) + GAP_PX * (len(pictures) - 1)
    cell = Image.new("RGB", (width, top + height + (LINE_PX if labels else 0)), PAPER)
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(FONT_PX)
    if title is not None:
        draw.text((0, 0), _fitted(title, font, width), fill=INK, font=font)
    left = 0
    for picture, label in zip(pictures, labels or [""] * len(pictures), strict=True):
        cell.paste(picture, (left, top))
        draw.text((left, top + height + 2), _fitted(label, font, picture.width), fill=FAINT_INK, font=font)
        left += picture.width + GAP_PX
    return cell


def _arranged(cells: Sequence[Image.Image], columns: int) -> Image.Image:
    assert cells, "no pictures"
    assert columns >= 1, f"{columns} columns"
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    widths = [max(cell.width for cell in cells[column::columns]) for column in range(min(columns, len(cells)))]
    heights = [max(cell.height for cell in row) for row in rows]
    size = tuple(sum(lengths) + MARGIN_PX * (len(lengths) + 1) for lengths in (widths, heights))
    sheet = Image.new("RGB", (size[0], size[1]), PAPER)
    top = MARGIN_PX
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN_PX
        for cell, width in zip(row, widths, strict=False):
            sheet.paste(cell, (left, top))
            left += width + MARGIN_PX
        top += height + MARGIN_PX
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = math.ceil(MIN_PICTURE_PX / picture.width)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _fitted(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    # The font inside Pillow has no accents and no other scripts, and would draw a box for each.
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    text = " ".join("".join(letter if letter.isascii() or letter == "·" else "?" for letter in letters).split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""
