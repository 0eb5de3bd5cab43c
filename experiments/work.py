"""Carry out jobs of experiments, one after another: `python experiments/work.py DEVICE`.

`experiments/run.py` starts it in OUT and writes a folder of a job in each line. The folder holds `job.json`, which says
what to do; `result.json` comes last, so that where it is, the job is finished. The exit code of each is answered in a
line of JSON. What jobs print goes into their `log.txt`.
"""

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softvq.cli import main as softvq
from softvq.files import write_json

DEVICE = "{device}"
VARIANTS = 1 << 16
"""Ways in which a function may be compiled: jobs have many shapes, and one too many would run it as it is."""
SEED = 0
"""Of torch's own generators where a job begins."""
LOGGED = ("perplexity", "posterior_entropy")


def figures_of(folder: Path) -> tuple[dict[str, float], str | None]:
    """Return what a job's commands wrote, by `SOURCE.figure`, and through which network sets were seen."""
    found: dict[str, float] = {}
    network = None
    for source in ("reconstruction", "generation"):
        path = folder / source / f"{source}.json"
        for row in json.loads(path.read_text())["rows"] if path.exists() else []:
            found |= {f"{source}.{key}": value for key, value in row["figures"].items()}
            network = row["network"] or network
    path = folder / "probe" / "probe.json"
    if path.exists():
        probe = json.loads(path.read_text())
        found |= {f"probe.{name}": probe[name]["accuracy"] for name in ("linear", "knn", "majority")}
    return {key: value for key, value in found.items() if value is not None}, network


def training_of(log: Path, source: str) -> dict[str, float]:
    """Return speed and, of a tokenizer, the codebook's health at the end of a training, from its log."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()]
    # the first line's time holds the start, compiled code and recorded graphs; a run of one line has no other
    paces = [line["clock"]["images_per_sec"] for line in lines if "images_per_sec" in line.get("clock", {})]
    found = {f"{source}.images_per_sec": statistics.median(paces[1:] or paces)} if paces else {}
    for name in LOGGED:
        values = [line[name] for line in lines if line.get(name) is not None]
        found |= {f"{source}.{name}": values[-1]} if values else {}
    return found


def work(folder: Path, device: str) -> int:
    """Carry out a job's commands, one after the other, and write its result; return the first exit code but 0."""
    job = json.loads((folder / "job.json").read_text())
    importlib.import_module("softvq.commands.train")  # before a clock runs
    figures: dict[str, float] = {}
    for command in job["commands"]:
        arguments = [device if argument == DEVICE else argument for argument in command]
        print("$ softvq", *arguments, flush=True)
        started = time.perf_counter()
        code = softvq(arguments)
        if code:
            return code
        if arguments[0] == "train":
            source = "training" if arguments[1] == "tokenizer" else "generator"
            figures[f"{source}.seconds"] = time.perf_counter() - started
            figures |= training_of(folder / "run" / "log.jsonl", source)
    measured, network = figures_of(folder)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)  # several times as large as the model
    write_json(folder / "result.json", {"sha256": job["sha256"], "figures": figures | measured, "network": network})
    return 0


@contextlib.contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Let this process and those it starts print to a file."""
    kept = [os.dup(number) for number in (1, 2)]
    with path.open("ab") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


@contextlib.contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """Let a job begin with what a new process has, and take back what it changes for all of this one."""
    torch = importlib.import_module("torch")
    torch.manual_seed(SEED)
    environment, place, threads = dict(os.environ), Path.cwd(), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    cudnn = torch.backends.cudnn
    chosen = cudnn.benchmark, cudnn.deterministic
    exact, dtype = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = chosen  # trainings try out convolutions
        torch.use_deterministic_algorithms(exact)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(True)
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(place)
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()  # models lie in circles, and hold the device's memory
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def carried_out(folder: Path, device: str) -> int:
    """Carry out a job whatever happens in it, and leave nothing of it in this process; return its exit code."""
    with printing_to(folder / "log.txt"), as_in_a_new_process():
        try:
            return work(folder, device)
        except SystemExit as ended:
            print(f"it ended with {ended.code!r}", file=sys.stderr)
            return ended.code if isinstance(ended.code, int) and ended.code else 1
        except Exception:
            traceback.print_exc()
            return 1


def main(device: str) -> None:
    """Carry out the jobs that standard input names, until it ends."""
    # away from where a job, or what it starts, would read a name or print something that were taken for an answer
    names, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    if device.startswith("cuda"):
        config = importlib.import_module("torch._dynamo").config
        config.recompile_limit = config.accumulated_recompile_limit = VARIANTS
    for line in names:
        code = carried_out(Path(line.strip()), device)
        print(json.dumps({"code": code}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
