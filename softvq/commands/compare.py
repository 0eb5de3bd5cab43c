"""Results of several evaluations beside one another: `softvq evaluate compare`."""

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from softvq.commands.common import check_output, results
from softvq.errors import InputError
from softvq.evaluation.protocols import PROTOCOLS, comparable
from softvq.evaluation.set_figures import DEVIATION
from softvq.files import write_json, write_text

__all__ = ["better_of", "compare", "read_result"]

KINDS = ("reconstruction", "generation")
NAMES = tuple(f"{kind}.json" for kind in KINDS)
HIGHER = {"psnr", "ssim", "ms_ssim", "legacy_ssim", "inception_score", "precision", "recall", "coverage"}
LOWER = {
    "mse", "st_lpips", "lpips_vgg", "lpips_alex", "frechet_distance", "spatial_frechet_distance", "kernel_distance",
    "cmmd",
}  # fmt: skip
LARGEST = 1e300
NAME_WIDTH, FIGURE_WIDTH = 44, 18
"""Characters a table on the terminal needs for the names of a line, and for each of its figures."""
Column = tuple[str, str]
"""The network's name, empty where there is none, and the figure's key."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """One line of the table."""

    result: str
    settings: str
    figures: Mapping[Column, float]
    competes: bool = True


def compare(arguments: argparse.Namespace) -> None:
    """Print a table for each kind of result, with the best of each column marked, and perhaps save it."""
    if arguments.out is not None:
        check_output(Path(arguments.out), arguments.overwrite)
    read = [(str(path), read_result(path)) for path in _paths(arguments.results)]
    kinds = {kind: [(path, found) for path, found in read if found["kind"] == kind] for kind in KINDS}
    for members in kinds.values():
        if members:
            comparable([found for _, found in members], [_short(path) for path, _ in members])
    report, texts, marked = {}, ["# Results side by side\n"], False
    for kind, members in kinds.items():
        if not members:
            continue
        labels, lines = _labels(members), _lines(members)
        best = {column: _best(column, lines) for column in labels}
        marked = marked or any(value is not None for value in best.values())
        protocol = members[0][1]["protocol"]
        for table in _tables(kind, protocol, labels, lines, best, results().width):
            results().print(table)
        texts.append(_markdown(kind, protocol, labels, lines, best))
        report[kind] = _plain(members[0][1], labels, lines, best)
    if marked:
        results().print("* best of its column")
    if arguments.out is not None:
        write_json(Path(arguments.out) / "compare.json", report)
        write_text(Path(arguments.out) / "compare.md", "\n".join(texts))
        results().print(f"{arguments.out}: compare.md, compare.json", soft_wrap=True)


def read_result(path: Path) -> dict[str, Any]:
    """Read what `softvq evaluate reconstruction` or `generation` wrote.

    Args:
        path: A file of the name `reconstruction.json` or `generation.json`, or any other.

    Returns:
        The result, with all that is needed of it in place.

    Raises:
        InputError: If the file cannot be read, is no JSON, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is no whole JSON file ({_first_line(error)}); evaluate again") from error
    wrong = _wrong(found)
    if wrong is not None:
        raise InputError(f"{path}: {wrong}; give a file that softvq evaluate reconstruction or generation wrote")
    return found


def better_of(key: str) -> str | None:
    """Return `lower` or `higher`, whichever is better of a figure, or None where neither is.

    >>> better_of("frechet_distance"), better_of("recall"), better_of("bits_per_pixel")
    ('lower', 'higher', None)

    Args:
        key: Of the figure in the result file.

    Returns:
        The direction.
    """
    return "lower" if key in LOWER else "higher" if key in HIGHER else None


def _paths(given: Sequence[str]) -> list[Path]:
    """Return the result files, of folders those in them."""
    paths: list[Path] = []
    for text in given:
        path = Path(text)
        found = [path / name for name in NAMES if (path / name).is_file()] if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: holds neither {' nor '.join(NAMES)}; give the folder of a report, or its file")
        paths += found
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise InputError(f"{path}: is given twice; give every result once")
        seen.add(path.resolve())
    return paths


def _wrong(found: Any) -> str | None:
    """Return what keeps a value from being a result, or None."""
    if not isinstance(found, dict) or found.get("kind") not in KINDS:
        return f"kind is not {' or '.join(KINDS)}"
    if not isinstance(found.get("provenance"), dict):
        return "provenance is missing"
    if found.get("protocol") not in list(PROTOCOLS) or found["provenance"].get("protocol") != found["protocol"]:
        return "protocol is none of this program's"
    rows, validation = found.get("rows"), found.get("validation")
    if not isinstance(rows, list) or not rows:
        return "rows is no list of at least one"
    if not isinstance(validation, list | None):
        return "validation is no list"
    return next((wrong for row in [*rows, *(validation or [])] if (wrong := _wrong_row(row)) is not None), None)


def _wrong_row(row: Any) -> str | None:
    if not isinstance(row, dict) or not isinstance(row.get("network"), str | None):
        return "a row is none"
    if not all(isinstance(row.get(name), dict) for name in ("settings", "figures", "labels")):
        return "a row lacks settings, figures or labels"
    texts = [row["network"] or "", *row["settings"], *row["figures"], *row["labels"], *row["labels"].values()]
    if not row["figures"] or not all(isinstance(text, str) and text.isprintable() for text in texts):
        return "a row has no figures, or names and labels that are no text"
    settings = [value for value in row["settings"].values() if value is not None]
    numbers = [*row["figures"].values(), *settings]
    if any(
        isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST for value in numbers
    ):
        return "a figure or setting is no finite number"
    return None


