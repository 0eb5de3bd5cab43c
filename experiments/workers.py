"""Processes that carry out jobs one after another, so that imports, the GPU's context and compiled code are kept."""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from rich.console import Console

from experiments.plan import LATENTS, Job
from softvq.errors import InputError
from softvq.files import write_json, write_text

__all__ = ["carry_out", "placed"]

WORK = Path(__file__).with_name("work.py")
POLL_SECONDS = 0.1
STOP_SECONDS = 60.0
"""What a worker that was told to stop may take, in which a training saves."""


class Worker:
    """A process for one device; it is started with its first job, and anew where one has ended it.

    Args:
        device: Such as `cpu` or `cuda:0`.
        out: Where jobs have their folders.
        threads: Of the processor.
    """

    def __init__(self, device: str, out: Path, threads: int) -> None:
        self.job: Job | None = None
        self.started = 0.0
        self.shapes: set[str] = set()
        self._device, self._out, self._threads = device, out, threads
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, job: Job) -> None:
        """Give it a job, whose folder is made anew."""
        folder = self._out / job.name
        if folder.exists():  # of a job that was cut off, or of another recipe
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        if job.recipe:
            write_text(folder / "recipe.yaml", job.recipe)
        write_json(folder / "job.json", {"commands": [list(one) for one in job.commands], "sha256": job.sha256})
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            self._begin()
        self.job, self.started = job, time.monotonic()
        self.shapes.add(job.shape)
        with contextlib.suppress(BrokenPipeError):  # it died in this moment, which `ended` tells
            self._pipe("stdin").write(f"{job.name}\n".encode())
            self._pipe("stdin").flush()

    def ended(self) -> str | None:
        """Return how its job ended, '' if well, or None if it has not."""
        assert self.job is not None
        assert self._process is not None
        gone = self._process.poll() is not None  # before its answer is looked for, which may be its last word
        line = b""
        if select.select([self._pipe("stdout")], [], [], 0)[0]:
            line = self._pipe("stdout").readline()
            gone = gone or not line
        if not line and not gone:
            return None
        log = self._out / self.job.name / "log.txt"
        said = _last_line(log) if log.exists() else ""
        if not line:
            return f"{_death(self._process.wait())}; last it said: {said or 'nothing'}"
        code = json.loads(line)["code"]
        return "" if code == 0 else said or f"exit code {code}"

    def tell_to_stop(self) -> None:
        """Let it end, at once if it has a job."""
        if self._process is None:
            return
        if self.job is not None:
            self._process.terminate()
        with contextlib.suppress(BrokenPipeError):
            self._pipe("stdin").close()

    def stop(self) -> None:
        """Tell it to stop, wait, and end what it has started and left."""
        self.tell_to_stop()
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._pipe("stdout").close()
        self._process = None

    def _begin(self) -> None:
        name, environment = placed(self._device)
        environment |= {"OMP_NUM_THREADS": str(self._threads), "COLUMNS": "160"}
        self.shapes = set()
        self._process = subprocess.Popen(
            [sys.executable, str(WORK), name],
            cwd=self._out,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # the keyboard stops the runner alone, which then stops all of these
        )

    def _pipe(self, name: str) -> IO[bytes]:
        pipe = getattr(self._process, name)
        assert pipe is not None
        return pipe


def carry_out(todo: Sequence[Job], out: Path, slots: Sequence[str], threads: int, console: Console) -> dict[str, str]:
    """Run jobs, as many at a time as there are slots, each when what it needs is finished.

    Args:
        todo: In an order in which those that others need come first.
        out: Their folder.
        slots: A device for each.
        threads: Of the processor for each.
        console: Says how each ended.

    Returns:
        Why jobs failed, in a line, by name.
    """
    waiting, failed = {job.name: job for job in todo}, dict[str, str]()
    total, titles = len(todo), {job.name: job.title for job in todo}
    workers = [Worker(slot, out, threads) for slot in slots]
    try:
        while waiting or any(worker.job for worker in workers):
            _pass_over(waiting, failed, titles, console)
            for worker in (worker for worker in workers if worker.job is None):
                busy = {one.job.name for one in workers if one.job}
                ready = [job for job in waiting.values() if not any(p in waiting or p in busy for p in job.parents)]
                if ready:
                    others = {shape for one in workers for shape in one.shapes} - worker.shapes
                    worker.start(waiting.pop(_chosen(ready, worker.shapes, others).name))
            for worker in workers:
                ended = worker.ended() if worker.job else None
                if worker.job is None or ended is None:
                    continue
                name, worker.job = worker.job.name, None
                said = f"finished in {time.monotonic() - worker.started:.0f} s"
                if ended:
                    said = failed[name] = f"failed ({ended})"
                done = total - len(waiting) - sum(worker.job is not None for worker in workers)
                console.print(f"{titles[name]}: {said}, {done} of {total}", markup=False)
            _clear([*waiting.values(), *(worker.job for worker in workers if worker.job)], out)
            time.sleep(POLL_SECONDS if any(worker.job for worker in workers) else 0)
        _clear([], out)  # what a run that was cut off has left
    finally:
        for worker in workers:
            worker.tell_to_stop()  # all of them first, since each may take its time to save
        for worker in workers:
            worker.stop()
    return failed


def _pass_over(waiting: dict[str, Job], failed: dict[str, str], titles: Mapping[str, str], console: Console) -> None:
    """Let jobs fail that need one that failed."""
    for name, job in list(waiting.items()):
        lost = next((parent for parent in job.parents if parent in failed), None)
        if lost is not None:
            failed[name] = f"needs {titles[lost]}, which failed"
            console.print(f"{job.title}: {failed[name]}", markup=False)
            del waiting[name]


def _clear(left: Sequence[Job], out: Path) -> None:
    """Remove latents that none of the jobs that are left needs; the log of those that failed stays."""
    needed = {Path(parent).name for job in left for parent in job.parents}
    for result in (out / LATENTS).glob("*/result.json"):
        if result.parent.name not in needed:
            result.unlink()  # first, lest what is half removed be taken for whole
            shutil.rmtree(result.parent)


def _chosen(ready: Sequence[Job], own: set[str], others: set[str]) -> Job:
    """Return which job a worker takes, of those with the first one's seed.

    Args:
        ready: At least one, in their order.
        own: Shapes that the worker has compiled, which come first.
        others: Shapes that others have, which come last.

    Returns:
        One of them.
    """
    alike = [job for job in ready if job.seed == ready[0].seed]
    # sorting keeps the order of equals
    return min(alike, key=lambda job: (job.shape not in own, job.shape in others))


def placed(device: str) -> tuple[str, dict[str, str]]:
    """Return what a worker calls its device, and the environment in which it sees no other.

    Without it each would also hold memory on the first GPU.

    Args:
        device: `cpu`, or `cuda:0` and so on.

    Returns:
        The device's name there, and environment variables.

    Raises:
        InputError: If it is neither.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not index:
        return device, {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    if not index.isdigit() or (names is not None and int(index) >= len(names)):
        raise InputError(f"--device has {device!r}, expected cpu or a GPU there is, such as cuda:0")
    return "cuda", {"CUDA_VISIBLE_DEVICES": names[int(index)] if names else index}


def _death(code: int) -> str:
    """Say how a process ended that was not to end."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in {each.value for each in signal.Signals} else f"signal {-code}"
    hint = ", often for want of memory" if -code == signal.SIGKILL else ""
    return f"its process was ended by {name}{hint}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""
