"""Every fault on purpose, in full: runs killed, stopped and starved, damaged checkpoints, hostile files, and a soak.

    python benchmarks/reliability.py [--kills 50] [--minutes 10] [--out reliability.json]

Prints a table of what was asked and what was reached, and writes it as JSON. Everything runs on the CPU, in forks of
this process, which imports everything once. The tests have the same campaigns, shorter: `tests/reliability`,
`tests/security`.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from softvq.config import to_yaml
from softvq.training.checkpoint import latest, verify
from tests.reliability import campaigns, disk, harness, power, ranks
from tests.security import campaigns as hostile

Row = tuple[str, str, str, bool]
SOAK_STEPS = 240
RANK_STEPS = 200
DOUBLE = ((1e-4, RANK_STEPS), (1e-3, 40), (1e-3, RANK_STEPS))
"""Rates of learning and steps of the tokenizer's comparisons in float64."""


def faults(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each fault: its name, what is asked, what was reached, and whether that suffices."""
    whole = harness.reference(folder)
    kills = arguments.kills
    found = campaigns.kills(folder, whole, kills)
    right = kills - len(found["mismatches"])
    reached = f"{right}/{kills}, {found['kills_in_saves']} of them inside saves"
    yield "kill -9, discriminator on, 0 or 1 data workers", f"{kills}/{kills} identical", reached, right == kills
    found = campaigns.terminations(folder, whole, arguments.stops)
    inside = arguments.stops - found["outside_of_training"]
    reached = f"{found['identical']}/{arguments.stops}; {found['saved_and_75']}/{inside} in training saved, exit 75"
    ok = found["identical"] == arguments.stops and found["saved_and_75"] == inside and found["slowest_seconds"] < 10
    reached += f", at most {found['slowest_seconds']:.1f} s"
    yield "SIGTERM at random moments", f"{arguments.stops} identical, <= 10 s", reached, ok
    found = campaigns.signals(folder, whole)
    asked, reached = (
        f"{found['cases']}/{found['cases']}",
        "; ".join([f"{found['right']}/{found['cases']}", *found["wrong"]]),
    )
    yield "each signal, twice, in a save, in sampling, in a stall", asked, reached, not found["wrong"]
    right = stopped_after_every_step(folder, whole)
    asked = f"{harness.STEPS - 1}/{harness.STEPS - 1} identical"
    yield "stopped after every step", asked, f"{right}/{harness.STEPS - 1}", right == harness.STEPS - 1
    found = ranks.elastic(folder)
    reached = f"{'identical' if found['identical'] else 'different'}, {found['apart_from_one_process']:.1e} from one"
    ok = found["identical"] and found["codes"][1][0] == [3, -9] and found["apart_from_one_process"] <= 1e-5
    yield "one rank of two killed: the other ends, both restart", "identical, <= 1e-5 from one process", reached, ok
    yield torchrun(folder)
    yield from environments(folder, whole)


def torchrun(folder: Path) -> Row:
    """Kill a rank under `torchrun --max-restarts`, and compare with the run of two ranks that nothing happened to."""
    run, recipe = folder / "torchrun", folder / "recipe.yaml"
    recipe.write_text(to_yaml(harness.run_config(folder)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "--"]
    command = [*launch, "softvq", "train", "tokenizer", "--config", str(recipe), "--run", str(run), "--resume"]
    agent = subprocess.Popen([sys.executable, *command], env=environment(), stderr=subprocess.DEVNULL)
    while agent.poll() is None and len(harness.lines_of(run)) < 8:
        time.sleep(0.05)
    os.kill(json.loads((run / "status.json").read_text())["process"], signal.SIGKILL)
    code = agent.wait()
    identical = harness.outcome(run) == harness.outcome(folder / "two")
    reached = f"exit code {code}, {'identical' if identical else 'different'}"
    return "a rank killed under torchrun --max-restarts 3", "exit code 0, identical", reached, identical and code == 0


def environment(**changes: str) -> dict[str, str]:
    """Return the variables for an interpreter that finds softvq and the tests."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **changes}


def stopped_after_every_step(folder: Path, whole: harness.Reference) -> int:
    """Stop a run after each of its steps but the last, resume it, and return how often it ended identical."""
    right = 0
    for stop in range(1, harness.STEPS):

        def work(stop: int = stop) -> None:
            from softvq.training import tokenizer_run

            original = tokenizer_run.batches

            def ending(*given: Any) -> Iterator[Any]:
                for place, batch in enumerate(original(*given), 1):
                    if place == stop:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

            tokenizer_run.batches = ending
            harness.train(folder, "stopped")

        code = harness.code_of(harness.fork(work))
        saved = latest(folder / "stopped")
        at_once = code == 75 and saved is not None and saved.step == stop
        right += at_once and harness.trained(folder, "stopped") == 0 and same(folder / "stopped", whole)
        shutil.rmtree(folder / "stopped")
    return right


def same(run: Path, whole: harness.Reference) -> bool:
    """Return whether a run left what the one without faults left."""
    return harness.outcome(run) == whole.outcome


def environments(folder: Path, whole: harness.Reference) -> Iterator[Row]:
    """Train with another time zone, locale, hash seed, umask and current folder, each in an interpreter of its own."""
    odd = folder / "ein Verzeichnis für Läufe"
    odd.mkdir()
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path; from tests.reliability import harness;"
    )
    code += "harness.train(Path(sys.argv[1]), sys.argv[2])"
    changes = [{"TZ": "Pacific/Apia"}, {"LC_ALL": "C", "LANG": "C"}, {"PYTHONHASHSEED": "7"}, {"PYTHONHASHSEED": "8"}]
    right = 0
    for number, change in enumerate(changes):
        command = [sys.executable, "-c", code, str(folder), f"odd-{number}"]
        done = subprocess.run(command, cwd=odd, env=environment(**change), check=False)
        right += done.returncode == 0 and same(folder / f"odd-{number}", whole)
    yield "time zone, locale, hash seed, current folder", "4/4 identical", f"{right}/4", right == 4


