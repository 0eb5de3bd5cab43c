"""The faults, each as a function that says how often it was survived; `benchmarks/reliability.py` runs them in full.

Campaigns that fork trainers need a process without threads, in which everything is imported.
"""

import builtins
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from softvq.errors import RunError
from softvq.training.checkpoint import latest, load, recover, save, verify
from tests.ranks import free_ports
from tests.reliability import harness
from tests.reliability.harness import Reference, code_of, fork, outcome, train, trained

Figures = dict[str, Any]


def kills(folder: Path, whole: Reference, count: int, seed: int = 0, in_saves: float = 0.4) -> Figures:
    """`kill -9` at random moments and inside saves, with other numbers of data workers, until `count` were survived."""
    draws, number = random.Random(seed), 0
    found: Figures = {"kills": 0, "kills_in_saves": 0, "runs": 0, "resumed_in_the_middle": 0, "mismatches": []}
    while found["kills"] < count or found["runs"] <= number:
        name = f"killed-{number}"
        enough = found["kills"] >= count
        in_save = not enough and draws.random() < in_saves
        workers = draws.choice([0, 0, 1])
        call, which = draws.randrange(60), draws.randrange(3)

        def work(name: str = name, in_save: bool = in_save, workers: int = workers, at: Any = (call, which)) -> None:
            if in_save:
                harness.at_call_of_save(*at, harness.kill_self)
            train(folder, name, workers)

        pid = fork(work)
        if not in_save and not enough:
            time.sleep(draws.uniform(0, whole.seconds / 2))
            os.kill(pid, signal.SIGKILL)
        code = code_of(pid)
        found["mismatches"] += [line for line in harness.lines_of(folder / name) if line not in whole.outcome["log"]]
        if code == -signal.SIGKILL:
            found["kills"] += 1
            found["kills_in_saves"] += in_save
            found["resumed_in_the_middle"] += any((folder / name).glob("checkpoints/step-????????"))
            continue
        left = outcome(folder / name)
        if code or left != whole.outcome:
            others = [key for key in {**whole.outcome, **left} if whole.outcome.get(key) != left.get(key)]
            found["mismatches"].append(f"{name} ended with {code} and other {', '.join(others)}")
        found["runs"] += 1
        shutil.rmtree(folder / name)
        number += 1
        if enough:
            break
    return found


def terminations(folder: Path, whole: Reference, count: int, seed: int = 0) -> Figures:
    """SIGTERM at random moments: saved at the step where it stopped, exit code 75, and the resumed run identical."""
    draws = random.Random(seed)
    found: Figures = {"sent": 0, "saved_and_75": 0, "outside_of_training": 0, "identical": 0, "slowest_seconds": 0.0}
    while found["sent"] < count:
        name = f"stopped-{found['sent']}"
        pid = fork(lambda name=name: train(folder, name))
        time.sleep(draws.uniform(0, whole.seconds))
        os.kill(pid, signal.SIGTERM)
        started = time.monotonic()
        code = code_of(pid)
        found["slowest_seconds"] = max(found["slowest_seconds"], time.monotonic() - started)
        if code == 75:
            status = json.loads((folder / name / "status.json").read_text())
            saved = latest(folder / name)
            right = status["state"] == "interrupted" and saved is not None and saved.step == status["step"]
            found["saved_and_75"] += right
        else:  # before the first step, after the last, or finished
            found["outside_of_training"] += code in (0, -signal.SIGTERM)
        found["sent"] += 1
        found["identical"] += trained(folder, name) == 0 and outcome(folder / name) == whole.outcome
        shutil.rmtree(folder / name)
    return found


