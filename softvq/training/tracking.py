"""What a run says: one JSON line a log step always, TensorBoard if asked, a progress bar or plain lines for people.

Nothing here can stop a run: a full disk or a broken TensorBoard costs one warning.
"""

import contextlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from softvq.errors import Interrupted, RunError
from softvq.files import write_bytes, write_json

__all__ = ["Display", "Pace", "RunLog", "TensorBoard", "curve_value", "read_log", "run_status"]

Warn = Callable[[str], None]


def read_log(path: Path | str) -> list[dict[str, Any]]:
    """Return the records of a log; a line that a crash left unfinished is passed over.

    Every record has a `step`, and numbers that are the same however often the run was stopped; what the clock says is
    apart from them, under `clock`.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [record for line in lines if (record := _parse(line)) is not None]


def curve_value(value: object) -> float | None:
    """Return what a curve shows of a value in a log; nothing of texts, flags, and numbers that no float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # of a whole number with hundreds of digits
        return None


class RunLog:
    """The file `log.jsonl` of a run, which always ends up with the lines of a run that was never stopped.

    Args:
        path: The file; lines after `step`, which the run will write again, are cut off.
        step: Finished steps of the checkpoint the run goes on from, 0 for a new run.
        warn: Takes a sentence when the file cannot be written.
    """

    def __init__(self, path: Path, step: int, warn: Warn) -> None:
        self.path = path
        self.warn = warn
        self._pending = b""
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= step]
        if kept != lines or not path.exists():
            write_bytes(path, b"".join(kept))
        self._size = path.stat().st_size

    def write(self, step: int, values: Mapping[str, Any], clock: Mapping[str, float] | None = None) -> None:
        """Append a record; what cannot be written now is written with the next one.

        Args:
            step: Finished steps.
            values: Numbers, lists and texts, stored exactly; a number that is not finite becomes null.
            clock: Numbers that differ from run to run.
        """
        record = {"step": step, **values, **({"clock": dict(clock)} if clock else {})}
        self._pending += json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        self._flush()

    def sync(self) -> None:
        """Make the lines survive a power cut, before a checkpoint relies on them.

        Raises:
            RunError: If some could not be written: after a crash a run that went on from there would lack them.
        """
        if self._pending:
            self._flush()
        if self._pending:
            raise RunError(f"{self.path}: lacks lines that cannot be written, which a checkpoint would rely on")
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _flush(self) -> None:
        try:
            if not self.path.exists():  # someone took it away
                self._size = 0
            with self.path.open("r+b" if self._size else "wb") as file:
                file.truncate(self._size)  # cut what a write that failed midway may have left
                file.seek(self._size)
                file.write(self._pending)
        except OSError as error:
            self.warn(f"{self.path}: cannot be written ({error.strerror}); its lines are kept for later")
            return
        self._size += len(self._pending)
        self._pending = b""


class TensorBoard:
    """Scalars for TensorBoard in `tensorboard/` of a run; if anything about it fails, it warns once and stays silent.

    Args:
        run: Folder of the run.
        step: Finished steps of the checkpoint the run goes on from.
        warn: Takes the one sentence.
    """

    def __init__(self, run: Path, step: int, warn: Warn) -> None:
        self.warn = warn
        self._writer: Any = None
        with self._only_warn():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add every number among the values."""
        with self._only_warn():
            for name, value in values.items():
                if self._writer is not None and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is left."""
        with self._only_warn():
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _only_warn(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # someone else's code, on the side: whatever it raises must not end a run
            self._writer = None
            self.warn(f"TensorBoard is off from here on ({type(error).__name__}: {error}); log.jsonl goes on")


class Display:
    """Progress for people: a bar on a terminal, one line a log step elsewhere.

    Args:
        console: Where to.
        step: Finished steps at the start.
        steps: Steps of the whole run.
    """

    def __init__(self, console: Console, step: int, steps: int) -> None:
        self.console, self.steps = console, steps
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("", total=steps, completed=step, summary="") if self._bar else None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the bar, where there is one."""
        with self._bar or contextlib.nullcontext():
            yield

    def advance(self, step: int) -> None:
        """Move the bar to `step` finished steps."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, float], images_per_sec: float, seconds_left: float) -> None:
        """Show the numbers of a log step."""
        summary = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        summary += f"  {images_per_sec:.4g} images/s"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, summary=summary)
        else:
            left = f"{seconds_left // 3600:.0f}:{seconds_left // 60 % 60:02.0f}:{seconds_left % 60:02.0f}"
            self.console.print(
                f"step {step}/{self.steps}  {summary}  {left} left", markup=False, highlight=False, soft_wrap=True
            )


class Pace:
    """Seconds per step since it was last asked."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        """Return the seconds of each step since the last call, and begin to count anew."""
        before, self._step = self._step, step
        started, self._time = self._time, time.perf_counter()
        return (self._time - started) / max(1, step - before)


@contextlib.contextmanager
def run_status(run: Path, step: Callable[[], int], warn: Warn) -> Iterator[None]:
    """Keep `status.json` of a run true: `running`, then `finished`, `interrupted` or `failed`, and at which step.

    It is for schedulers, which cannot rely on exit codes when a launcher stands between. After a `kill -9` it still
    says `running`, with a process that no longer is.

    Args:
        run: Folder of the run.
        step: Returns the finished steps.
        warn: Takes a sentence when the file cannot be written.
    """

    def write(state: str, message: str = "") -> None:
        status = {"state": state, "step": step(), "message": message, "process": os.getpid()}
        try:
            write_json(run / "status.json", {**status, "host": socket.gethostname(), "time": time.time()})
        except RunError as error:
            warn(str(error))

    write("running")
    try:
        yield
    except Interrupted as error:
        write("interrupted", str(error))
        raise
    except BaseException as error:
        write("failed", str(error) or type(error).__name__)
        raise
    write("finished")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
