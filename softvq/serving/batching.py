"""One thread owns the models: it takes requests that can be computed together off a queue, and computes them.

Who waits for a request may give it up by cancelling its future. Those that were given up are not computed, or no
further; those that come when the queue is closed are refused.
"""

import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from softvq.errors import RunError

__all__ = ["Batcher", "Group", "Job", "Stopped"]

Group = tuple[str, Any]
"""A kind of work, and what is the same for all of a batch."""

log = logging.getLogger("softvq.serving")


class Stopped(RunError):
    """The queue is closed."""


@dataclass(eq=False, kw_only=True, slots=True)
class Job:
    """A request as the models take it."""

    group: Group
    """Jobs of one group may be computed together."""
    payload: Any
    """What is to be computed."""
    size: int = 1
    """Images in it."""
    show: Callable[[int, Any], object] | None = None
    """Called in the models' thread with a step and what there is to be seen of the payload then."""
    previews: frozenset[int] = frozenset()
    """The steps to show."""
    future: "concurrent.futures.Future[Any]" = field(default_factory=concurrent.futures.Future)
    """Gets the result or the error; cancelled by who waits for it no longer."""


class Batcher:
    """A queue and the thread that works it off, in the order of arrival but for what goes with an earlier request.

    Args:
        compute: Gets jobs of one group, gives a result or an exception for each.
        most: Images in one batch; no job may have more.
        wait: Seconds that a batch that is not full waits for further jobs.
        observe: Told the group, the images and the seconds of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Job]], Sequence[Any]],
        *,
        most: int,
        wait: float,
        observe: Callable[[Group, int, float], object] = lambda group, images, seconds: None,
    ) -> None:
        self._compute, self._most, self._wait, self._observe = compute, most, wait, observe
        self._waiting: deque[Job] = deque()
        self._computed: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._pace = 0.0  # seconds a job takes, as batches are now
        self._thread = threading.Thread(target=self._work, name="softvq-models", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Put a job at the end of the queue; Stopped says if the queue is closed."""
        with self._changed:
            if self._closed:
                raise Stopped("the server is shutting down; ask again in a moment")
            self._waiting.append(job)
            self._changed.notify()

    def alive(self) -> bool:
        """Return whether jobs are still taken and worked on."""
        return not self._closed and self._thread.is_alive()

    def waiting(self) -> int:
        """Return how many jobs are in the queue."""
        return len(self._waiting)

    def backlog(self) -> float:
        """Return the seconds that the queue will take, as far as the last batches tell."""
        return self._pace * (len(self._waiting) + 1)

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing any more, work off the queue for so many seconds, then refuse what is left."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            for job in (*self._computed, *self._waiting):
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    job.future.set_exception(Stopped("the server shut down before this was done; ask again"))
            self._waiting.clear()

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            try:
                answers = self._compute(batch)
            except Exception as error:  # whatever it is, the next batch may be well
                log.exception("a batch failed")
                answers = [error] * len(batch)
            seconds = time.monotonic() - began
            self._pace = (self._pace + seconds / len(batch)) / 2 if self._pace else seconds / len(batch)
            self._observe(batch[0].group, sum(job.size for job in batch), seconds)
            for job, answer in zip(batch, answers, strict=True):
                with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was given up
                    if isinstance(answer, Exception):
                        job.future.set_exception(answer)
                    else:
                        job.future.set_result(answer)

    def _next(self) -> list[Job]:
        """Return the next batch, waiting for it; nothing once the queue is closed and worked off."""
        with self._changed:
            until = None
            while True:
                self._drop_given_up()
                if not self._waiting and self._closed:
                    return []
                batch = self._together()
                if not batch:
                    until = None
                    self._changed.wait()
                    continue
                until = time.monotonic() + self._wait if until is None else until
                left = until - time.monotonic()
                if self._closed or left <= 0 or sum(job.size for job in batch) >= self._most:
                    for job in batch:
                        self._waiting.remove(job)
                    self._computed = batch
                    return batch
                self._changed.wait(left)

    def _drop_given_up(self) -> None:
        if any(job.future.cancelled() for job in self._waiting):
            self._waiting = deque(job for job in self._waiting if not job.future.cancelled())

    def _together(self) -> list[Job]:
        """Return the first job and those that go with it; the first never waits for others to go before."""
        chosen: list[Job] = []
        room = self._most
        for job in self._waiting:
            if job.group == self._waiting[0].group and job.size <= room:
                chosen.append(job)
                room -= job.size
        return chosen
