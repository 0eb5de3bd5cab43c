"""Lines and points with error bars, drawn with Pillow, as the project's reports are."""

import dataclasses
import math
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from softvq.evaluation.charts import COLOURS, FAINT, INK, LINE, PAPER, round_ticks, widened

__all__ = ["Point", "plot"]

SCALE = 2  # drawn larger and shrunk, since Pillow's lines have no soft edges
WIDTH, HEIGHT = 960, 480
LEFT, RIGHT, TOP, BOTTOM = 90, 24, 66, 58
LEGEND_PX, FONT_PX, ROW_PX, LETTER_PX = 210, 14, 17, 7.5
Numbers = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A mean with what it may be off by."""

    x: float
    """Where it stands."""
    y: float
    """The mean."""
    half: float | None = None
    """Half the width of its interval; None where there is none."""


def plot(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    across: str,
    up: str,
    names: Sequence[str] = (),
    ticks: Sequence[float] = (),
    log_x: bool = False,
) -> Image.Image:
    """Draw the points of each line with error bars, and the line where x is a number.

    Args:
        series: Points by the line's name, which the legend shows where there are several.
        title: Above the picture.
        across: What x is, with its unit.
        up: What y is, with its unit.
        names: Of the places 0, 1, ... on x, where it is no number.
        ticks: Numbers of x to label; none are round ones.
        log_x: Space x by its logarithm; all x are above 0 then.

    Returns:
        An RGB image on white.
    """
    drawn = _Drawn(series, legend=len(series) > 1, log_x=log_x, names=names)
    drawn.frame(title, across, up, ticks)
    for number, points in enumerate(series.values()):
        # beside each other, or equal names would hide one another's bars
        aside = 0.1 * (number - (len(series) - 1) / 2) if names else 0.0
        drawn.line(points, COLOURS[number % len(COLOURS)], aside, joined=not names)
    if len(series) > 1:
        drawn.legend(list(series))
    return drawn.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Drawn:
    def __init__(
        self, series: Mapping[str, Sequence[Point]], *, legend: bool, log_x: bool, names: Sequence[str]
    ) -> None:
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(FONT_PX * SCALE)
        self.right = WIDTH - RIGHT - (LEGEND_PX if legend else 0)
        self.log_x = log_x
        letters = int((self.right - LEFT) / max(1, len(names)) / LETTER_PX)
        self.names = [textwrap.wrap(_plain(name), max(4, letters), break_long_words=False) for name in names]
        self.bottom = BOTTOM + ROW_PX * (max(map(len, self.names), default=1) - 1)
        points = [point for line in series.values() for point in line]
        xs = [self.placed(point.x) for point in points]
        self.across = (-0.5, len(names) - 0.5) if names else widened((min(xs), max(xs)), 0.03)
        lows, highs = ([point.y + sign * (point.half or 0.0) for point in points] for sign in (-1, 1))
        self.up = widened((min(lows), max(highs)), 0.06)

    def placed(self, x: float) -> float:
        return math.log10(x) if self.log_x else x

    def at(self, x: float, y: float) -> Numbers:
        right = (x - self.across[0]) / (self.across[1] - self.across[0])
        above = (y - self.up[0]) / (self.up[1] - self.up[0])
        across = LEFT + right * (self.right - LEFT)
        return across * SCALE, (HEIGHT - self.bottom - above * (HEIGHT - TOP - self.bottom)) * SCALE

    def text(self, place: Numbers, words: str, colour: str, anchor: str) -> None:
        self.draw.text((place[0] * SCALE, place[1] * SCALE), _plain(words), colour, self.font, anchor=anchor)

    def frame(self, title: str, across: str, up: str, ticks: Sequence[float]) -> None:
        for y in round_ticks(self.up):
            left, height = self.at(self.across[0], y)
            self.draw.line([(left, height), (self.right * SCALE, height)], fill=LINE, width=SCALE)
            self.draw.text((left - 8 * SCALE, height), f"{y:.6g}", FAINT, self.font, anchor="rm")
        places = [(float(number), rows) for number, rows in enumerate(self.names)]
        for x, rows in places or [(self.placed(x), [f"{x:.6g}"]) for x in ticks or self.numbers()]:
            place, low = self.at(x, self.up[0])
            self.draw.line([(place, low), (place, low + 4 * SCALE)], fill=FAINT, width=SCALE)
            for row, words in enumerate(rows):
                self.text((place / SCALE, low / SCALE + 6 + ROW_PX * row), words, FAINT, "ma")
        self.text((LEFT, 10), title, INK, "la")
        self.text((LEFT, 38), up, FAINT, "la")
        self.text((self.right, HEIGHT - 6), across, FAINT, "rd")

    def numbers(self) -> list[float]:
        """Return the labelled numbers of x."""
        if not self.log_x:
            return round_ticks(self.across)
        low, high = self.across
        decades = range(math.floor(low), math.ceil(high) + 1)
        factors = (1, 2, 5) if high - low < 2.5 else (1, 3)
        return [f * 10.0**decade for decade in decades for f in factors if low <= math.log10(f * 10.0**decade) <= high]

    def line(self, points: Sequence[Point], colour: str, aside: float, *, joined: bool) -> None:
        middles = [self.at(self.placed(point.x) + aside, point.y) for point in points]
        if joined and len(middles) > 1:
            self.draw.line(middles, fill=colour, width=2 * SCALE, joint="curve")
        for point, (x, y) in zip(points, middles, strict=True):
            radius, cap = 4 * SCALE, 5 * SCALE
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            if point.half is None:
                continue
            ends = [self.at(0.0, point.y + sign * point.half)[1] for sign in (-1, 1)]
            self.draw.line([(x, ends[0]), (x, ends[1])], fill=colour, width=2 * SCALE)
            for end in ends:
                self.draw.line([(x - cap, end), (x + cap, end)], fill=colour, width=2 * SCALE)

    def legend(self, names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            top = TOP + 22 * number
            left = self.right + 18
            box = (left * SCALE, (top + 4) * SCALE, (left + 12) * SCALE, (top + 12) * SCALE)
            self.draw.rectangle(box, fill=COLOURS[number % len(COLOURS)])
            self.text((left + 20, top), name, INK, "la")


def _plain(words: str) -> str:
    # the font that comes with Pillow has no accents
    return unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
