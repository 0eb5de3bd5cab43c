"""Charts for reports, drawn with Pillow."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from softvq.evaluation.pictures import grid

__all__ = ["bar_chart", "heat_map", "line_chart", "photo_map", "round_ticks", "strips", "widened"]

PAPER, INK, FAINT, LINE = "#ffffff", "#1c1c1e", "#6e6e73", "#e2e2de"
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4f24", "#5f5f66", "#8338ec", "#9ac926",
    "#c1121f", "#006d77",
)  # fmt: skip
WIDTH, HEIGHT = 880, 380
LEFT, RIGHT, TOP, BOTTOM = 76, 20, 34, 44
TICKS = 5
FONT_PX = 13
MAP_PX, THUMBNAIL_PX, MOST_THUMBNAILS = 960, 44, 240


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    across: str,
    up: str,
    points: bool = False,
    within: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw lines.

    Args:
        series: Points of each line from left to right, by the line's name; all finite.
        across: What the horizontal axis counts.
        up: What the vertical axis counts.
        points: Mark each of the points.
        within: Ends of the vertical axis; None takes those of the values.

    Returns:
        An RGB image on white.
    """
    xs = [x for line in series.values() for x, _ in line]
    ys = [y for line in series.values() for _, y in line]
    plot = _Plot((min(xs), max(xs)), within or (min(ys), max(ys)), across, up)
    for number, line in enumerate(series.values()):
        colour = COLOURS[number % len(COLOURS)]
        places = [plot.at(x, y) for x, y in line]
        plot.draw.line(places, fill=colour, width=3, joint="curve")
        for x, y in places if points or len(places) == 1 else []:
            plot.draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    plot.legend(list(series))
    return plot.image


def bar_chart(
    names: Sequence[str], values: Sequence[float], ends: Sequence[tuple[float, float]], *, across: str, up: str
) -> Image.Image:
    """Draw a bar for each value, from 0, with a thin line between two ends.

    Args:
        names: Below the bars, if there is room for them; numbers where this is empty.
        values: Heights.
        ends: Lower and upper end of each thin line, such as an interval.
        across: What the bars are.
        up: What their height is.

    Returns:
        An RGB image on white.
    """
    lows, highs = [low for low, _ in ends], [high for _, high in ends]
    plot = _Plot(
        (-0.5, len(values) - 0.5), (min(0.0, *lows, *values), max(0.0, *highs, *values)), across, up, not names
    )
    for number, (value, (low, high)) in enumerate(zip(values, ends, strict=True)):
        place = float(number)
        (left, top), (right, bottom) = plot.at(place - 0.35, max(value, 0.0)), plot.at(place + 0.35, min(value, 0.0))
        plot.draw.rectangle((left, top, max(right, left + 1), bottom), fill=COLOURS[0])
        plot.draw.line([plot.at(place, low), plot.at(place, high)], fill=INK, width=2)
        if names:
            plot.draw.text((plot.at(place, 0.0)[0], HEIGHT - BOTTOM + 5), names[number], FAINT, _font(), anchor="ma")
    return plot.image