def _labels(members: Sequence[tuple[str, dict[str, Any]]]) -> dict[Column, str]:
    """Return the columns in order of appearance, with what to call them."""
    labels: dict[Column, str] = {}
    for _, found in members:
        for row in found["rows"]:
            for key in row["figures"]:
                if not key.endswith(DEVIATION):
                    label = str(row["labels"].get(key, key.replace("_", " ")))
                    labels.setdefault((row["network"] or "", key), label)
    return labels


def _lines(members: Sequence[tuple[str, dict[str, Any]]]) -> list[_Line]:
    """Bring all networks of a result and a setting into one line; equal validation sets share theirs."""
    lines = []
    for path, found in members:
        for settings, figures in _merged(found["rows"]).items():
            lines.append(_Line(result=_short(path), settings=settings, figures=figures))
    for _, found in members:
        for settings, figures in _merged(found["validation"] or []).items():
            line = _Line(result="validation photographs", settings=settings, figures=figures, competes=False)
            if line not in lines:
                lines.append(line)
    return lines


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, dict[Column, float]]:
    merged: dict[str, dict[Column, float]] = {}
    for row in rows:
        settings = ", ".join(f"{name} {_text(value)}" for name, value in row["settings"].items() if value is not None)
        figures = {(row["network"] or "", key): float(value) for key, value in row["figures"].items()}
        merged.setdefault(settings, {}).update(figures)
    return merged


def _best(column: Column, lines: Sequence[_Line]) -> float | None:
    """Return the best value of a column, or None where nothing can be best, or nothing is better than the rest."""
    values = [line.figures[column] for line in lines if line.competes and column in line.figures]
    better = better_of(column[1])
    if better is None or len(set(values)) < 2:
        return None
    return min(values) if better == "lower" else max(values)


def _cells(line: _Line, labels: Mapping[Column, str], best: Mapping[Column, float | None], mark: str) -> list[str]:
    """Return the text of a line's figures; `mark` is what a best one is put into, with {} for it."""
    cells = []
    for column in labels:
        value = line.figures.get(column)
        if value is None:
            cells.append("")
            continue
        spread = line.figures.get((column[0], column[1] + DEVIATION))
        text = _text(value) + ("" if spread is None else f" ± {spread:.2g}")
        cells.append(mark.format(text) if line.competes and value == best[column] else text)
    return cells


def _tables(
    kind: str,
    protocol: str,
    labels: Mapping[Column, str],
    lines: Sequence[_Line],
    best: Mapping[Column, float | None],
    width: int,
) -> list[Table]:
    """Return the lines with as many figures at once as the terminal is wide for."""
    title, shared = f"{kind}, protocol {protocol}", _shared_ending(list(labels.values()))
    at_once, columns, tables = max(1, (width - NAME_WIDTH) // FIGURE_WIDTH), list(labels), []
    for start in range(0, len(columns), at_once):
        part = {column: labels[column].removesuffix(shared) for column in columns[start : start + at_once]}
        table = Table(title=title + shared)
        for header in ("result", "settings"):
            table.add_column(header, overflow="fold")
        for label in part.values():
            table.add_column(label, justify="right", overflow="fold")
        for line in lines:
            table.add_row(line.result, line.settings, *_cells(line, part, best, "{} *"))
        tables.append(table)
    return tables


def _shared_ending(labels: Sequence[str]) -> str:
    """Return the ` on NETWORK` that all labels end with, to be said once, or nothing."""
    start, on, network = labels[0].rpartition(" on ")
    ending = on + network if start else ""
    return ending if all(label.endswith(ending) for label in labels) else ""


def _markdown(
    kind: str, protocol: str, labels: Mapping[Column, str], lines: Sequence[_Line], best: Mapping[Column, float | None]
) -> str:
    rows = [["result", "settings", *labels.values()], ["---", "---", *("---:" for _ in labels)]]
    rows[0] = [_escaped(label) for label in rows[0]]
    # figures are our own text, whose marks are not to be escaped
    rows += [[_escaped(line.result), _escaped(line.settings), *_cells(line, labels, best, "**{}**")] for line in lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {kind}, protocol {protocol}\n\n{table}\n\nIn bold the best of each column.\n"


def _plain(
    first: Mapping[str, Any],
    labels: Mapping[Column, str],
    lines: Sequence[_Line],
    best: Mapping[Column, float | None],
) -> dict[str, Any]:
    """Return the table for JSON: columns, and rows with their figures in the order of the columns."""
    columns = [
        {"network": column[0] or None, "key": column[1], "label": label, "better": better_of(column[1])}
        for column, label in labels.items()
    ]
    rows = [
        {
            "result": line.result,
            "settings": line.settings,
            "figures": [line.figures.get(column) for column in labels],
            "best": [line.competes and best[column] is not None and line.figures.get(column) == best[column]
                     for column in labels],
        }
        for line in lines
    ]  # fmt: skip
    return {"protocol": first["protocol"], "columns": columns, "rows": rows}


def _short(path: str) -> str:
    """Return a report's folder for a file of the usual name, and any other file as it is."""
    return str(Path(path).parent) if Path(path).name in NAMES and Path(path).parent != Path() else path


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else str(value)


def _escaped(text: str) -> str:
    """Keep a stranger's text from ending a cell or starting markup."""
    text = re.sub(r"([\\|\[\]()!*_`#~])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
