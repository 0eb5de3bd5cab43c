"""What comes out of an experiment: all rows, a table of means with intervals, and pictures."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats
from rich.table import Table

from experiments.plan import FIGURES, Experiment, Plot
from experiments.plots import Point, plot

__all__ = ["Row", "Summary", "draw_plots", "half_width", "markdown", "rich_tables", "row_line", "summaries"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One cell with one seed."""

    cell: str
    """The cell's name."""
    levels: Mapping[str, str]
    """Name of the level, by axis."""
    seed: int
    """The seed."""
    figures: Mapping[str, float]
    """By `SOURCE.figure`."""
    jobs: Sequence[str] = ()
    """Their folders in OUT."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A cell over its seeds."""

    levels: Mapping[str, str]
    """Name of the level, by axis."""
    seeds: int
    """How many there are."""
    means: Mapping[str, float]
    """Of each figure that all seeds have."""
    halves: Mapping[str, float | None]
    """Half the width of the interval of each mean; None with one seed."""


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % Student interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    return float(scipy.stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def summaries(rows: Iterable[Row]) -> dict[str, Summary]:
    """Return each cell over its seeds, by its name, in order of appearance."""
    cells: dict[str, list[Row]] = {}
    for row in rows:
        cells.setdefault(row.cell, []).append(row)
    found = {}
    for name, group in cells.items():
        shared = [key for key in group[0].figures if all(key in row.figures for row in group)]
        values = {key: [row.figures[key] for row in group] for key in shared}
        found[name] = Summary(
            levels=group[0].levels,
            seeds=len(group),
            means={key: statistics.fmean(each) for key, each in values.items()},
            halves={key: half_width(each) for key, each in values.items()},
        )
    return found


def row_line(row: Row) -> str:
    """Return a cell and seed with its figures in one line, for those who search and compare."""
    shown = (f"{key} {row.figures[key]:.4g}" for key in FIGURES if key in row.figures)
    return f"{row.cell}, seed {row.seed}: {', '.join(shown)}"


def _cells(found: Mapping[str, Summary], source: str = "") -> tuple[list[str], list[list[str]]]:
    """Return the heads of the table and its rows, of the figures of one source or of all."""
    shown = [key for key in FIGURES if any(key in summary.means for summary in found.values())]
    shown = [key for key in shown if not source or key.partition(".")[0] == source]
    axes = list(next(iter(found.values())).levels) if found else []
    rows = []
    for summary in found.values():
        texts = [_number(summary.means.get(key), summary.halves.get(key)) for key in shown]
        rows.append([*summary.levels.values(), str(summary.seeds), *texts])
    return [*axes, "seeds", *(FIGURES[key] for key in shown)], rows


def _number(mean: float | None, half: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"


def markdown(experiment: Experiment, found: Mapping[str, Summary], facts: str, failed: Sequence[str]) -> str:
    """Return the table as Markdown, with what it asks and what it was made with."""
    heads, rows = _cells(found)
    lines = [heads, ["---"] * len(heads), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    settings = experiment.settings
    note = "Means over seeds; ± is half the width of the 95 % Student interval."
    missing = "".join(f"\nFailed: {name}\n" for name in failed)
    words = f"# {settings.title}\n\n{settings.question}\n\nExpected: {settings.expected}\n\n{table}\n\n"
    return f"{words}{note} {facts}\n{missing}"


def rich_tables(experiment: Experiment, found: Mapping[str, Summary]) -> list[Table]:
    """Return the table for a terminal, in parts, since one would be wider than that."""
    tables = []
    sources = dict.fromkeys(key.partition(".")[0] for key in FIGURES)
    for source in sources:
        heads, rows = _cells(found, source)
        if len(heads) == len(experiment.axes) + 1:  # no figures
            continue
        table = Table(*heads, title=f"{experiment.settings.title}: {source}")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def draw_plots(experiment: Experiment, found: Mapping[str, Summary], out: Path, network: str | None) -> list[Path]:
    """Draw the pictures that an experiment asks for, where there is something to draw.

    Args:
        experiment: The experiment.
        found: Its cells.
        out: Folder to write to.
        network: Through which sets of images were seen, for the label.

    Returns:
        The files.
    """
    written = []
    for number, each in enumerate(experiment.settings.plots, 1):
        names, series = _series(experiment, found, each)
        if not series:
            continue
        up = FIGURES[each.y] + (f" on {network}" if network and "Fréchet" in FIGURES[each.y] else "")
        count = max(summary.seeds for summary in found.values())
        bars = f", 95 % intervals over {count} seeds" if count > 1 else ", one seed"
        across = FIGURES.get(each.x, each.x)
        title = experiment.settings.title + bars
        path = out / f"{number}-{each.y.replace('.', '-').replace('_', '-')}.png"
        levels = [] if names else [float(level) for level in experiment.axes.get(each.x, {})]
        plot(series, title=title, across=across, up=up, names=names, ticks=levels, log_x=each.log_x).save(path)
        written.append(path)
    return written


def _series(
    experiment: Experiment, found: Mapping[str, Summary], wanted: Plot
) -> tuple[list[str], dict[str, list[Point]]]:
    """Return names of the places on x, none where it is a number, and the points of each line."""
    levels = list(experiment.axes.get(wanted.x, {}))
    names = [] if all(map(_is_number, levels)) else levels
    series: dict[str, list[Point]] = {}
    for summary in found.values():
        if wanted.y not in summary.means or (not levels and wanted.x not in summary.means):
            continue
        level = summary.levels.get(wanted.x, "")
        x = float(names.index(level)) if names else float(level) if levels else summary.means[wanted.x]
        rest = {axis: name for axis, name in summary.levels.items() if axis not in (wanted.x, wanted.lines)}
        own = [summary.levels[wanted.lines]] if wanted.lines else []
        # a cloud of points without names would say little, so with a figure as x each cell has a colour
        line = ", ".join([*own, *(rest.values() if levels or not own else ())])
        if wanted.log_x and x <= 0:
            continue
        point = Point(x=x, y=summary.means[wanted.y], half=summary.halves[wanted.y])
        series.setdefault(line, []).append(point)
    return names, {line: sorted(points, key=lambda point: point.x) for line, points in series.items()}


def _is_number(text: Any) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
