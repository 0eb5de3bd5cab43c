"""Run experiments: train and measure a small model for each of their cells and seeds, and put the figures side by side.

    python experiments/run.py experiments/quantizers.yaml --data FOLDER --out OUT --device cuda:0 cuda:1 --jobs 4

`FOLDER` holds `train` and `val`, each with one folder of photographs for each class. What is finished in OUT is not
done again, so the same command goes on where it was cut off. `KEY=VALUE` changes a field of all recipes, and
`generator.KEY=VALUE` one of the generators'.
"""

import argparse
import dataclasses
import itertools
import json
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console

import softvq
from experiments import report
from experiments.plan import Experiment, Job, Options, build_jobs, read_experiment
from experiments.workers import carry_out
from softvq.commands.common import machine_name
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.errors import InputError
from softvq.files import write_json, write_text
from softvq.locks import folder_lock

OVERRIDE = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z0-9_]+)*=")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for; return 1 if a job failed, 2 if the arguments are wrong, else 0."""
    given = list(sys.argv[1:] if argv is None else argv)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    # anywhere among the options, whose lists would take them for their own
    overrides = tuple(text for text in given if OVERRIDE.match(text))
    arguments = _parser().parse_args([text for text in given if text not in overrides])
    try:
        return _run(arguments, overrides, f"python experiments/run.py {shlex.join(given)}", console)
    except InputError as error:
        console.print(f"run.py: {error}", markup=False)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "experiments", type=Path, nargs="+", metavar="YAML", help="an experiment; equal jobs are shared"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to, and to go on in")
    parser.add_argument("--device", nargs="+", default=["cpu"], help="cpu, or cuda:0 cuda:1 ... (default: cpu)")
    parser.add_argument("--jobs", type=int, default=1, help="jobs at a time on each device (default: 1)")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the experiment's")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cells, by their names or by levels")
    parser.add_argument("--n", type=int, default=2000, help="images of each generator (default: 2000)")
    parser.add_argument("--features", default="lite2", help="network to look through (default: lite2)")
    parser.add_argument("--perceptual", default="auto", help="as softvq evaluate reconstruction takes it")
    parser.add_argument("--workers", type=int, default=2, help="that decode for each evaluation (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of the processor for each job (default: 2)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="resolve all recipes, list the jobs and stop")
    only.add_argument("--report", action="store_true", help="write tables and pictures of what is finished, and stop")
    return parser


def _run(arguments: argparse.Namespace, overrides: tuple[str, ...], command: str, console: Console) -> int:
    if arguments.jobs < 1 or arguments.threads < 1:
        raise InputError(f"--jobs is {arguments.jobs} and --threads {arguments.threads}, expected at least 1 each")
    experiments = [read_experiment(path) for path in arguments.experiments]
    if len({experiment.path.stem for experiment in experiments}) < len(experiments):
        raise InputError("two experiments have the same name, and would write to the same folder; rename one")
    kind, equals, file = arguments.features.partition("=")
    options = Options(
        data=arguments.data,
        classes=_classes(arguments.data),
        seeds=None if arguments.seeds is None else tuple(dict.fromkeys(arguments.seeds)),
        only=tuple(arguments.only),
        overrides=overrides,
        n=arguments.n,
        features=f"{kind}={Path(file).resolve()}" if equals else kind,  # jobs work in OUT
        perceptual=arguments.perceptual,
        workers=arguments.workers,
    )
    jobs = _jobs(experiments, options)
    out = arguments.out
    todo = _unfinished(jobs, out)
    jobs = {name: job for name, job in jobs.items() if not job.passing or job in todo}
    titles = "; ".join(experiment.settings.title for experiment in experiments)
    console.print(f"{titles}: {len(jobs)} jobs, {len(jobs) - len(todo)} of them finished")
    varied = {key for experiment in experiments for cell in experiment.cells() for key in cell.fields}
    for key in sorted(varied & {text.partition("=")[0] for text in overrides}):
        console.print(f"warning: {key} is given for all cells, also for those that set it themselves", markup=False)
    if arguments.dry_run:
        for job in todo:
            console.print(f"{job.title} ({job.name})", markup=False)
        return 0
    slots = arguments.device * arguments.jobs
    with folder_lock(out, "written", leave=False):
        failed = {} if arguments.report else carry_out(todo, out, slots, arguments.threads, console)
        for experiment in experiments:
            seeds = tuple(dict.fromkeys([*experiment.settings.seeds, *(options.seeds or ())]))
            known = build_jobs(experiment, dataclasses.replace(options, only=(), seeds=seeds))
            rows = _summarise(experiment, known, failed, out, arguments.device, command)
            for row in rows if arguments.report else ():
                print(report.row_line(row))
    return 1 if failed else 0


def _jobs(experiments: Sequence[Experiment], options: Options) -> dict[str, Job]:
    """Return the jobs of all experiments, the first seed of every cell before the second of any."""
    seeds = options.seeds
    if seeds is None:
        seeds = tuple(dict.fromkeys(seed for experiment in experiments for seed in experiment.settings.seeds))
    names = {experiment.path: experiment.names() for experiment in experiments}
    for name in options.only:
        if not any(name in known for known in names.values()):
            there = dict.fromkeys(itertools.chain.from_iterable(names.values()))
            raise InputError(f"--only has {name!r}, expected one of {'; '.join(there)}")
    found: dict[str, Job] = {}
    for seed, experiment in itertools.product(seeds, experiments):
        only = tuple(name for name in options.only if name in names[experiment.path])
        if bool(only) == bool(options.only) and (options.seeds is not None or seed in experiment.settings.seeds):
            mine = build_jobs(experiment, dataclasses.replace(options, seeds=(seed,), only=only))[0]
            found |= {name: job for name, job in mine.items() if name not in found}
    return found


def _classes(data: Path) -> int:
    """Return how many classes there are, and see that both folders have the same."""
    names = [PhotoFolder(data / part, 16, DataConfig(), 0).classes for part in ("train", "val")]
    if names[0] != names[1] or not names[0]:
        raise InputError(f"{data}: train and val have different classes or none; give both a folder for each class")
    return len(names[0])


def _unfinished(jobs: Mapping[str, Job], out: Path) -> list[Job]:
    """Return the jobs that are to be done, those for other jobs only where one of these needs them."""
    lasting = [job for job in jobs.values() if not job.passing and not _finished(out, job)]
    needed = {name for job in lasting for name in job.parents}
    return [job for job in jobs.values() if job in lasting or (job.name in needed and not _finished(out, job))]


def _finished(out: Path, job: Job) -> bool:
    try:
        return json.loads((out / job.name / "result.json").read_text())["sha256"] == job.sha256
    except (OSError, ValueError, KeyError):
        return False


def _summarise(
    experiment: Experiment,
    known: tuple[Mapping[str, Job], Mapping[tuple[str, int], list[str]]],
    failed: Mapping[str, str],
    out: Path,
    devices: Sequence[str],
    command: str,
) -> list[report.Row]:
    """Write all figures there are, also of cells that were not asked for now, the table and the pictures."""
    jobs, wanted = known
    failed = {jobs[name].title: why for name, why in failed.items() if name in jobs}
    folder = out / experiment.path.stem
    folder.mkdir(parents=True, exist_ok=True)
    levels = {cell.name: cell.levels for cell in experiment.cells()}
    rows: list[report.Row] = []
    networks: set[str] = set()
    for (cell, seed), names in wanted.items():
        if not all(_finished(out, jobs[name]) for name in names):
            continue
        figures: dict[str, float] = {}
        for name in names:
            result: dict[str, Any] = json.loads((out / name / "result.json").read_text())
            figures |= result["figures"]
            networks |= {result["network"]} - {None}
        rows.append(report.Row(cell=cell, levels=levels[cell], seed=seed, figures=figures, jobs=names))
    network = ", ".join(sorted(networks)) or None
    machine = ", ".join(dict.fromkeys(machine_name(torch.device(device)) for device in devices))
    about = {"machine": machine, "softvq": softvq.__version__, "torch": torch.__version__, "command": command}
    asked = {name: getattr(experiment.settings, name) for name in ("title", "question", "expected")}
    plain = [dataclasses.asdict(row) for row in rows]
    write_json(folder / "results.json", {**asked, **about, "network": network, "rows": plain, "failed": dict(failed)})
    found = report.summaries(rows)
    facts = f"Machine: {machine}; softvq {softvq.__version__}, torch {torch.__version__}; sets seen through {network}."
    lost = [f"{name}: {why}" for name, why in failed.items()]
    write_text(folder / "table.md", report.markdown(experiment, found, f"{facts} `{command}`", lost))
    written = report.draw_plots(experiment, found, folder, network)
    console = Console(highlight=False, width=max(150, Console().width))  # narrower, it would cut figures off
    for table in report.rich_tables(experiment, found):
        console.print(table)
    console.print(facts)
    console.print(f"{folder}: results.json, table.md, {', '.join(path.name for path in written)}", soft_wrap=True)
    return rows


if __name__ == "__main__":
    # without this a terminated run would leave its jobs behind
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise SystemExit(main())
