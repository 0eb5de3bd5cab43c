"""Curves of several runs over one another: `softvq compare`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from rich.table import Table

from softvq.commands.common import check_output, results
from softvq.errors import InputError
from softvq.evaluation.charts import line_chart
from softvq.files import replacing
from softvq.training.tracking import curve_value, read_log

__all__ = ["compare_runs"]

Curve = list[tuple[float, float]]
MOST_POINTS = 2000
"""Of a line, more than the chart has columns of pixels; longer ones are thinned out evenly."""


def compare_runs(arguments: argparse.Namespace) -> None:
    """Draw the logs of runs over one another, and print where each curve ends."""
    out = Path(arguments.out)
    check_output(out, arguments.overwrite)
    names = _names(arguments.runs)
    curves = {name: _curves(Path(run)) for name, run in zip(names, arguments.runs, strict=True)}
    found = list(dict.fromkeys(key for each in curves.values() for key in each))
    unknown = sorted(set(arguments.keys or ()) - set(found))
    if unknown:
        raise InputError(f"--keys has {', '.join(unknown)}, expected some of {', '.join(found)}")
    keys = arguments.keys or [key for key in found if sum(key in each for each in curves.values()) == len(curves)]
    if not keys:
        raise InputError(f"{', '.join(arguments.runs)}: there is no figure that all of them log; choose some by --keys")
    _draw(out, curves, keys, arguments.smooth)
    _print(curves, keys)
    results().print(str(out), soft_wrap=True)


def _names(runs: Sequence[str]) -> list[str]:
    """Call each run by the last part of its folder, or by all of it where that is not enough to tell them apart."""
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise InputError("the same run is named twice; name each once")
    short = [Path(run).resolve().name for run in runs]
    return short if len(set(short)) == len(short) else list(runs)


def _curves(run: Path) -> dict[str, Curve]:
    path = run / "log.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; name folders of runs, as softvq train writes them")
    curves: dict[str, Curve] = {}
    for line in read_log(path):
        step = curve_value(line["step"])
        values = dict(line)
        for group in (line.get("clock"), line.get("samples")):
            values |= group if isinstance(group, dict) else {}
        for key, value in values.items():
            shown = curve_value(value)
            if key not in {"step", "time"} and shown is not None and step is not None:
                curves.setdefault(key, []).append((step, shown))
    if not curves:
        raise InputError(f"{path}: has no figures yet; wait for the run's first line of the log")
    return curves


def _smoothed(curve: Curve, width: int) -> Curve:
    """Average each value with those before it, `width` at most, and thin the points out."""
    averaged = []
    for end in range(len(curve)):
        window = [value for _, value in curve[max(0, end + 1 - width) : end + 1]]
        averaged.append((curve[end][0], sum(window) / len(window)))
    step = -(-len(averaged) // MOST_POINTS)
    return averaged[: len(averaged) - 1 : step] + averaged[-1:]


def _draw(out: Path, curves: Mapping[str, Mapping[str, Curve]], keys: Sequence[str], width: int) -> None:
    charts = [
        line_chart(
            {name: _smoothed(each[key], width) for name, each in curves.items() if key in each}, across="step", up=key
        )
        for key in keys
    ]
    picture = Image.new("RGB", (charts[0].width, sum(chart.height for chart in charts)))
    top = 0
    for chart in charts:
        picture.paste(chart, (0, top))
        top += chart.height
    with replacing(out) as temporary:
        picture.save(temporary, format="PNG")


def _print(curves: Mapping[str, Mapping[str, Curve]], keys: Sequence[str]) -> None:
    table = Table("last value", *curves)
    steps = [f"{max(step for curve in each.values() for step, _ in curve):,.0f}" for each in curves.values()]
    table.add_row("step", *steps)
    for key in keys:
        table.add_row(key, *(f"{each[key][-1][1]:.6g}" if key in each else "" for each in curves.values()))
    results().print(table)
