"""What runs can meet, each as a function that says how often they survived; `benchmarks/reliability.py` has it whole.

Campaigns that fork trainers need a process without threads, in which everything is imported.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from softvq.cli import main
from softvq.errors import RunError
from softvq.training.checkpoint import latest, verify
from softvq.training.generator_run import train_generator
from softvq.training.trainer import Trainer
from tests import generators
from tests.program import contents, make_photos
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


def _cases() -> dict[str, tuple[Callable[[], None], int]]:
    """Return what is armed in a trainer, and the exit code that it ends with."""

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

    term = signal.SIGTERM
    cases: dict[str, tuple[Callable[[], None], int]] = {}
    cases["SIGTERM in a batch"] = (in_batch(term), 75)
    cases["SIGINT in a batch"] = (in_batch(signal.SIGINT), 75)
    cases["SIGHUP in a batch"] = (in_batch(signal.SIGHUP), 75)
    cases["SIGTERM while data stalls"] = (in_batch(term, stall=0.3), 75)
    cases["SIGTERM in a save"] = (in_save(term), 75)
    cases["SIGTERM while sampling"] = (in_sample(term), 75)
    cases["SIGTERM twice in a batch"] = (in_batch(term, term), 128 + term)
    cases["SIGTERM twice in a save"] = (in_save(term, term), 128 + term)
    cases["SIGUSR1 in a batch"] = (in_batch(signal.SIGUSR1), 0)
    return cases


def signals(folder: Path, whole: Reference) -> Figures:
    """Each signal, also twice, inside a save, while sampling and while data stalls: exit code, and what is left."""
    cases = _cases()
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


def memory(folder: Path, times: int, steps: int = 12, seed: int = 0) -> Figures:
    """Too little memory at random steps of a generator, and what the run is told to do: twice as many parts, and on."""
    draws, run = random.Random(seed), folder / "little-memory"
    if not (folder / "cache").exists():
        generators.make_cache(folder)
    assert code_of(fork(lambda: _learn(folder, folder / "enough-memory", steps, 1, None))) == 0
    found: Figures = {"codes": [], "said": []}
    for time_, step in enumerate([*sorted(draws.sample(range(1, steps), times)), None]):
        found["codes"].append(code_of(fork(lambda step=step, parts=2**time_: _learn(folder, run, steps, parts, step))))
        found["said"] += [] if step is None else [(folder / "said").read_text()]
    found["apart"] = harness.apart(folder / "enough-memory", run)
    return found


def _learn(folder: Path, run: Path, steps: int, parts: int, lacking: int | None) -> None:
    original = Trainer._differentiate

    def differentiate(self: Trainer, *args: Any, **options: Any) -> Any:
        if self.step == lacking:
            self._phase = "the backward pass of the model"
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *args, **options)

    Trainer._differentiate = differentiate
    often = {"steps": steps, "accumulate": parts, "save_every": 5, "batch_size": 8}
    config = generators.run_config(
        "sit", latents=folder / "cache", **{f"train__{name}": value for name, value in often.items()}
    )
    try:
        train_generator(config, run, resume=run.exists())
    except RunError as error:
        (folder / "said").write_text(str(error))
        raise


def commands(folder: Path, kills: int, seed: int = 0) -> Figures:
    """Evaluation and sampling, killed at random and begun again with `--overwrite`: the files of one that was not."""
    folder.mkdir()
    generators.make_generator(folder / "sit")
    make_photos(folder / "photos", tuple(f"{number}.png" for number in range(24)))
    found: Figures = {"kills": 0, "identical": 0, "different": []}
    sample = ["sample", "sit", "OUT", "--n", "24", "--steps", "2", "--batch-size", "2"]
    evaluate = ["evaluate", "reconstruction", "sit/tokenizer", "photos", "--perceptual", "none", "--out", "OUT"]
    for given in (sample, evaluate):
        began = time.monotonic()
        assert code_of(fork(lambda given=given: _command(folder, given, "whole"))) == 0
        seconds, whole = time.monotonic() - began, contents(folder / "whole")
        draws = random.Random(seed)
        for number in range(kills):
            name = f"killed-{number}"
            pid = fork(lambda given=given, name=name: _command(folder, given, name))
            time.sleep(draws.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            found["kills"] += code_of(pid) == -signal.SIGKILL
            again = [*given, "--overwrite"]
            assert code_of(fork(lambda again=again, name=name: _command(folder, again, name))) == 0
            left = contents(folder / name)
            differs = sorted(key for key in {**left, **whole} if left.get(key) != whole.get(key))
            found["identical"] += not differs
            found["different"] += differs
            shutil.rmtree(folder / name)
        shutil.rmtree(folder / "whole")
    return found


def _command(folder: Path, given: list[str], out: str) -> None:
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    code = main([out if word == "OUT" else word for word in given])
    assert code == 0, code


def workers(folder: Path, whole: Reference, kills: int, seed: int = 0) -> Figures:
    """`kill -9` of data workers, up to three in a run, whose restart nobody notices in the end."""
    draws, found = random.Random(seed), {"kills": 0, "runs": 0, "identical": 0}
    while found["kills"] < kills:
        pid, killed = fork(lambda: _with_workers(folder)), 0
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            time.sleep(draws.uniform(0, whole.seconds / 4))
            children = Path(f"/proc/{pid}/task/{pid}/children")
            others = children.read_text().split() if children.exists() else []
            if others and killed < 3:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(draws.choice(others)), signal.SIGKILL)
                    killed += 1
        found["kills"] += killed
        found["runs"] += 1
        found["identical"] += ended[1] == 0 and outcome(folder / "workers") == whole.outcome
        shutil.rmtree(folder / "workers")
    return found


def _with_workers(folder: Path) -> None:
    from torch.utils.data import dataloader

    dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)  # seconds; torch has 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(folder, "workers", num_workers=2)


def long_run(folder: Path, steps: int) -> Figures:
    """What many steps leave open: handles and threads, and the growth of memory after the first quarter."""
    read, write = os.pipe()
    pid = fork(lambda: _watched(folder, steps, write))
    os.close(write)
    with os.fdopen(read) as lines:
        first, last = (json.loads(line) for line in lines)
    assert code_of(pid) == 0
    growth = last["bytes"] / first["bytes"] - 1
    return {"growth": growth, **{name: last[name] - first[name] for name in ("handles", "threads")}}


def _watched(folder: Path, steps: int, pipe: int) -> None:
    original = Trainer.update

    def update(self: Trainer, batch: Any) -> Any:
        if self.step in (steps // 4, steps - 1):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            counts = {
                name: len(os.listdir(f"/proc/self/{at}")) for name, at in (("handles", "fd"), ("threads", "task"))
            }
            os.write(pipe, (json.dumps({"bytes": resident, **counts}) + "\n").encode())
        return original(self, batch)

    Trainer.update = update
    train(folder, "long", steps=steps, save_every=100, sample_every=500)
