"""The page of `softvq evaluate probe`: how well classes are told from the features of one model or of several."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int64
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from softvq.evaluation.charts import FAINT, INK, PAPER, bar_chart, heat_map, line_chart
from softvq.evaluation.probing import ProbeResult, Score
from softvq.evaluation.report import Section, report_page

__all__ = ["Probed", "confusion_picture", "probe_page"]

MOST_NAMES = 40
"""Classes whose names fit beside a confusion matrix."""
NAME_PX, FONT_PX = 160, 13
MOST_MISTAKES = 12
CHART_PX, MARGIN_PX = 784, 12


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Probed:
    """What was found about one model."""

    model: str
    """Its folder or name."""
    on: str
    """Which features were looked at."""
    result: ProbeResult
    """What the classifiers make of them."""
    learned: int
    """Photographs they learned from."""


def probe_page(probed: Sequence[Probed], classes: Sequence[str], facts: Mapping[str, str]) -> str:
    """Return the page: bars with intervals, which class is taken for which, and how the penalty was chosen.

    Args:
        probed: At least one model; all were judged by the same photographs.
        classes: Names, by their numbers.
        facts: What a reader needs to get the same page again.

    Returns:
        The text of an HTML file.
    """
    first = probed[0]
    best = max(probed, key=lambda each: each.result.linear.accuracy)
    several = len(probed) > 1
    summary = [
        ("Best linear probe" if several else "Linear probe", _percent(best.result.linear)),
        ("Its nearest neighbours" if several else "Nearest neighbours", _percent(best.result.knn)),
        ("The commonest class", _percent(first.result.majority)),
        ("Classes", str(len(classes))),
    ]
    sections = _models(probed) if several else _classifiers(first)
    sections += [_confusion(each, classes, several) for each in probed]
    sections.append(_sweep(probed))
    total = first.result.linear.total
    lead = f"{len(classes)} classes told from {first.on} of {len(probed)} model{'s' * several}, on {total} photographs."
    return report_page("Probe", lead, summary, sections, facts)


def confusion_picture(confusion: Int64[Tensor, "true guessed"], classes: Sequence[str]) -> Image.Image:
    """Draw how often one class is taken for another, as a share of the photographs of the true one.

    Args:
        confusion: Counts.
        classes: Names, by their numbers; they stand beside the matrix where there are few enough.

    Returns:
        An RGB image on white: a row for each true class, a column for each guessed one, white for never and red for
        always.
    """
    matrix = heat_map(confusion / confusion.sum(1, keepdim=True).clamp(min=1))
    if len(classes) > MOST_NAMES:
        return matrix
    font = ImageFont.load_default(FONT_PX)
    names = [_shortened(name, font) for name in classes]
    edge = round(max(font.getlength(name) for name in names)) + MARGIN_PX
    picture = Image.new("RGB", (edge + matrix.width + 1, edge + matrix.height + 1), PAPER)
    picture.paste(matrix, (edge, edge))
    draw = ImageDraw.Draw(picture)
    label = Image.new("RGB", (edge, FONT_PX + 5), PAPER)
    for number, name in enumerate(names):
        middle = edge + (number + 0.5) * matrix.width / len(names)
        draw.text((edge - 6, middle), name, INK, font, anchor="rm")
        label.paste(PAPER, (0, 0, *label.size))
        ImageDraw.Draw(label).text((6, label.height / 2), name, INK, font, anchor="lm")
        picture.paste(label.rotate(90, expand=True), (round(middle - label.height / 2), 0))
    draw.rectangle((edge - 1, edge - 1, picture.width - 1, picture.height - 1), outline=FAINT)
    return picture


def _classifiers(probed: Probed) -> list[Section]:
    result = probed.result
    scores = {
        "linear probe": result.linear,
        f"{result.neighbours} nearest neighbours": result.knn,
        "the commonest class": result.majority,
    }
    return [
        Section(
            title="How often the class is guessed right",
            text=f"{probed.on} of {probed.model}, {probed.learned} photographs to learn from. A classifier that says "
            "nothing but the commonest class stands beside the two that look.",
            picture=_bars(list(scores), list(scores.values()), "classifier"),
            caption="Share of photographs whose class is guessed right, with the 95 % interval (Wilson)",
            rows=[(name, _sentence(score)) for name, score in scores.items()],
        )
    ]


def _models(probed: Sequence[Probed]) -> list[Section]:
    numbers = [str(number) for number in range(1, len(probed) + 1)]
    found = []
    for key, title in (("linear", "Linear probe"), ("knn", f"{probed[0].result.neighbours} nearest neighbours")):
        scores: list[Score] = [getattr(each.result, key) for each in probed]
        rows = [
            (f"{number}: {each.model}", _sentence(score) + (f", l2 {each.result.l2:g}" if key == "linear" else ""))
            for number, each, score in zip(numbers, probed, scores, strict=True)
        ]
        majority = probed[0].result.majority
        found.append(
            Section(
                title=title,
                text=f"On {probed[0].on}. The last bar always says the commonest class; intervals that overlap leave "
                "open which model is better.",
                picture=_bars([*numbers, "commonest class"], [*scores, majority], "model"),
                caption="Share of photographs whose class is guessed right, with the 95 % interval (Wilson)",
                rows=[*rows, ("the commonest class", _sentence(majority))],
            )
        )
    return found


def _confusion(probed: Probed, classes: Sequence[str], several: bool) -> Section:
    counts = probed.result.confusion
    wrong = counts - counts.diag().diag()
    places = wrong.flatten().argsort(descending=True, stable=True)[:MOST_MISTAKES].tolist()
    pairs = [divmod(place, len(classes)) for place in places]
    return Section(
        title=f"What {probed.model} is taken for" if several else "Which class is taken for which",
        text="Of the linear probe: a row for each true class, a column for each guessed one, as shares of the row. "
        "The commonest mistakes stand below.",
        picture=confusion_picture(counts, classes),
        caption="Confusion matrix: white is never, red always",
        rows=[
            (f"{classes[true]} for {classes[guessed]}", f"{int(wrong[true, guessed])} of {int(counts[true].sum())}")
            for true, guessed in pairs
            if wrong[true, guessed] > 0
        ],
    )


def _sweep(probed: Sequence[Probed]) -> Section:
    names = [str(number) for number in range(1, len(probed) + 1)] if len(probed) > 1 else ["linear probe"]
    lines = {
        name: list(zip(torch.tensor(list(each.result.sweep)).log10().tolist(), each.result.sweep.values(), strict=True))
        for name, each in zip(names, probed, strict=True)
    }
    return Section(
        title="How strong a penalty",
        text="The linear probe's penalty was chosen on a fifth of the photographs to learn from, which it had not "
        "seen; those that judge it had no say.",
        picture=line_chart(lines, across="log10 of the penalty", up="share guessed right, held back", points=True),
        caption="Accuracy on what was held back, by the weight of the penalty",
        rows=[
            (f"{name}, l2 {l2:g}", f"{value:.4f}" + ", chosen" * (l2 == each.result.l2))
            for name, each in zip(names, probed, strict=True)
            for l2, value in each.result.sweep.items()
        ],
    )


def _bars(names: Sequence[str], scores: Sequence[Score], across: str) -> Image.Image:
    font = ImageFont.load_default(FONT_PX)
    fits = len(names) * (max(font.getlength(name) for name in names) + MARGIN_PX) < CHART_PX
    ends = [score.as_dict()["interval_95"] for score in scores]
    return bar_chart(
        list(names) if fits else [],
        [score.accuracy for score in scores],
        [(low, high) for low, high in ends],
        across=across,
        up="share guessed right",
    )


def _sentence(score: Score) -> str:
    low, high = score.as_dict()["interval_95"]
    return f"{score.accuracy:.4f}, {low:.4f} to {high:.4f}, {score.correct} of {score.total}"


def _percent(score: Score) -> str:
    return f"{100 * score.accuracy:.1f} %"


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(name) <= NAME_PX:
        return name
    while name and font.getlength(name + "...") > NAME_PX:
        name = name[:-1]
    return name + "..."
