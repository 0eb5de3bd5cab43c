"""Who may ask: API keys from a file, hosts that only this machine reaches, names a browser may call it by."""

import hashlib
import hmac
import ipaddress
from pathlib import Path

from softvq.errors import InputError

__all__ = ["ApiKeys", "is_loopback", "read_api_keys"]

MIN_LENGTH = 16


class ApiKeys:
    """Keys that are accepted; none of them is kept, only its hash.

    Args:
        keys: At least 16 characters each.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def accepts(self, key: str) -> bool:
        """Return whether this is one of the keys, in a time that tells nothing about how close it is."""
        given = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
        return any([hmac.compare_digest(given, digest) for digest in self._digests])  # a list, so that all are compared


def read_api_keys(path: Path | str) -> ApiKeys:
    """Read the keys of a file, one a line; empty lines and those that begin with # are skipped.

    Args:
        path: A file that nobody else may read.

    Returns:
        The keys.

    Raises:
        InputError: If the file cannot be read, others may read it, or it holds no key or a short one.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error}); give a file with a key a line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: holds other than ASCII characters, which no header can carry") from error
    if mode & 0o007:
        raise InputError(f"{path}: every user of this machine may read or change it; chmod 600 it")
    keys = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not keys:
        raise InputError(f"{path}: holds no API key; write one of at least {MIN_LENGTH} characters")
    if any(len(key) < MIN_LENGTH or not key.isprintable() or " " in key for key in keys):
        raise InputError(f"{path}: a key is short or has spaces; expected at least {MIN_LENGTH} printable characters")
    return ApiKeys(keys)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host: `localhost`, 127.0.0.0/8 or ::1."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