def files(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each fault of checkpoints on disk."""
    count = arguments.corruptions
    found = disk.corruptions(folder, count)
    reached = f"{found['detected']}/{count} detected, {found['fell_back']}/{count} fell back"
    ok = found["detected"] == found["fell_back"] == count
    yield "one byte of a checkpoint changed", f"{count}/{count}, the one before is used", reached, ok
    found = disk.cuts(folder, 100)
    yield (
        "checkpoint files cut, emptied, deleted",
        "all detected",
        f"{found['detected']}/{found['cut']}",
        (found["detected"] == found["cut"]),
    )
    found = disk.crashes(folder)
    ok = found["survived"] == found["places"] and found["never_back_and_forth"]
    yield "crash at every file-system call of a save", "0 lost", f"{found['survived']}/{found['places']} survived", ok
    found = disk.flaky_disk(folder)
    ok = found["survived"] == found["places"]
    yield "EIO at every file-system call of a save", "0 lost", f"{found['survived']}/{found['places']} survived", ok
    states = arguments.power_states
    found = power.power_losses(folder, states)
    reached = f"{found['survived']}/{states}, {found['with_the_new_one']} with the new one"
    yield (
        "power lost in a save: names and data that were not flushed",
        "0 lost, >= 200 states",
        reached,
        (found["survived"] == states),
    )
    found = disk.full_disk(folder, 20)
    yield "disk full in a save", "20/20 keep the last", f"{found['survived']}/20", found["survived"] == 20
    found = disk.leaks(folder, 200)
    reached = f"{found['handles']} handles, {found['threads']} threads, {found['mebibytes']:+.1f} MiB"
    yield "200 saves", "nothing left open", reached, (found["handles"], found["threads"]) == (0, 0)


def strangers(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each kind of hostile file."""
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "pickles as weights": lambda: hostile.pickles(folder),
        "hostile safetensors": lambda: hostile.safetensors(folder),
        "configs that name code, unfold, or ask for too much": lambda: hostile.configs(folder),
        "image bombs": hostile.bombs,
        "images of other formats": hostile.formats,
    }
    for kind, campaign in kinds.items():
        found = campaign()
        asked = f"{found['files']}/{found['files']} refused, <= 200 MiB"
        reached = f"{found['refused']}/{found['files']}, {found['most_mebibytes']} MiB, {found['slowest_seconds']} s"
        reached += f", {found['ran']} ran" if "ran" in found else ""
        ok = found["refused"] == found["files"] and not found.get("ran") and found["most_mebibytes"] <= 200
        yield kind, asked, reached, ok
    for kind, found in {
        "mutated JPEG, PNG, WebP": hostile.mutated_images(arguments.mutations),
        "mutated safetensors": hostile.mutated_safetensors(folder, 2 * arguments.mutations),
    }.items():
        done = found["read"] + found["refused"]
        reached = (
            f"{done}/{found['files']} read or refused, {found['slowest_seconds']} s, {found['most_mebibytes']} MiB"
        )
        yield kind, "0 crashes, 0 above 1 s", reached, done == found["files"] and found["slowest_seconds"] <= 1


