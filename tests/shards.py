"""Tar archives for tests, written by Python's tarfile and not by what is tested."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from tests.image_zoo import encoded, photograph

__all__ = ["member", "picture", "write_tar"]


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    return encoded(photograph(seed=seed), kind)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname = kind, link
    if size is not None:
        found.size = size
    return found


def write_tar(
    path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    """Write members; a name stands for a regular file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            entry = member(name) if isinstance(name, str) else name
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path
