"""A function over items in threads, in their order and a bounded number of them ahead of what is asked for."""

import collections
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from softvq.errors import InputError

__all__ = ["mapped_ahead"]

MAX_WORKERS = 256

Given = TypeVar("Given")
Made = TypeVar("Made")


def mapped_ahead(
    function: Callable[[Given], Made], items: Iterator[Given], workers: int, ahead: int
) -> Generator[Made, None, None]:
    """Yield what a function makes of the items, in their order; with workers, `ahead` of what is asked for.

    One thread takes the items, since a stream can be read by one only, and the workers do the rest.

    Args:
        function: Called in the workers.
        items: What to call it with.
        workers: Threads; 0 calls it in this one, when a result is asked for.
        ahead: How many items are under way at once.

    Yields:
        The results.

    Raises:
        InputError: If there are more workers than any machine has use for.
    """
    if workers > MAX_WORKERS:
        raise InputError(f"workers is {workers}, expected 0 to {MAX_WORKERS}")
    if not workers:
        yield from map(function, items)
        return
    waiting: collections.deque[Future[Made]] = collections.deque()
    reader, pool = ThreadPoolExecutor(1, "softvq-reader"), ThreadPoolExecutor(workers, "softvq-decoder")

    def made(item: Future[Given]) -> Made:
        return function(item.result())

    try:
        for _ in range(ahead):
            waiting.append(pool.submit(made, reader.submit(next, items)))
        while True:
            try:
                found = waiting.popleft().result()
            except StopIteration:
                return
            waiting.append(pool.submit(made, reader.submit(next, items)))
            yield found
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
        pool.shutdown(cancel_futures=True)
        reader.shutdown()