def signals(folder: Path, whole: Reference) -> Figures:
    """Each signal, also twice, inside a save, while sampling and while data stalls: exit code, and what is left."""

    def send(number: int) -> Callable[[], None]:
        # two equal signals that wait for the same moment would arrive as one
        return lambda: (os.kill(os.getpid(), number), time.sleep(0.1))[0]

    def in_save(*numbers: int) -> Callable[[], None]:
        return lambda: harness.at_call_of_save(9, 1, lambda: [send(number)() for number in numbers])

    def in_batch(*numbers: int, stall: float = 0.0) -> Callable[[], None]:
        def arm() -> None:
            from softvq.training import tokenizer_run

            original = tokenizer_run.batches

            def slow(*args: Any) -> Any:
                for place, batch in enumerate(original(*args)):
                    if place == 7:
                        for number in numbers:
                            send(number)()
                        time.sleep(stall)
                    yield batch

            tokenizer_run.batches = slow

        return arm

    def in_sample(number: int) -> Callable[[], None]:
        def arm() -> None:
            from softvq.training import tokenizer_run

            original = tokenizer_run.to_image
            tokenizer_run.to_image = lambda *args: (send(number)(), original(*args))[1]

        return arm

    term, cases = signal.SIGTERM, {}
    cases["SIGTERM in a batch"] = (in_batch(term), 75)
    cases["SIGINT in a batch"] = (in_batch(signal.SIGINT), 75)
    cases["SIGHUP in a batch"] = (in_batch(signal.SIGHUP), 75)
    cases["SIGTERM while data stalls"] = (in_batch(term, stall=0.3), 75)
    cases["SIGTERM in a save"] = (in_save(term), 75)
    cases["SIGTERM while sampling"] = (in_sample(term), 75)
    cases["SIGTERM twice in a batch"] = (in_batch(term, term), 128 + term)
    cases["SIGTERM twice in a save"] = (in_save(term, term), 128 + term)
    cases["SIGUSR1 in a batch"] = (in_batch(signal.SIGUSR1), 0)
    found: Figures = {"cases": len(cases), "right": 0, "wrong": []}
    for number, (case, (arm, expected)) in enumerate(cases.items()):
        name = f"signal-{number}"
        code = code_of(fork(lambda arm=arm, name=name: (arm(), train(folder, name, keep=99))))
        steps = sorted(int(path.name[5:]) for path in (folder / name / "checkpoints").glob("step-????????"))
        intact = all(verify(folder / name / f"checkpoints/step-{step:08d}") is None for step in steps)
        extra = expected == 75 or case.startswith("SIGUSR1")
        saved = any(step % harness.SAVE_EVERY for step in steps if step < harness.STEPS) or "save" in case
        resumed = trained(folder, name, keep=99) == 0 and outcome(folder / name) == whole.outcome
        if code == expected and intact and resumed and (saved or not extra):
            found["right"] += 1
        else:
            found["wrong"].append(f"{case}: code {code}, steps {steps}, intact {intact}, identical {resumed}")
        shutil.rmtree(folder / name)
    return found


def elastic(folder: Path, restarts: int = 3) -> Figures:
    """Two ranks, of which one is killed: the other ends with a sentence, both start again, and nothing is different.

    They are started and restarted as by `torchrun --max-restarts 3`, whose agent cannot fork a process safely.
    """
    codes = [_as_torchrun(folder, name, victim, restarts) for name, victim in (("two", False), ("killed-two", True))]
    identical = outcome(folder / "two") == outcome(folder / "killed-two")
    one = {line["step"]: line["loss"] for line in harness.lines_of(folder / "reference") if "loss" in line}
    two = {line["step"]: line["loss"] for line in harness.lines_of(folder / "two") if "loss" in line}
    apart = max(abs(two[step] / one[step] - 1) for step in one) if two.keys() == one.keys() else float("inf")
    return {"codes": codes, "identical": identical, "apart_from_one_process": apart}


def _as_torchrun(folder: Path, name: str, victim: bool, restarts: int) -> list[list[int]]:
    """Return the exit codes of both ranks in each attempt."""
    codes: list[list[int]] = []
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_MAX_RESTARTS": str(restarts)}
    while len(codes) <= restarts and (not codes or any(codes[-1])):
        os.environ.update(common, MASTER_PORT=str(free_ports(1)[0]))
        pids = []
        for rank in range(2):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            pids.append(fork(lambda: _rank(str(folder), name, victim)))
        codes.append([code_of(pid) for pid in pids])
    for key in (*common, "MASTER_PORT", "RANK", "LOCAL_RANK"):
        del os.environ[key]
    return codes


def _rank(folder: str, name: str, victim: bool) -> None:
    from softvq.training import tokenizer_run

    original, mark = tokenizer_run.batches, Path(folder) / "victim"

    def deadly(*args: Any) -> Any:
        for place, batch in enumerate(original(*args)):
            if victim and place == 8 and os.environ["RANK"] == "1" and not mark.exists():
                mark.write_text("")
                harness.kill_self()
            yield batch

    tokenizer_run.batches = deadly
    tokenizer_run.train_tokenizer(harness.run_config(Path(folder)), Path(folder) / name, resume=True)


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
