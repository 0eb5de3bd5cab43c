"""A server on a socket: it listens, answers until it is told to stop, and finishes what it has taken on."""

import contextlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TextIO

import uvicorn

from softvq.errors import InputError
from softvq.serving.gate import Gate
from softvq.serving.limits import Limits

__all__ = ["address_of", "listen", "log_to", "serve", "server_of"]

LAST_WORDS = 2
"""Seconds in which those are told whose turn did not come in time."""
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
    with _signals_swallowed():
        server_of(app, limits).run(sockets=[made])


def server_of(app: Gate, limits: Limits) -> uvicorn.Server:
    """Return what answers once it is run, and lets the queue end when a signal comes.

    Args:
        app: What answers.
        limits: Of time.

    Returns:
        The server.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.queue + CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(limits.grace) + LAST_WORDS,
        lifespan="on",
        ws="none",
    )
    return _Server(config, app)


class _Server(uvicorn.Server):
    """Uvicorn's waits for answers until its time is up; this one lets the queue end before, so that all have one."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self._gate = gate

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._gate.finish, name="softvq-finish", daemon=True).start()
        super().handle_exit(sig, frame)


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
