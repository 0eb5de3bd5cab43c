"""What lies where in a tar shard: made once by looking at the headers, so that nothing is ever extracted.

Members are untrusted. Only regular files count; names are keys and are never joined to a folder; what is too long, too
large, no file at all, or named as if it lay elsewhere is passed over and counted.
"""

import collections
import dataclasses
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, overload

import numpy as np
import torch

from softvq.data.images import MAX_FILE_BYTES, SUFFIXES
from softvq.errors import InputError
from softvq.files import read_tensors, write_tensors

__all__ = ["NO_LABEL", "Entry", "ShardIndex", "Texts", "index_of", "read_index", "refused", "write_index"]

FORMAT = "softvq-shard-index-1"
BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 1 << 20
MAX_HEADERS_BYTES = 1 << 20
"""Of one member: an old GNU archive may describe the holes of a sparse file in blocks without end."""
MAX_NAME_BYTES = 4096
MAX_MEMBERS = 20_000_000
MAX_LABEL_BYTES = 1 << 16
MAX_CLASS = 1 << 20
MAX_CLASS_NAME = 256
NO_LABEL = -1
COLUMNS = ("offsets", "sizes", "headers", "labels", "name_ends")

Label = int | str | None
File = Any
"""A binary file that can seek; those of fsspec have no type in common with Python's."""


