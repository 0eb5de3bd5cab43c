"""How fast this machine is: `softvq bench`."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table

import softvq
from softvq.commands.bench_jobs import (
    Row,
    bench_generator_training,
    bench_sampling,
    bench_tokenizer,
    bench_tokenizer_training,
)
from softvq.commands.common import check_output, machine_name, messages, results
from softvq.config import from_dict, read_json
from softvq.errors import InputError
from softvq.evaluation.timing import copy_rate, matrix_peak
from softvq.files import write_json
from softvq.training.distributed import choose_device

__all__ = ["BenchReport", "bench", "bench_all", "bench_table"]

JOBS = {
    "encode": bench_tokenizer,
    "decode": bench_tokenizer,
    "sample": bench_sampling,
    "train-tokenizer": bench_tokenizer_training,
    "train-generator": bench_generator_training,
}
PROFILE_HEADINGS = ("kernels", "ms", "share", "launches")
HEADINGS = ("job", "model", "batch", "ms", "images/s", "MFU", "GiB", "")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """What one call measured, as its JSON file has it."""

    machine: str
    """The GPU, or the processor with its threads."""
    torch: str
    """Version."""
    softvq: str
    """Version."""
    peak_flops: float
    """Operations a second of a large matrix product in the rows' precision, measured in the same call."""
    copy_bytes: float
    """Bytes a second, read and written, of a large copy, measured in the same call."""
    rows: tuple[Row, ...]
    """What was timed."""


def bench(arguments: argparse.Namespace) -> None:
    """Time one job, and print it beside what the device could do."""
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None:
        check_output(out, arguments.overwrite)
    device = choose_device(arguments.device)
    rows = tuple(_rows(arguments, device))
    report = BenchReport(
        machine=machine_name(device),
        torch=torch.__version__,
        softvq=softvq.__version__,
        peak_flops=matrix_peak(device, torch.float32 if rows[0].precision == "float32" else torch.bfloat16),
        copy_bytes=copy_rate(device),
        rows=rows,
    )
    table = Table(*HEADINGS, title=_title(report))
    for row in report.rows:
        table.add_row(*_cells(row, report))
    results().print(table)
    for row in report.rows:
        if row.profile:
            results().print(_profile_table(row))
    if out is not None:
        write_json(out, dataclasses.asdict(report))


def _profile_table(row: Row) -> Table:
    table = Table(*PROFILE_HEADINGS, title=f"{row.model}, {row.note}: where the time of one {row.job} goes")
    for cells in _profile_cells(row):
        table.add_row(*cells)
    return table


def _profile_cells(row: Row) -> list[list[str]]:
    busy = sum(share.seconds for share in row.profile)
    return [
        [share.kind, f"{1e3 * share.seconds:.3g}", f"{share.seconds / busy:.0%}", f"{share.launches:,.0f}"]
        for share in row.profile
    ]


def bench_all(arguments: argparse.Namespace) -> None:
    """Run a standard list of jobs, each as its command would, and go on where an earlier call stopped."""
    out, device = Path(arguments.out), choose_device(arguments.device)
    lines: Sequence[str] = arguments.standard[device.type]
    for number, line in enumerate(lines, 1):
        job = arguments.parse(line)
        messages().print(f"{number} of {len(lines)}: softvq bench {line}", soft_wrap=True, highlight=False)
        job.device, job.out = arguments.device, str(out / f"{number:02}-{job.job}.json")
        if "config" in job and not Path(job.config).exists():
            messages().print(f"left out: {job.config} is in softvq's repository; run this there", soft_wrap=True)
        elif not Path(job.out).exists():
            bench(job)
    _print_tables(sorted(map(str, out.glob("*.json"))))


def bench_table(arguments: argparse.Namespace) -> None:
    """Print the results of several calls as Markdown, a table for each machine and version."""
    _print_tables(arguments.results)


def _print_tables(files: Sequence[str]) -> None:
    reports = [from_dict(BenchReport, read_json(Path(path)), path) for path in files]
    lines = []
    for where in dict.fromkeys(_where(report) for report in reports):
        lines += [where, "", "| " + " | ".join((*HEADINGS, "networks")) + " |"]
        lines += ["| --- | --- |" + " ---: |" * (len(HEADINGS) - 3) + " --- | --- |"]
        lines += [
            "| " + " | ".join((*_cells(row, report), _how(row))) + " |"
            for report in reports
            if _where(report) == where
            for row in report.rows
        ]
        here = [report for report in reports if _where(report) == where]
        least, most = min(here, key=lambda r: r.peak_flops), max(here, key=lambda r: r.peak_flops)
        between = _limits(most) if len(here) == 1 else f"{_limits(least)} to {_limits(most)}"
        lines += ["", f"Matrix products and copies reached {between}."]
        for row in (row for report in here for row in report.rows if row.profile):
            lines += ["", f"{row.model}, {row.note}, batch {row.batch}: where the time of one {row.job} goes", ""]
            lines += [f"| {' | '.join(cells)} |" for cells in (PROFILE_HEADINGS, ("---", *["---:"] * 3))]
            lines += [f"| {' | '.join(cells)} |" for cells in _profile_cells(row)]
    results().print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def _rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    try:
        with messages().status(f"{arguments.job}: building, warming up, timing"):
            yield from JOBS[arguments.job](arguments, device)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{arguments.job}: out of memory; give a smaller --batch") from error


def _title(report: BenchReport) -> str:
    how = "; ".join(dict.fromkeys(map(_how, report.rows)))
    return f"{_where(report)}, {how}; matrix products and copies {_limits(report)}"


def _where(report: BenchReport) -> str:
    return f"{report.machine}, torch {report.torch}, softvq {report.softvq}"


def _how(row: Row) -> str:
    return f"{row.precision}, {'compiled' if row.compiled else 'not compiled'}"


def _limits(report: BenchReport) -> str:
    return f"{report.peak_flops / 1e12:,.3g} TFLOP/s and {report.copy_bytes / 1e9:,.3g} GB/s"


def _cells(row: Row, report: BenchReport) -> Sequence[str]:
    share = "" if row.flops is None else f"{row.flops / row.seconds / report.peak_flops:.0%}"
    spread = "" if row.low == row.high else f" ± {(row.high - row.low) / 2 / row.seconds:.1%}"
    memory = f"{row.memory / 2**30:.2f}" if row.memory else ""
    time = f"{1e3 * row.seconds:.4g}{spread}"
    return (row.job, row.model, str(row.batch), time, f"{row.images_per_sec:,.4g}", share, memory, row.note)
