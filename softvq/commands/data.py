"""Sets of photographs: `softvq data check` and `softvq data pack`."""

import argparse
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from softvq.commands.common import messages, progress, results
from softvq.data.checking import SetReport, check_set, shared_pictures
from softvq.data.images import PILLOW_MAX_PIXELS
from softvq.data.packing import pack_folder
from softvq.errors import InputError

__all__ = ["check", "pack"]

SHOWN = 10


def check(arguments: argparse.Namespace) -> None:
    """Print what a set of photographs is like; end with an error if a picture or a shard cannot be used."""
    if arguments.max_pixels > PILLOW_MAX_PIXELS:
        raise InputError(f"--max-pixels is {arguments.max_pixels}, expected at most {PILLOW_MAX_PIXELS}")
    console = messages()

    def looked_at(source: str) -> SetReport:
        def watch(names: Sequence[Any]) -> Iterable[Any]:
            return progress(names, source, console)

        choices = {"min_side": arguments.min_side, "max_pixels": arguments.max_pixels, "workers": arguments.workers}
        return check_set(source, **choices, watch=watch)

    train = looked_at(arguments.source)
    val = None if arguments.val is None else looked_at(arguments.val)
    shared = [] if val is None else shared_pictures(train, val)
    reports = [each for each in (train, val) if each is not None]
    if arguments.json:
        data = {**train.as_dict(), "val": None if val is None else val.as_dict(), "in_train_and_val": shared}
        results().print(json.dumps(data, indent=2), soft_wrap=True)
    else:
        for report in reports:
            _print(report)
        if val is not None:
            results().print(f"{val.source}: {len(shared):,} are in {train.source} too", soft_wrap=True)
        _print_list("in train and val", [f"{theirs} = {ours}" for theirs, ours in shared])
    for report in reports:
        _judge(report)


def pack(arguments: argparse.Namespace) -> None:
    """Pack a folder of photographs into shards, or go on with that."""
    console = messages()
    packed = pack_folder(
        arguments.folder,
        arguments.out,
        arguments.shard_megabytes << 20,
        watch=lambda shards: progress(shards, "shards", console),
    )
    made = f"{packed.made:,} made" if packed.made else "all were there and whole"
    results().print(
        f"{arguments.out}: {packed.pictures:,} photographs in {packed.shards:,} shards of {packed.num_bytes:,} bytes, "
        f"{made}",
        soft_wrap=True,
    )


def _print(report: SetReport) -> None:
    table = Table("figure", "value")
    table.add_row("photographs", f"{report.pictures:,}")
    table.add_row("unreadable", f"{len(report.unreadable):,}")
    table.add_row("too small", f"{len(report.too_small):,}")
    table.add_row("there more than once", f"{sum(map(len, report.duplicates)):,} in {len(report.duplicates):,} groups")
    table.add_row("classes", f"{len(report.classes):,}" if report.classes else "none")
    if report.classes:
        table.add_row("photographs of a class", f"{min(report.classes.values()):,} to {max(report.classes.values()):,}")
        table.add_row("without a class", f"{report.unlabelled:,}")
    table.add_section()
    for name, count in report.shorter_sides.items():
        table.add_row(f"shorter side {name} px", f"{count:,}")
    table.add_section()
    table.add_row("fingerprint", report.fingerprint[:12])
    console = results()
    console.print(report.source, soft_wrap=True)
    console.print(table)
    _print_list("unreadable", list(report.unreadable.values()))
    _print_list("too small", [f"{name}: {width} x {height}" for name, (width, height) in report.too_small.items()])
    _print_list("the same pixels", [" = ".join(group) for group in report.duplicates])
    _print_list("damaged", report.damaged_shards)
    _print_list("remark", report.remarks)


def _print_list(title: str, lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        text = "".join(char if char.isprintable() else " " for char in line)  # a name may hold anything
        results().print(f"{title}: {text}", soft_wrap=True)
    if len(lines) > SHOWN:
        results().print(f"{title}: and {len(lines) - SHOWN:,} more, which --json lists", soft_wrap=True)


def _judge(report: SetReport) -> None:
    if report.damaged_shards:
        count = f"{len(report.damaged_shards)} of its shards are not as the manifest says"
        raise InputError(f"{report.source}: {count}; {report.damaged_shards[0]}")
    if report.unreadable:
        name = next(iter(report.unreadable))
        count = f"{len(report.unreadable):,} of {report.pictures:,} photographs cannot be read"
        raise InputError(f"{report.source}: {count}, the first is {name}; repair or remove them")
