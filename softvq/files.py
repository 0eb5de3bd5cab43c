"""Files that are whole or absent: atomic writes, strict safetensors, hashes."""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softvq.errors import InputError, RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "fsync_folder",
    "json_text",
    "read_tensors",
    "remove_leftovers",
    "replacing",
    "sha256",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
]

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.[^.]*)?")
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there takes the place of `path` in one rename.

    If the body fails, `path` is what it was before and the temporary file is gone.

    Args:
        path: The file to make or replace; its folder is made if it is missing.

    Yields:
        An empty file to write to, with the suffix of `path`.

    Raises:
        RunError: If the folder cannot be made, the disk is full, or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors leaves 0600, which others cannot read
        _fsync(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); what was there is untouched") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, below: bool = True) -> None:
    """Delete what writers that were killed left in a folder in which nobody writes now, and anywhere below it."""
    for path in folder.rglob(".*.tmp*") if below else folder.glob(".*.tmp*"):
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` atomically; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` to `path` atomically as UTF-8; see `replacing`."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON; NaN and infinities are refused."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return what `write_json` writes."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def write_tensors(path: Path | str, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors to a safetensors file atomically.

    Args:
        path: The file to make or replace.
        tensors: Any device and layout, views and tied weights too; each is stored whole and contiguous.
        metadata: Text kept in the header.

    Raises:
        RunError: If the file cannot be written; what was there before is untouched.
    """
    import safetensors.torch

    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in storages else tensor  # safetensors refuses shared memory
        storages.add(storage)
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(ready, temporary, dict(metadata or {}))
        except safetensors.SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error


def read_tensors(path: Path | str) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Read a safetensors file whole.

    Args:
        path: A .safetensors file.

    Returns:
        The tensors by name, on the CPU, and the text of the header.

    Raises:
        InputError: If the file is missing, truncated, or no safetensors file (pickles are never opened).
    """
    import safetensors

    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{path}: is a pickle, which can run code when opened; give a .safetensors file instead")
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, RuntimeError, TypeError, ValueError) as error:
        with path.open("rb") as file:
            head = file.read(4)
        if head[:2] == b"PK" or head[:1] == b"\x80":
            raise InputError(f"{path}: is a pickle under another name; give a real safetensors file") from error
        raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or save it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def sha256(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: Path) -> None:
    """Make the names inside a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
