"""Processes that train together, as torchrun would start them."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["free_ports", "run_as_ranks"]

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["pytest", "scipy.linalg", "softvq.commands.train", "softvq.commands.evaluate_generation"]
)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    places = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [place.getsockname()[1] for place in places]
    for place in places:
        place.close()
    return ports


def run_as_ranks(
    function: Callable[..., object], *arguments: Any, count: int = 2, meetings: int = 1, timeout: float = 240
) -> None:
    """Call a function of a test module in processes that find each other, and see that all end well.

    They are forked from one process that has imported torch and the package, so that this is waited for once. PORTS is
    where they may meet, once each, and MASTER_PORT the first of them: who comes to a port again may find what is left
    of the last meeting there.
    """
    ports = free_ports(meetings)
    with TemporaryDirectory() as folder:
        processes = [
            _PROCESSES.Process(target=_be_rank, args=(rank, count, ports, Path(folder), function, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
            process.close()
        errors = [path.read_text() for path in sorted(Path(folder).iterdir())]
    assert codes == [0] * count, "\n".join([str(codes), *errors])


def _be_rank(
    rank: int, count: int, ports: list[int], folder: Path, function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(count), RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]), PORTS=" ".join(map(str, ports)))
    try:
        function(*arguments)
    except BaseException:
        (folder / f"rank-{rank}").write_text(traceback.format_exc())
        raise