def heat_map(matrix: Float[Tensor, "row column"]) -> Image.Image:
    """Draw a matrix of values in [-1, 1]: blue below 0, white at 0, red above."""
    values = matrix.double().clamp(-1, 1)
    low, high = torch.tensor([0.0, 114, 178]), torch.tensor([193.0, 18, 31])
    ends = torch.where(values[..., None] < 0, low, high).double()
    pixels = (255 + values.abs()[..., None] * (ends - 255)).round().to(torch.uint8)
    side = max(1, 640 // max(matrix.shape))
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((picture.width * side, picture.height * side), Image.Resampling.NEAREST)


def strips(images: Float[Tensor, "row column 3 height width"], captions: Sequence[str]) -> Image.Image:
    """Lay images out in rows, with the same captions below each row.

    Args:
        images: In [-1, 1].
        captions: One for each column.

    Returns:
        An RGB image on white.
    """
    flat = images.flatten(0, 1).float()
    small = 128 / max(flat.shape[2:])
    if small < 1:
        size = [max(1, round(side * small)) for side in flat.shape[2:]]
        flat = torch.nn.functional.interpolate(flat, size=size, mode="bilinear", antialias=True)
    elif small >= 2:
        flat = flat.repeat_interleave(int(small), 2).repeat_interleave(int(small), 3)
    return grid(flat, images.shape[1], list(captions) * len(images))


def photo_map(
    places: Float[Tensor, "image 2"], pictures: Sequence[Image.Image], labels: Int64[Tensor, " image"]
) -> Image.Image:
    """Place photographs where they are in two dimensions: some as small pictures, the others as dots below them.

    Args:
        places: Coordinates.
        pictures: One for each.
        labels: Classes, which frames and dots are coloured by; -1 for none.

    Returns:
        An RGB image on white, with the second coordinate growing upwards.
    """
    low, high = places.double().amin(0), places.double().amax(0)
    unit = (places.double() - low) / torch.where(high > low, high - low, 1.0)
    unit[:, 1] = 1 - unit[:, 1]
    spots = (unit * (MAP_PX - THUMBNAIL_PX - 8) + THUMBNAIL_PX / 2 + 4).round().long().tolist()
    colours = [COLOURS[label % len(COLOURS)] if label >= 0 else FAINT for label in labels.tolist()]
    image = Image.new("RGB", (MAP_PX, MAP_PX), PAPER)
    draw = ImageDraw.Draw(image)
    for (x, y), colour in zip(spots, colours, strict=True):
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    step = -(-len(spots) // MOST_THUMBNAILS)
    for number in range(0, len(spots), step):
        small = pictures[number].convert("RGB").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
        left, top = (side - THUMBNAIL_PX // 2 for side in spots[number])
        box = (left - 3, top - 3, left + THUMBNAIL_PX + 2, top + THUMBNAIL_PX + 2)
        draw.rectangle(box, fill=colours[number])
        image.paste(small, (left, top))
    return image


class _Plot:
    """Axes with ticks, and where on them a point is."""

    def __init__(
        self, across: tuple[float, float], up: tuple[float, float], across_name: str, up_name: str, ticks: bool = True
    ) -> None:
        self.image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.across, self.up = widened(across, 0.0), widened(up, 0.04)
        for y in round_ticks(self.up):
            _, height = self.at(self.across[0], y)
            self.draw.line([(LEFT, height), (WIDTH - RIGHT, height)], fill=LINE)
            self.draw.text((LEFT - 8, height), f"{y:.6g}", FAINT, _font(), anchor="rm")
        for x in round_ticks(self.across) if ticks else []:
            self.draw.text((self.at(x, self.up[0])[0], HEIGHT - BOTTOM + 5), f"{x:.6g}", FAINT, _font(), anchor="ma")
        self.draw.text((LEFT, 8), up_name, INK, _font())
        self.draw.text((WIDTH - RIGHT, HEIGHT - 4), across_name, INK, _font(), anchor="rd")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return pixels from the left and from the top."""
        right = (x - self.across[0]) / (self.across[1] - self.across[0])
        above = (y - self.up[0]) / (self.up[1] - self.up[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - above * (HEIGHT - TOP - BOTTOM)

    def legend(self, names: Sequence[str]) -> None:
        """Name the lines, from right to left."""
        right: float = WIDTH - RIGHT
        for number, name in reversed(list(enumerate(names))):
            self.draw.text((right, 8), name, INK, _font(), anchor="ra")
            right -= _font().getlength(name) + 16
            self.draw.rectangle((right, 12, right + 10, 18), fill=COLOURS[number % len(COLOURS)])
            right -= 16


def round_ticks(ends: tuple[float, float]) -> list[float]:
    """Return round numbers between two ends, about as many as TICKS."""
    rough = (ends[1] - ends[0]) / TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * next(factor for factor in (1, 2, 5, 10) if factor * size >= rough * (1 - 1e-9))
    found = [step * i for i in range(math.ceil(ends[0] / step - 1e-9), math.floor(ends[1] / step + 1e-9) + 1)]
    return [0.0 if abs(value) < step / 2 else value for value in found]  # else a minus may stand before the 0


def widened(ends: tuple[float, float], share: float) -> tuple[float, float]:
    """Return two ends with a share of their distance beyond each, or 0.5 where they are one."""
    low, high = ends
    if not high > low:
        return low - 0.5, low + 0.5
    return low - share * (high - low), high + share * (high - low)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_PX)
