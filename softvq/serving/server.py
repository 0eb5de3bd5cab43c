"""A server on a socket: it listens, answers until it is told to stop, and finishes what it has taken on."""

import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import TextIO

import uvicorn

from softvq.errors import InputError
from softvq.serving.gate import Gate
from softvq.serving.limits import Limits

__all__ = ["address_of", "listen", "log_to", "serve"]

CONNECTIONS = 1024
"""Open at a time, beyond the queue; uvicorn refuses others."""


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: A name or an address.
        port: 0 takes any that is free.

    Returns:
        The socket.

    Raises:
        InputError: If there is no such host, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=CONNECTIONS)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host} port {port} ({reason}); give another --host or --port") from error


def address_of(made: socket.socket) -> str:
    """Return the address to call a socket by."""
    host, port = made.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Gate, made: socket.socket, limits: Limits) -> None:
    """Answer until SIGTERM or SIGINT; then refuse connections, finish what was taken on within `limits.grace`, return.

    Args:
        app: What answers.
        made: Listens already.
        limits: Of time.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.queue + CONNECTIONS,
        timeout_graceful_shutdown=max(1, round(limits.grace)),
        lifespan="on",
        ws="none",
    )
    with _signals_swallowed():
        uvicorn.Server(config).run(sockets=[made])


def log_to(stream: TextIO) -> None:
    """Write the access log, a JSON object a line, and what goes wrong."""
    handler = logging.StreamHandler(stream)
    for name, level in (
        ("softvq.access", logging.INFO),
        ("softvq.serving", logging.WARNING),
        ("uvicorn", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        logger.handlers = [handler]


@contextlib.contextmanager
def _signals_swallowed() -> Iterator[None]:
    """Let uvicorn have the signals: after it has stopped it raises them again, for whoever asked before it."""
    asked = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, frame: None) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
