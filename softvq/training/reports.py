"""Everything a run says at a step: a line of the log, TensorBoard, the display, warnings."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from softvq.errors import RunError
from softvq.training.trackers import Tracker
from softvq.training.tracking import Display, Pace, RunLog, TensorBoard, Warn

__all__ = ["Reports"]


class Reports:
    """Log, TensorBoard and display of a run as one.

    Args:
        run: Folder of the run.
        step: Finished updates.
        steps: Of the whole run.
        batch_size: Images of one update.
        console: For people.
        main: Whether this rank is the one that writes files.
        tensorboard: Whether this rank writes for TensorBoard as well.
        warn: Takes a sentence.
        trackers: Others that the first rank reports to.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        steps: int,
        batch_size: int,
        console: Console,
        main: bool,
        tensorboard: bool,
        warn: Warn,
        trackers: Sequence[str] = (),
    ) -> None:
        self.run, self.steps, self.batch_size, self.warn = run, steps, batch_size, warn
        self.display = Display(console, step, steps)
        self.log: RunLog | None = None
        self._main, self._tensorboard = main, tensorboard
        self._board: TensorBoard | None = None
        self._warned: set[str] = set()
        self._trackers = [Tracker(name, run, warn) for name in trackers] if main else []
        self.start_at(step)

    def start_at(self, step: int) -> None:
        """Go on after a step; what was written of later ones is cut off."""
        self.close()
        self._figures: dict[str, Any] = {}
        self.log = RunLog(self.run / "log.jsonl", step, self.warn) if self._main else None
        self._board = TensorBoard(self.run, step, self.warn) if self._tensorboard else None
        self._pace = Pace(step)

    def close(self) -> None:
        """Write out what is left."""
        if self._board:
            self._board.close()

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show a bar where there can be one; close everything in the end."""
        with self.display.live(), contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for tracker in self._trackers:
                stack.callback(tracker.close)
            yield

    def line(self, step: int, values: Mapping[str, float]) -> None:
        """Report the numbers of a log step.

        Args:
            step: Finished updates.
            values: By name.
        """
        seconds_per_step = self._pace.seconds_per_step(step)
        images_per_sec = self.batch_size / seconds_per_step
        self._figures.update(values)
        self.display.report(step, values, images_per_sec, seconds_per_step * (self.steps - step))
        if self.log:
            self.log.write(step, values, clock={"time": time.time(), "images_per_sec": images_per_sec})
        for other in (self._board, *self._trackers):
            if other:
                other.write(step, {**values, "images_per_sec": images_per_sec})

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Put something that is no number of a log step into the log."""
        self._figures.update(values.get("samples", {}))
        if self.log:
            self.log.write(step, values)

    def score(self, name: str | None) -> dict[str, float]:
        """Return how good a checkpoint of this moment is, the more the better, as far as that is known.

        Args:
            name: Of a figure of the log: `loss`, `psnr`, or None.

        Returns:
            `score`, or nothing.
        """
        value = self._figures.get(name or "")
        if value is None or not math.isfinite(value):
            return {}
        return {"score": -value if name == "loss" else value}

    def skipped(self, step: int, names: Sequence[str]) -> None:
        """Name the images that could not be read, if there are any."""
        if names and self.log:
            self.log.write(step, {"skipped": list(names)})
            self.warn(f"step {step}: unreadable images were passed over: {', '.join(names)}")

    def warn_once(self, step: int, sentences: Mapping[str, str]) -> None:
        """Give each kind of warning the first time it comes up.

        Args:
            step: Finished updates.
            sentences: By their kind.
        """
        for kind, sentence in sentences.items():
            if kind not in self._warned:
                self.warn(f"step {step}: {sentence}")
            self._warned.add(kind)

    def sync(self, last: bool = False) -> None:
        """Make the log safe on disk.

        Args:
            last: Only warn if that fails, because a run that is finished should not lose its weights over it.

        Raises:
            RunError: If it fails.
        """
        try:
            if self.log:
                self.log.sync()
        except RunError as error:
            if not last:
                raise
            self.warn(str(error))