class Texts(Sequence[str]):
    """Many short texts as one block of bytes, which data workers share instead of copying a million objects.

    Args:
        block: All texts, encoded as file names are.
        ends: Where each ends in the block, ascending.
    """

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self.block, self.ends = block, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self.ends[place - 1]) if place else 0
        return os.fsdecode(self.block[start : int(self.ends[place])])

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Return texts as one block."""
        encoded = [os.fsencode(text) for text in texts]
        return cls(b"".join(encoded), np.cumsum([len(each) for each in encoded], dtype=np.int64))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Where a picture lies."""

    offset: int
    """First byte of it in the shard."""
    size: int
    """Bytes."""
    header: int
    """CRC-32 of the header block right before it, which tells whether the index still fits."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """The pictures of a shard, in their order."""

    shard_bytes: int
    """Size of the shard."""
    offsets: np.ndarray
    """int64 `[picture]`."""
    sizes: np.ndarray
    """int64 `[picture]`."""
    headers: np.ndarray
    """int64 `[picture]`, see `Entry.header`."""
    labels: np.ndarray
    """int64 `[picture]`: the number of a class; -1 for none; -2 - k for the k-th of `label_texts`."""
    names: Texts
    """Names of the members."""
    label_texts: Texts
    """Names of classes, as `.cls` and `.json` members give them."""
    passed_over: dict[str, int]
    """How many members were not taken, by why."""

    def entry(self, number: int) -> Entry:
        """Return where a picture lies."""
        return Entry(offset=int(self.offsets[number]), size=int(self.sizes[number]), header=int(self.headers[number]))


def index_of(file: File, shard_bytes: int, title: str) -> ShardIndex:
    """Look at every header of a tar archive.

    Args:
        file: The archive, which can seek.
        shard_bytes: Its size.
        title: What to call it in errors.

    Returns:
        Its pictures, in the order in which they lie.

    Raises:
        InputError: If it is no plain tar archive, damaged or cut short, or has too many members.
    """
    passed_over: collections.Counter[str] = collections.Counter()
    entries: dict[str, Entry] = {}
    labels: dict[str, Label] = {}
    for member in _members(file, shard_bytes, title):
        name = "/".join(part for part in member.name.split("/") if part != ".")
        reason = refused(member, name, entries)
        if member.isdir():
            continue
        if reason is not None:
            passed_over[reason] += 1
        elif name.lower().endswith(SUFFIXES):
            header = zlib.crc32(_at(file, member.offset_data - BLOCK, BLOCK))
            entries[name] = Entry(offset=member.offset_data, size=member.size, header=header)
        elif name.endswith((".cls", ".json")):
            stem, _, kind = name.rpartition(".")
            found = _label(file, member, kind)
            if found is None and kind == "cls":
                passed_over["labels that cannot be read"] += 1
            if kind == "cls" or stem not in labels:
                labels[stem] = found
    return _indexed(entries, labels, shard_bytes, dict(sorted(passed_over.items())))


def write_index(path: Path, index: ShardIndex) -> None:
    """Write an index atomically; RunError if the disk is full."""
    columns = {name: torch.from_numpy(getattr(index, name)) for name in COLUMNS[:-1]}
    texts = {"name": index.names, "text": index.label_texts}
    for name, each in texts.items():
        columns[f"{name}_ends"] = torch.from_numpy(each.ends)
        columns[f"{name}_block"] = torch.frombuffer(bytearray(each.block or b"\0"), dtype=torch.uint8)
    header = {"shard_bytes": index.shard_bytes, "passed_over": index.passed_over}
    write_tensors(path, columns, {FORMAT: json.dumps(header)})  # one entry: safetensors keeps no order of several


def read_index(path: Path, shard_bytes: int) -> ShardIndex | None:
    """Read an index, if it is whole and of a shard of this size.

    Args:
        path: As `write_index` wrote it, or anything.
        shard_bytes: Size of the shard now.

    Returns:
        The index; None if it has to be made anew.
    """
    try:
        tensors, metadata = read_tensors(path)
        columns = {name: tensors[name].numpy() for name in (*COLUMNS, "name_block", "text_ends", "text_block")}
        header = json.loads(metadata[FORMAT])
        passed_over = dict(header["passed_over"].items())
    except (InputError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if header.get("shard_bytes") != shard_bytes:
        return None
    if not all(type(count) is int and 0 <= count <= MAX_MEMBERS for count in passed_over.values()):
        return None
    blocks = {name: columns.pop(f"{name}_block") for name in ("name", "text")}
    if any(each.dtype != np.uint8 or each.ndim != 1 for each in blocks.values()):
        return None
    names, texts = (Texts(blocks[name].tobytes(), columns.pop(f"{name}_ends")) for name in ("name", "text"))
    index = ShardIndex(shard_bytes=shard_bytes, names=names, label_texts=texts, passed_over=passed_over, **columns)
    return index if _is_sound(index) else None


def _is_sound(index: ShardIndex) -> bool:
    """Whether every number of an index, which may come from anywhere, is within its bounds."""
    columns = [index.offsets, index.sizes, index.headers, index.labels, index.names.ends, index.label_texts.ends]
    if any(each.dtype != np.int64 or each.ndim != 1 for each in columns):
        return False
    if any(len(each) != len(index.names) for each in columns[:4]):
        return False
    for texts in (index.names, index.label_texts):
        steps = np.diff(texts.ends, prepend=0)
        if len(texts) and (steps.min() < 0 or steps.max() > MAX_NAME_BYTES or texts.ends[-1] > len(texts.block)):
            return False
    if not len(index.names):
        return True
    inside = (index.offsets >= BLOCK) & (index.sizes >= 0) & (index.sizes <= MAX_FILE_BYTES)
    inside &= index.offsets <= index.shard_bytes - index.sizes
    inside &= (index.labels <= MAX_CLASS) & (index.labels >= -1 - len(index.label_texts))
    return bool(inside.all())


def _members(file: File, shard_bytes: int, title: str) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an archive; unlike tarfile, raise where it breaks off instead of calling that the end."""
    damaged = f"{title}: is a damaged tar archive or cut short"
    try:
        file.seek(0)
        bounded: Any = _Bounded(file)  # has of a file what reading takes
        with tarfile.open(fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape") as opened:
            archive: Any = opened
            for _ in range(MAX_MEMBERS):
                bounded.left = MAX_HEADERS_BYTES
                member = archive.next()
                if member is None:
                    break
                archive.members.clear()  # which tarfile keeps all of otherwise
                if len(archive.pax_headers) > MAX_NAME_BYTES or member.size < 0:
                    raise tarfile.ReadError("headers that no writer makes")
                if member.isreg() and not member.issparse() and member.offset_data + member.size > shard_bytes:
                    raise tarfile.ReadError("unexpected end of data")
                yield member
            else:
                raise InputError(f"{title}: has more than {MAX_MEMBERS:,} members; pack it into several shards")
            end = archive.offset
    except InputError:
        raise
    except (tarfile.TarError, EOFError, RecursionError, ValueError, OverflowError, IndexError) as error:
        raise InputError(f"{damaged} ({_reason(file, error)}); fetch or pack it again") from error
    except OSError as error:
        raise InputError(f"{title}: cannot be read ({error.strerror or error}); check it") from error
    if _at(file, end, BLOCK) != bytes(BLOCK):
        raise InputError(f"{damaged} (no end after byte {end:,}); fetch or pack it again")


def _reason(file: File, error: Exception) -> str:
    start = _at(file, 0, 6)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0" or start[:4] == b"\x28\xb5\x2f\xfd":
        return "it is compressed, expected a plain .tar"
    return " ".join(str(error).split()) or type(error).__name__


class _Bounded:
    """A file that tarfile may not read much of at once: an extended header may claim any size."""

    def __init__(self, file: File) -> None:
        self.seek, self.tell, self._file, self.left = file.seek, file.tell, file, MAX_HEADERS_BYTES

    def read(self, size: int) -> bytes:
        """Read as the file does, but no more than a header can be."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADERS_BYTES:,} bytes before one member")
        return self._file.read(size)


def _at(file: File, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def refused(member: tarfile.TarInfo, name: str, entries: dict[str, Entry]) -> str | None:
    """Return why a member is not taken, in the plural; None if it is.

    Args:
        member: What its header says.
        name: Its key.
        entries: The pictures before it, by their keys.

    Returns:
        Such as `links`.
    """
    if member.issym() or member.islnk():
        return "links"
    if not member.isreg() or member.issparse():
        return "devices, pipes or sparse files"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        return "names that are too long"
    if not _is_key(name):
        return "names that lead out of the archive"
    if member.size > MAX_FILE_BYTES:
        return f"members above {MAX_FILE_BYTES >> 20} MiB"
    if any(part.startswith(".") for part in name.split("/")):  # as in folders
        return "hidden names"
    return "names that stand twice" if name in entries else None


def _is_key(name: str) -> bool:
    inside = not any(part in ("", "..") for part in name.split("/"))
    return inside and "\0" not in name and not PureWindowsPath(name).anchor and ".." not in PureWindowsPath(name).parts


def _label(file: File, member: tarfile.TarInfo, kind: str) -> Label:
    """Return the number or the name of a class that a small member gives, None if it gives none."""
    if member.size > MAX_LABEL_BYTES:
        return None
    text = _at(file, member.offset_data, member.size).decode("utf-8", "replace").strip()
    value: object = text
    if kind == "json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return None
        value = content.get("label") if isinstance(content, dict) else None
    elif text.isascii() and text.isdigit() and len(text) <= 9:
        value = int(text)
    if type(value) is int and 0 <= value <= MAX_CLASS:
        return value
    return value if isinstance(value, str) and 0 < len(value) <= MAX_CLASS_NAME and value.isprintable() else None


def _indexed(
    entries: dict[str, Entry], labels: dict[str, Label], shard_bytes: int, passed_over: dict[str, int]
) -> ShardIndex:
    found = [_of_picture(name, labels) for name in entries] if labels else [None] * len(entries)
    texts = sorted({label for label in found if isinstance(label, str)})
    numbers: dict[Label, int] = {text: -2 - place for place, text in enumerate(texts)}
    numbers[None] = NO_LABEL
    columns = {
        name: np.array([getattr(entry, name[:-1]) for entry in entries.values()], dtype=np.int64)
        for name in ("offsets", "sizes", "headers")
    }
    return ShardIndex(
        shard_bytes=shard_bytes,
        labels=np.array([numbers.get(label, label) for label in found], dtype=np.int64),
        names=Texts.of(list(entries)),
        label_texts=Texts.of(texts),
        passed_over=passed_over,
        **columns,
    )


def _of_picture(name: str, labels: dict[str, Label]) -> Label:
    """Return the label beside a picture: of its name without suffix, or of WebDataset's key, up to the first dot."""
    folder, slash, base = name.rpartition("/")
    label = labels.get(name.rpartition(".")[0])
    return labels.get(folder + slash + base.partition(".")[0]) if label is None else label
