"""Processes that train together, as torchrun would start them."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    places = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [place.getsockname()[1] for place in places]
    for place in places:
        place.close()
    return ports


def run_as_ranks(code: str, port: int, timeout: float = 240) -> None:
    """Run Python code in two processes that find each other, and see that both end well."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors.decode()


def fork_as_ranks(code: str, counts: Sequence[int], meetings: int, timeout: float = 240) -> None:
    """Run Python code in some processes that find each other, then in others; what it imports is imported once.

    The first line of the code has the imports, and the rest is what every process does. PORTS are where they may meet,
    once each: who comes to a port again may find what is left of the last meeting there.
    """
    imports, _, rest = code.partition("\n")
    launcher = f"""{imports}
import os, sys, traceback
for count, ports in {[(count, free_ports(meetings)) for count in counts]}:
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ["PORTS"] = " ".join(map(str, ports))
            try:
                {rest}
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", launcher],
        cwd=Path(__file__).parents[1], env=environment, stderr=subprocess.PIPE, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