def others(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each fault of one part of a run, and of commands that are no runs."""
    whole = harness.reference(folder)
    found = campaigns.workers(folder, whole, 30)
    reached = f"{found['identical']}/{found['runs']}, {found['kills']} workers killed"
    yield "data workers killed, up to three in a run", "all identical", reached, found["identical"] == found["runs"]
    found = campaigns.memory(folder, 3, steps=200)
    ok = found["codes"] == [3, 3, 3, 0] and found["apart"] <= 1e-6
    yield "memory lacked three times, twice as many parts each time", "<= 1e-6", f"{found['apart']:.1e}", ok
    both = [ranks.stuck(folder, 5.0, rank) for rank in (0, 1)]
    named = sum(f"process {rank} of" in found["said"] for rank, found in enumerate(both))
    ok = named == 2 and all(found["steps"] == [1, 2, 3] for found in both)
    reached = f"{named}/2 named, after {max(found['seconds'] for found in both):.1f} s with a limit of 5"
    yield "a rank that is slow, then one that is stuck", "waited for; 2/2 named", reached, ok
    found = campaigns.commands(folder / "commands", arguments.stops // 2)
    count = arguments.stops // 2 * 2
    reached = f"{found['identical']}/{count}, {found['kills']} of them killed in time"
    yield "sample and evaluate killed, begun again", f"{count}/{count} identical", reached, found["identical"] == count
    found = campaigns.long_run(folder, 2000)
    reached = f"{100 * found['growth']:+.1f} %, {found['handles']} handles, {found['threads']} threads"
    ok = found["growth"] <= 0.02 and found["handles"] <= 0 and found["threads"] <= 0
    yield "2,000 steps, after the first 500", "<= 2 % more memory, nothing left open", reached, ok


def world_sizes(folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each kind of training: the loss with other numbers of processes, changed on the way as well.

    A GAN magnifies what rounding begins, so each row also has one process alone whose weights begin one rounding off.
    """
    changing = {"2>1": [2, 1], "2>4": [2, 4], "1>2>4>1": [1, 2, 4, 1]}
    paths = {ranks.NUDGED: [1], "2": [2], "4": [4], **changing}
    trainings = [("tokenizer", rate, RANK_STEPS, False, 8) for rate in arguments.rates]
    trainings += [("tokenizer", rate, steps, True, 8) for rate, steps in DOUBLE]
    trainings += [("tokenizer", 1e-3, RANK_STEPS, True, RANK_STEPS)]
    trainings += [(kind, 1e-3, RANK_STEPS, False, 0) for kind in ranks.KINDS if kind != "tokenizer"]
    for number, (kind, lr, steps, double, start) in enumerate(trainings):
        place = folder / str(number)
        place.mkdir()
        options = {"double": double, "start": start, "lr": lr, "warmup_steps": steps // 4}
        found = ranks.independence(place, kind, steps, paths, **options)
        worst = max(found[name] for name in paths if name != ranks.NUDGED)
        limit = 1e-10 if double else 1e-5
        reached = ", ".join(f"{name}: {found[name]:.1e}" for name in paths)
        kind += " and discriminator" if 0 < start < steps else ""
        what = f"{kind} at {lr:g}, {steps} steps in float{64 if double else 32}, other numbers of processes than 1"
        yield what, f"<= {limit:g}, or 10 x nudged", reached, worst <= max(limit, 10 * found[ranks.NUDGED])


def soak(folder: Path, minutes: float) -> Row:
    """One long run, again and again: kills, SIGTERM, full disks and corrupt images at random, for some minutes."""
    harness.make_photographs(folder, 40)
    for place in range(0, 40, 8):
        path = folder / "photographs" / f"{place}.jpg"
        path.write_bytes((b"", b"no picture", path.read_bytes()[:300])[place // 8 % 3])
    settings = {"steps": SOAK_STEPS}
    assert harness.trained(folder, "reference", **settings) == 0
    expected = harness.outcome(folder / "reference", SOAK_STEPS)
    draws, began = random.Random(0), time.monotonic()
    counts = {"kills": 0, "stops": 0, "full disks": 0, "runs": 0, "wrong": 0, "unreadable": 0}
    seconds = 5.0
    while time.monotonic() - began < 60 * minutes:
        fault = draws.choice(("kills", "kills", "stops", "full disks"))
        room = draws.randrange(20_000) if fault == "full disks" else None
        pid = harness.fork(lambda room=room: crowded(folder, room, settings))
        time.sleep(draws.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL if fault == "kills" else signal.SIGTERM)
        code = harness.code_of(pid)
        counts[fault] += 1
        lines = harness.lines_of(folder / "run") if (folder / "run").exists() else []
        counts["wrong"] += sum(line not in expected["log"] for line in lines)
        saved = latest(folder / "run")
        counts["unreadable"] += saved is None and any((folder / "run" / "checkpoints").glob("step-????????"))
        counts["wrong"] += code == 1
        if code == 0 or (saved and saved.step >= SOAK_STEPS):
            ended = harness.trained(folder, "run", **settings)
            counts["wrong"] += ended != 0 or harness.outcome(folder / "run", SOAK_STEPS) != expected
            counts["runs"] += 1
            shutil.rmtree(folder / "run")
    if (folder / "run").exists():
        counts["wrong"] += harness.trained(folder, "run", **settings) != 0
        counts["wrong"] += harness.outcome(folder / "run", SOAK_STEPS) != expected
        saved = latest(folder / "run")
        counts["unreadable"] += saved is None or verify(saved.folder) is not None
        counts["runs"] += 1
    reached = ", ".join(f"{count} {name}" for name, count in counts.items())
    ok = counts["wrong"] == counts["unreadable"] == 0
    return f"soak of {minutes:g} min: kill -9, SIGTERM, full disk, corrupt images", "exact log, loadable", reached, ok


def crowded(folder: Path, room: int | None, settings: dict[str, Any]) -> None:
    """Train, after a moment with a disk on which no file may grow beyond `room` bytes."""
    if room is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        signal.signal(signal.SIGALRM, lambda *given: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard)))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
    harness.train(folder, "run", **settings)


def machine() -> str:
    """Return what it ran on."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
    return (
        f"{os.cpu_count()} cores of {name}, no GPU used, Python {platform.python_version()}, torch {torch.__version__}"
    )


def main() -> int:
    """Run all campaigns; the exit code says whether all was reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--power-states", type=int, default=1000)
    parser.add_argument("--mutations", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=30)
    rates = "of learning, of the tokenizer of the part ranks in float32"
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-5, 3e-5, 1e-4, 1e-3], help=rates)
    parser.add_argument("--only", choices=["runs", "files", "strangers", "others", "ranks", "soak"])
    parser.add_argument("--out", type=Path, default=Path("reliability.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Path], Iterator[Row]]] = {
        "files": lambda folder: files(folder, arguments),
        "strangers": lambda folder: strangers(folder, arguments),
        "runs": lambda folder: faults(folder, arguments),
        "others": lambda folder: others(folder, arguments),
        "ranks": lambda folder: world_sizes(folder, arguments),
        "soak": lambda folder: iter([soak(folder, arguments.minutes)]),
    }
    console = Console(width=160)
    table = Table("fault", "asked", "reached", "", title=machine())
    rows = []
    for name, part in parts.items():
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory(prefix=f"softvq-{name}-") as folder:
                for row in part(Path(folder)):
                    rows.append(dict(zip(("fault", "asked", "reached", "ok"), row, strict=True)))
                    console.print(f"{'ok ' if row[3] else 'NOT'} {row[0]}: {row[2]}", markup=False, soft_wrap=True)
                    table.add_row(*row[:3], "ok" if row[3] else "NOT")
    console.print(table)
    arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
