"""Weights & Biases and trackio, where a run is asked to report to them: on the side, never in its way.

They are other people's programs and talk to servers, so each call of them is made by a thread of its own, which nobody
waits for. Whatever one raises, or if it hangs, it costs the run one warning, and log.jsonl goes on.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softvq.config import read_yaml
from softvq.errors import InputError

__all__ = ["TRACKERS", "Tracker", "check_trackers"]

TRACKERS = ("wandb", "trackio")
PROJECT = "softvq"
MOST_WAITING = 1000
"""Lines that a tracker may be behind."""
PATIENCE = 20.0
"""Seconds that the end of a run waits for a tracker to be done."""


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Args:
        names: Of `train.trackers`.

    Raises:
        InputError: Naming what to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"train.trackers has {name}, which is not installed; run: pip install 'softvq[trackers]'")


class Tracker:
    """One tracker of one run.

    Args:
        name: `wandb` or `trackio`; both take the same calls.
        run: Folder of the run. Its name and a hash of its place are the run's name there, under which a resumed run
            goes on.
        warn: Takes one sentence, if anything is wrong.
        patience: Seconds to wait for it in the end.
    """

    def __init__(self, name: str, run: Path, warn: Callable[[str], None], patience: float = PATIENCE) -> None:
        self.name, self.run, self.warn, self.patience = name, run, warn, patience
        self._lines: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(MOST_WAITING)
        self._trouble: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"softvq-{name}", daemon=True)
        self._thread.start()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Hand over every number among the values; this never waits."""
        self._tell()
        if self._told:
            return
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        try:
            self._lines.put_nowait((step, numbers))
        except queue.Full:
            self._trouble = f"it is {MOST_WAITING} lines behind"
            self._tell()

    def close(self) -> None:
        """Let it finish what it has, for a while."""
        if self._thread.is_alive() and not self._told:
            with contextlib.suppress(queue.Full):
                self._lines.put_nowait(None)
            self._thread.join(self.patience)
            if self._thread.is_alive():
                self._trouble = self._trouble or f"it did not end within {self.patience:g} s"
        self._tell()

    def _tell(self) -> None:
        if self._trouble and not self._told:
            self._told = True
            self.warn(f"{self.name} is off from here on ({self._trouble}); log.jsonl goes on")

    def _work(self) -> None:
        place = hashlib.sha256(str(self.run.resolve()).encode()).hexdigest()[:8]
        name = f"{self.run.resolve().name}-{place}"
        try:
            tracker = importlib.import_module(self.name)
            more = {"id": name, "dir": str(self.run)} if self.name == "wandb" else {}
            recipe = self.run / "config.yaml"
            config = read_yaml(recipe) if recipe.exists() else {}
            tracker.init(project=PROJECT, name=name, config=config, resume="allow", **more)
            while (line := self._lines.get()) is not None:
                step, values = line
                tracker.log(values, step=step)
            tracker.finish()
        except BaseException as error:  # SystemExit, too: some end the process when they are not logged in
            self._trouble = f"{type(error).__name__}: {error}"
