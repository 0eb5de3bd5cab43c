"""The queue alone: what is computed together, in which order, and what becomes of jobs nobody waits for."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from softvq.errors import RunError
from softvq.serving.batching import Batcher, Job, Stopped


class Worker:
    """Computes nothing, but only when it is let; keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.seen: list[tuple[str, int]] = []
        self.free = threading.Semaphore(0)

    def __call__(self, jobs: Sequence[Job]) -> list[Any]:
        self.batches.append([job.payload for job in jobs])
        assert self.free.acquire(timeout=20)
        if jobs[0].payload == "wrong":
            raise ValueError("wrong")
        return [RunError("bad") if job.payload == "bad" else job.payload for job in jobs]


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def batcher(worker: Worker) -> Iterator[Batcher]:
    observe = lambda group, images, seconds: worker.seen.append((group[0], images))  # noqa: E731
    made = Batcher(worker, most=4, wait=0.0, observe=observe)
    yield made
    for _ in range(20):
        worker.free.release()
    made.close(20.0)


def job(payload: Any, kind: str = "a", size: int = 1) -> Job:
    return Job(group=(kind, None), payload=payload, size=size)


def held(batcher: Batcher, worker: Worker) -> Job:
    """Keep the worker busy, so that what comes next has to wait."""
    first = job("first", "held")
    batcher.submit(first)
    until = time.monotonic() + 20
    while not worker.batches and time.monotonic() < until:
        time.sleep(0.001)
    return first


def release(worker: Worker, jobs: Sequence[Job]) -> list[Any]:
    for _ in range(20):
        worker.free.release()
    return [one.future.result(20) for one in jobs]


def test_what_goes_together_is_computed_together_in_order(batcher: Batcher, worker: Worker) -> None:
    held(batcher, worker)
    jobs = [job(number, "b" if number in (1, 4) else "a") for number in range(8)]
    for one in jobs:
        batcher.submit(one)
    assert batcher.waiting() == 8
    assert release(worker, jobs) == list(range(8))
    assert worker.batches == [["first"], [0, 2, 3, 5], [1, 4], [6, 7]]
    assert worker.seen[:3] == [("held", 1), ("a", 4), ("b", 2)]


def test_a_batch_has_no_more_images_than_it_may(batcher: Batcher, worker: Worker) -> None:
    held(batcher, worker)
    jobs = [job("x", size=3), job("y", size=2), job("z"), job("u", size=4)]
    for one in jobs:
        batcher.submit(one)
    release(worker, jobs)
    assert worker.batches[1:] == [["x", "z"], ["y"], ["u"]]


def test_a_batch_that_is_not_full_waits_for_others(worker: Worker) -> None:
    batcher = Batcher(worker, most=3, wait=20.0)
    jobs = [job(number) for number in range(3)]
    for one in jobs:
        batcher.submit(one)
        time.sleep(0.02)
    assert release(worker, jobs) == [0, 1, 2]
    assert worker.batches == [[0, 1, 2]]
    batcher.close(20.0)


def test_what_was_given_up_is_not_computed(batcher: Batcher, worker: Worker) -> None:
    first = held(batcher, worker)
    jobs = [job(number) for number in range(3)]
    for one in jobs:
        batcher.submit(one)
    jobs[1].future.cancel()
    first.future.cancel()  # which is being computed
    release(worker, [jobs[0], jobs[2]])
    assert worker.batches == [["first"], [0, 2]]
    assert batcher.alive()


def test_an_error_is_that_of_its_job_or_its_batch_alone(batcher: Batcher, worker: Worker) -> None:
    held(batcher, worker)
    jobs = [job("bad"), job("good"), job("wrong", "b"), job("later", "c")]
    for one in jobs:
        batcher.submit(one)
    for _ in range(20):
        worker.free.release()
    assert jobs[1].future.result(20) == "good"
    assert jobs[3].future.result(20) == "later"
    assert isinstance(jobs[0].future.exception(20), RunError)
    assert isinstance(jobs[2].future.exception(20), ValueError)


def test_closing_finishes_what_waits_and_refuses_what_comes(batcher: Batcher, worker: Worker) -> None:
    held(batcher, worker)
    last = job("last")
    batcher.submit(last)
    closing = threading.Thread(target=batcher.close, args=(20.0,))
    closing.start()
    while batcher.alive():
        time.sleep(0.001)
    with pytest.raises(Stopped, match="shutting down"):
        batcher.submit(job("late"))
    assert release(worker, [last]) == ["last"]
    closing.join(20)
    assert not closing.is_alive()


def test_closing_in_no_time_refuses_what_waits(batcher: Batcher, worker: Worker) -> None:
    held(batcher, worker)
    last = job("last")
    batcher.submit(last)
    batcher.close(0.0)
    with pytest.raises(Stopped, match="shut down before"):
        last.future.result(0)
    assert worker.batches == [["first"]]
