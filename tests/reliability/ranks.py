"""Runs of several processes: one is killed, one is stuck, and any number of them learns what one alone does."""

import dataclasses
import datetime
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softvq.errors import RunError
from softvq.training import distributed, generator_run, tokenizer_run
from softvq.training.trainer import Trainer
from tests import generators
from tests.ranks import free_ports
from tests.reliability import exact, harness
from tests.reliability.harness import apart, code_of, fork, outcome

Figures = dict[str, Any]
KINDS = ("tokenizer", "sit", "dit", "mar")
NUDGED = "nudged"
"""A path of one process that begins with weights which rounding alone could have made."""


def as_ranks(count: int, work: Callable[[], object], **more: str) -> list[int]:
    """Do something in so many forks that find each other as under `torchrun`; return their exit codes."""
    return [code_of(pid) for pid in start_ranks(count, work, **more)]


def start_ranks(count: int, work: Callable[[], object], **more: str) -> list[int]:
    """Begin the same; return their processes."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), **more}
    os.environ.update(common)
    pids = []
    for rank in range(count):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        pids.append(fork(work))
    for key in (*common, "RANK", "LOCAL_RANK"):
        del os.environ[key]
    return pids


def elastic(folder: Path, restarts: int = 3) -> Figures:
    """Two ranks, of which one is killed: the other ends with a sentence, both start again, and nothing is different.

    They are started and restarted as by `torchrun --max-restarts 3`, whose agent cannot fork a process safely.
    """
    codes = [_restarted(folder, name, victim, restarts) for name, victim in (("two", False), ("killed-two", True))]
    identical = outcome(folder / "two") == outcome(folder / "killed-two")
    return {
        "codes": codes,
        "identical": identical,
        "apart_from_one_process": apart(folder / "reference", folder / "two"),
    }


def _restarted(folder: Path, name: str, victim: bool, restarts: int) -> list[list[int]]:
    """Return the exit codes of both ranks in each attempt."""
    codes: list[list[int]] = []
    while len(codes) <= restarts and (not codes or any(codes[-1])):
        work = functools.partial(_with_a_victim, folder, name, victim)
        codes.append(as_ranks(2, work, TORCHELASTIC_MAX_RESTARTS=str(restarts)))
    return codes


def _with_a_victim(folder: Path, name: str, victim: bool) -> None:
    original, mark = tokenizer_run.batches, folder / "victim"

    def deadly(*args: Any) -> Any:
        for place, batch in enumerate(original(*args)):
            if victim and place == 8 and os.environ["RANK"] == "1" and not mark.exists():
                mark.write_text("")
                harness.kill_self()
            yield batch

    tokenizer_run.batches = deadly
    tokenizer_run.train_tokenizer(harness.run_config(folder), folder / name, resume=True)


def stuck(folder: Path, patience: float, held: int) -> Figures:
    """Of two ranks, one that is slow for a moment, and then the other, or the same, stuck in its data for ever."""
    name = f"stuck-{held}"
    began, pids = time.monotonic(), start_ranks(2, functools.partial(_held_up, folder, name, held, patience))
    code = code_of(pids[1 - held])
    seconds = time.monotonic() - began
    os.kill(pids[held], signal.SIGKILL)
    code_of(pids[held])
    steps = [line["step"] for line in harness.lines_of(folder / name)]
    return {"code": code, "seconds": seconds, "said": (folder / f"{name}.txt").read_text(), "steps": steps}


def _held_up(folder: Path, name: str, held: int, patience: float) -> None:
    original, distributed.PATIENCE = tokenizer_run.batches, datetime.timedelta(seconds=patience)

    def held_up(*args: Any) -> Any:
        for place, batch in enumerate(original(*args)):
            if place == 1 and os.environ["RANK"] == "1":
                time.sleep(patience / 4)
            if place == 3 and os.environ["RANK"] == str(held):
                time.sleep(600)
            yield batch

    tokenizer_run.batches = held_up
    try:
        tokenizer_run.train_tokenizer(harness.run_config(folder, steps=6, sample_every=0), folder / name)
    except RunError as error:
        (folder / f"{name}.txt").write_text(str(error))
        raise


def independence(
    folder: Path,
    kind: str,
    steps: int,
    paths: dict[str, list[int]],
    *,
    double: bool = False,
    start: int = 8,
    **optim: Any,
) -> dict[str, float]:
    """Train with one process and with others, also changing their number on the way.

    Args:
        folder: Where the runs go.
        kind: `tokenizer`, with a discriminator, or a kind of generator.
        steps: Updates of each run.
        paths: By a name each: how many processes do each equal part of the run; `NUDGED` is what it says.
        double: Compute in float64 throughout.
        start: Step from which the discriminator counts.
        optim: What the recipe's `optim` has otherwise.

    Returns:
        By the same names, the largest relative difference of a loss from the run of one process.
    """
    if kind == "tokenizer" and not (folder / "photographs").exists():
        harness.make_photographs(folder)
    if kind != "tokenizer" and not (folder / "cache").exists():
        generators.make_cache(folder)
    found = {}
    setup = _Setup(folder=folder, kind=kind, steps=steps, double=double, start=start, optim=optim)
    for name, counts in {"1": [1], **paths}.items():
        run = folder / f"{kind}-{name}"
        ends = [steps * part // len(counts) for part in range(1, len(counts) + 1)]
        for count, end in zip(counts, ends, strict=True):
            codes = as_ranks(count, lambda end=end, run=run: _train(setup, run, end))
            assert codes == [0 if end == steps else 75] * count, (name, codes)
        found[name] = apart(folder / f"{kind}-1", run)
        if kind == "tokenizer" and start < steps:
            found[name] = max(found[name], apart(folder / f"{kind}-1", run, "critic_loss"))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    folder: Path
    kind: str
    steps: int
    double: bool
    start: int
    optim: dict[str, Any]


def _train(setup: _Setup, run: Path, end: int) -> None:
    if setup.double:
        exact.compute_in_float64()
    if run.name.endswith(NUDGED):
        exact.nudge_weights()
    original, steps, folder = Trainer.update, setup.steps, setup.folder

    def update(self: Trainer, batch: Any) -> Any:
        if self.step == end - 1 and end < steps and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    Trainer.update = update
    often = {"save_every": steps, "sample_every": 0}
    if setup.kind == "tokenizer":
        config = harness.run_config(folder, optim=setup.optim, start=setup.start, steps=steps, **often)
        tokenizer_run.train_tokenizer(config, run, resume=run.exists())
    else:
        options = {f"optim__{name}": value for name, value in setup.optim.items()}
        options |= {f"train__{name}": value for name, value in {"steps": steps, **often}.items()}
        config = generators.run_config(setup.kind, latents=folder / "cache", **options)
        generator_run.train_generator(config, run, resume=run.exists())
