"""What can happen to checkpoints on disk, each as a function that says how often it was survived."""

import builtins
import errno
import io
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from softvq.errors import RunError
from softvq.training.checkpoint import latest, load, recover, save, verify

Figures = dict[str, Any]


def tensors(step: int) -> dict[str, Tensor]:
    """Return what a checkpoint of a step holds."""
    draws = torch.Generator().manual_seed(step)
    return {"model.weight": torch.randn(64, 8, generator=draws), "ema.weight": torch.randn(64, 8, generator=draws)}


def run_with(run: Path, *steps: int, keep: int = 10) -> Path:
    """Save checkpoints of some steps."""
    for step in steps:
        save(run, step, tensors(step), {"note": step}, keep)
    return run


def holds(run: Path, *allowed: int) -> bool:
    """Return whether the newest checkpoint is of one of some steps, and bit for bit what was saved."""
    found = latest(run)
    if found is None or found.step not in allowed:
        return False
    loaded, info = load(found)
    same = all(torch.equal(loaded[name], value) for name, value in tensors(found.step).items())
    return same and info == {"note": found.step, "step": found.step}


def leaks(folder: Path, saves: int) -> Figures:
    """What many saves leave open: handles, threads, memory, files."""
    run = run_with(folder / "leaks", *range(1, 11), keep=2)

    def now() -> tuple[int, int, float]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), resident

    handles, threads, mebibytes = now()
    run_with(run, *range(11, 11 + saves), keep=2)
    after = now()
    return {
        "saves": saves,
        "handles": after[0] - handles,
        "threads": after[1] - threads,
        "mebibytes": round(after[2] - mebibytes, 1),
        "folders": len(list((run / "checkpoints").iterdir())),
    }


def corruptions(folder: Path, count: int, seed: int = 0) -> Figures:
    """One byte of the newest checkpoint changed: noticed, named, and the one before is used."""
    draws, run = random.Random(seed), run_with(folder / "corrupt", 10, 20)
    newest = run / "checkpoints/step-00000020"
    paths = [newest / name for name in ("state.safetensors", "state.json", "manifest.json")]
    found: Figures = {"changed": 0, "detected": 0, "fell_back": 0}
    for _ in range(count):
        path = draws.choice(paths)
        data = path.read_bytes()
        place = draws.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ draws.randrange(1, 256)]) + data[place + 1 :])
        said: list[str] = []
        found["changed"] += 1
        found["fell_back"] += recover(run, said.append) is not None and holds(run, 10)
        found["detected"] += len(said) == 1 and "step-00000020" in said[0]
        aside = newest.with_name(f"{newest.name}.corrupt")
        if aside.exists():
            aside.rename(newest)
        path.write_bytes(data)
    return found


def cuts(folder: Path, count: int, seed: int = 0) -> Figures:
    """Each file of the newest checkpoint cut at `count` places, emptied, and deleted."""
    draws, run = random.Random(seed), run_with(folder / "cut", 10, 20)
    found: Figures = {"cut": 0, "detected": 0}
    for name in ("state.safetensors", "state.json", "manifest.json"):
        path = run / "checkpoints/step-00000020" / name
        data = path.read_bytes()
        for length in (0, *(draws.randrange(len(data) - 1) for _ in range(count))):
            path.write_bytes(data[:length])
            found["cut"] += 1
            found["detected"] += verify(path.parent) is not None and holds(run, 10)
        path.unlink()
        found["cut"] += 1
        found["detected"] += verify(path.parent) is not None and holds(run, 10)
        path.write_bytes(data)
    assert holds(run, 20)
    return found


class Died(BaseException):
    """The process is no more: no call after this one has an effect either."""


CALLS = ("open", "mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "close", "chmod")


def _during_save(run: Path, before: Callable[[int, str], None]) -> None:
    """Save step 30 over 10 and 20, with something before each call to the file system, counted from 1."""
    import pytest

    calls = 0

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            before(calls, name)
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(io, "open", wrap("open", io.open))
        patch.setattr(builtins, "open", wrap("open", builtins.open))
        patch.setattr(safetensors.torch, "save_file", wrap("save_file", safetensors.torch.save_file))
        save(run, 30, tensors(30), {"note": 30}, keep=2)


def crashes(folder: Path) -> Figures:
    """A crash before each call to the file system that saving and pruning make: the previous or the new, whole."""
    start, n, finished = run_with(folder / "before", 10, 20), 0, False
    outcomes: list[int] = []
    found: Figures = {"places": 0, "survived": 0}
    while not finished:
        n += 1
        run = Path(shutil.copytree(start, folder / f"crash-{n}"))

        def die(call: int, name: str, n: int = n) -> None:
            if call >= n:
                raise Died

        try:
            _during_save(run, die)
            finished = True
        except Died:
            pass
        found["places"] += 1
        whole = holds(run, 20, 30)
        back = recover(run, lambda text: None)
        clean = not any((run / "checkpoints").glob("*.tmp-*"))
        save(run, 40, tensors(40), {"note": 40}, keep=2)
        found["survived"] += whole and clean and holds(run, 40) and len(list((run / "checkpoints").iterdir())) == 2
        outcomes.append(back.step if back else 0)
        shutil.rmtree(run)
    found["never_back_and_forth"] = outcomes == sorted(outcomes) and set(outcomes) == {20, 30}
    return found


def flaky_disk(folder: Path) -> Figures:
    """An input/output error at each call: an error in one sentence or a checkpoint, and never a lost one."""
    start, n, finished = run_with(folder / "steady", 10, 20), 0, False
    found: Figures = {"places": 0, "survived": 0}
    while not finished:
        n += 1
        run = Path(shutil.copytree(start, folder / f"flaky-{n}"))
        reached = False

        def fail(call: int, name: str, n: int = n) -> None:
            nonlocal reached
            if call == n:
                reached = True
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        try:
            _during_save(run, fail)
            whole = holds(run, 30)
        except RunError as error:
            whole = holds(run, 20, 30) and "Input/output error" in str(error)  # 30 if it has its name already
        finished = not reached
        found["places"] += 1
        save(run, 40, tensors(40), {"note": 40}, keep=2)
        found["survived"] += whole and holds(run, 40)
        shutil.rmtree(run)
    return found


def full_disk(folder: Path, count: int, seed: int = 0) -> Figures:
    """A disk that is full at a random size of the next file: the checkpoint before stays, the next save works."""
    draws, run = random.Random(seed), run_with(folder / "full", 10)
    found: Figures = {"full": 0, "survived": 0}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for _ in range(count):
        resource.setrlimit(resource.RLIMIT_FSIZE, (draws.randrange(4000), hard))
        try:
            save(run, 20, tensors(20), {"note": 20}, keep=1)
            refused = False
        except RunError as error:
            refused = "cannot be written" in str(error) and holds(run, 10)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        litter = [path.name for path in (run / "checkpoints").iterdir() if path.name != "step-00000010"]
        found["full"] += 1
        save(run, 20, tensors(20), {"note": 20}, keep=1)
        found["survived"] += refused and not litter and holds(run, 20)
        shutil.rmtree(run)
        run_with(run, 10)
    signal.signal(signal.SIGXFSZ, handler)
    return found
