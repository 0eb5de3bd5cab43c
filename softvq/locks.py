"""Locks on folders, so that no two processes write in one."""

import contextlib
import fcntl
import functools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from softvq.errors import InputError

__all__ = ["LOCK", "folder_lock"]

LOCK = ".lock"
"""Name of the file that is locked."""


@contextlib.contextmanager
def folder_lock(folder: Path, doing: str, *, leave: bool = True) -> Iterator[None]:
    """Be the only process that writes in a folder; the lock ends with the process, however that ends.

    Args:
        folder: Made if need be.
        doing: What is done with it, for those who come later: `trained` or `written`.
        leave: Whether the locked file stays.

    Raises:
        InputError: If another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as a folder ({error.strerror}); choose another") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):  # its last holder has just removed it
            raise FileNotFoundError
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
        os.close(handle)
        raise InputError(
            f"{folder}: is being {doing} by {holder}; wait for it, stop it, or choose another folder"
        ) from error
    _close_locks_in_children()
    _held.add(handle)
    try:
        yield
    finally:
        if not leave:
            path.unlink(missing_ok=True)
        _held.discard(handle)
        os.close(handle)


_held: set[int] = set()


@functools.cache
def _close_locks_in_children() -> None:
    # a data worker that outlives a killed trainer by seconds would otherwise keep the lock
    def close() -> None:
        while _held:
            os.close(_held.pop())

    os.register_at_fork(after_in_child=close)
