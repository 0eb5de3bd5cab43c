"""What the commands that compare sets of images share: networks to look through, and a table of figures."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from softvq.commands.common import check_output, messages, results
from softvq.data.images import SUFFIXES
from softvq.errors import InputError
from softvq.evaluation.extractors import Extractor, extractor
from softvq.evaluation.protocols import PROTOCOLS
from softvq.evaluation.set_figures import DEVIATION
from softvq.ranks import is_main, rank, world_size

__all__ = ["bar_of_rank", "check_report", "networks_of", "print_figures"]


def check_report(out: Path, overwrite: bool, *sources: str | None) -> None:
    """Refuse what cannot be the folder of a report, before any work is done.

    Args:
        out: Where results are to be written.
        overwrite: Whether it may replace what is there.
        *sources: What is read; None for what is not given.

    Raises:
        InputError: If it is a picture's name or there already, or lies in a folder that images are read from: the
            report's pictures would count as some of those the next time.
    """
    if out.is_file() or out.suffix.lower() in SUFFIXES:
        raise InputError(f"{out}: is to be a folder of results; give the name of one")
    for source in filter(None, sources):
        if out.resolve().is_relative_to(Path(source).resolve()):
            raise InputError(
                f"{out}: lies in {source}, whose images the report's would be taken for; give another --out"
            )
    check_output(out, overwrite)


@contextlib.contextmanager
def bar_of_rank(label: str, count: int) -> Iterator[Callable[[int], None]]:
    """Draw how far this rank is, if it is the first and there is a terminal.

    Args:
        label: Before the bar.
        count: Images of all ranks, of which this one has its share.

    Yields:
        What moves the bar on, by a number of images.
    """
    console = messages()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    share = (rank() + 1) * count // world_size() - rank() * count // world_size()
    hidden = not is_main() or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(label, total=share)
        yield lambda number: bar.advance(task, number)


def networks_of(features: Sequence[str], device: torch.device, protocol: str = "folder") -> list[Extractor]:
    """Build the networks that were asked for.

    Args:
        features: Each KIND or KIND=WEIGHTS, as `extractor` takes them.
        device: Where they compute.
        protocol: Its own network is taken if none was asked for.

    Returns:
        Frozen networks, all of them different.

    Raises:
        InputError: If a kind is unknown or given twice, or its weights cannot be had.
    """
    own = PROTOCOLS[protocol].extractor
    asked = list(features) or ([] if own is None else [own])
    networks: list[Extractor] = []
    for text in asked:
        kind, equals, weights = text.partition("=")
        if not kind or (equals and not weights):
            raise InputError(f"--features has {text!r}, expected KIND or KIND=WEIGHTS such as inception=FILE")
        try:
            network = extractor(kind, weights=weights or None, device=device)
        except InputError as error:
            hint = "" if equals else f" (on the command line: --features {kind}=FILE)"
            raise InputError(f"--features {text}: {error}{hint}") from error
        if any(network.sha256 == other.sha256 and network.name == other.name for other in networks):
            raise InputError(f"--features has {network.name} twice; give every network once")
        if any(network.name == other.name for other in networks):
            raise InputError(f"--features has two networks of the name {network.name}; look through them one by one")
        networks.append(network)
    return networks


def print_figures(
    rows: Sequence[Mapping[str, Any]], validation: Sequence[Mapping[str, Any]] | None = None, *, title: str
) -> None:
    """Print figures, with those of validation photographs beside, and the warnings among the messages.

    Args:
        rows: As the result file has them.
        validation: Rows of the validation photographs; the one of the same network stands beside.
        title: Of the table.
    """
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    beside = {row["network"]: row["figures"] for row in validation or ()}
    table = Table(title=title)
    for header in ("", "figure") if len(names) > 1 else ("figure",):
        table.add_column(header, overflow="fold")
    counts = {row["ratio_count"] for row in rows if row.get("ratio_count")}
    ratio = f"ratio, {counts.pop():,} images each" if len(counts) == 1 else "ratio"
    for header in ("value", "validation's own", ratio) if beside else ("value",):
        table.add_column(header, justify="right")
    for row in rows:
        figures, own = row["figures"], beside.get(row["network"], {})
        quotients = row.get("ratios", {})
        start = str(row["name"])
        for key in figures:
            if key.removesuffix(DEVIATION) in figures and key.endswith(DEVIATION):
                continue
            cells = [str(row["labels"].get(key, key.replace("_", " "))), _value(figures, key)]
            if beside:
                cells += [_value(own, key), f"{quotients[key]:.3f}" if key in quotients else ""]
            table.add_row(*([start, *cells] if len(names) > 1 else cells))
            start = ""
    results().print(table)
    warnings = [warning for row in [*rows, *(validation or ())] for warning in row["warnings"]]
    for warning in dict.fromkeys(warnings):
        messages().print(f"warning: {warning}", soft_wrap=True)


def _value(figures: Mapping[str, float], key: str) -> str:
    if key not in figures:
        return ""
    deviation = figures.get(key + DEVIATION)
    return f"{figures[key]:.5g}" + ("" if deviation is None else f" ± {deviation:.2g}")
