"""A folder of photographs to tar shards: the same bytes whenever they are made, shard by shard, each whole or absent.

Members are named as the files are, in their order, so that a run reads from the shards what it would read from the
folder. The manifest is written after every shard; whoever was interrupted goes on after the last one.
"""

import dataclasses
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from softvq.config import read_json
from softvq.data.shards import INDEX_SUFFIX, MANIFEST, MANIFEST_FORMAT, read_manifest
from softvq.data.sources import FolderSource, fingerprint_of
from softvq.data.tar_index import BLOCK, index_of, read_index, refused, write_index
from softvq.errors import InputError, RunError
from softvq.files import replacing, sha256, write_json
from softvq.locks import LOCK, folder_lock

__all__ = ["Packed", "check_manifest", "pack_folder"]

MAX_SHARDS = 3000  # as many as the manifest, which is read as a config, has room for
LEFTOVER = re.compile(r"\.(manifest\.json|shard-\d{6}\.tar(\.index\.safetensors)?)\.[0-9a-f]{8}\.tmp\.\w+|\.tmp\w{6}")
"""What a killed process leaves."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """What packing made."""

    pictures: int
    """In all shards."""
    shards: int
    """Files."""
    made: int
    """Shards that were made now, not found."""
    num_bytes: int
    """Of all shards."""


def pack_folder(
    folder: Path | str,
    out: Path | str,
    shard_bytes: int,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Packed:
    """Pack the photographs of a folder into shards, or go on with that.

    Args:
        folder: The photographs.
        out: The folder of the shards; made if need be, otherwise empty or begun from the same photographs.
        shard_bytes: Largest size of a shard, unless a single photograph is larger.
        watch: Gives back the items it is given, and may show how far they are.

    Returns:
        What is there now.

    Raises:
        InputError: If a photograph cannot be read, or `out` holds anything else.
        RunError: If a shard cannot be written.
    """
    out = Path(out)
    if Path(folder).is_file():
        raise InputError(f"{folder}: is a file, expected a folder of images")
    source = FolderSource(Path(folder))
    if out.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(f"{out}: lies in the folder that is packed; give another place")
    shards = _planned(source, shard_bytes)
    if len(shards) > MAX_SHARDS:
        raise InputError(f"{folder}: would be {len(shards):,} shards, at most {MAX_SHARDS:,}; raise --shard-megabytes")
    head = {
        "format": MANIFEST_FORMAT,
        "pictures": len(source.names),
        "classes": len(source.classes),
        "fingerprint": fingerprint_of(source),
        "shard_bytes": shard_bytes,
    }
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder for shards; give another name")
    _begun(out, head)  # lest a lock is laid into a folder that is not ours
    with folder_lock(out, "written", leave=False):
        return _pack(source, out, shards, head, _begun(out, head), watch)  # others may have written in between


def check_manifest(folder: Path | str) -> list[str]:
    """Compare packed shards with their manifest.

    Args:
        folder: That `pack_folder` made, or anything else.

    Returns:
        A sentence for each shard that is missing or not as it was written, and for each that does not belong; none if
        there is no manifest, or it is of something else.
    """
    folder = Path(folder)
    wrong: list[str] = []
    manifest = read_manifest(folder)
    if manifest is None:
        return wrong
    listed = {shard["file"]: shard for shard in manifest["shards"]}
    for name, shard in listed.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path}: is missing; run softvq data pack again")
        elif path.stat().st_size != shard.get("bytes") or sha256(path) != shard.get("sha256"):
            wrong.append(f"{path}: is not as it was written, its SHA-256 differs; remove it and run softvq data pack")
    others = sorted(path.name for path in folder.glob("*.tar") if path.name not in listed)
    return wrong + [f"{folder / name}: is not in {MANIFEST}; move it elsewhere" for name in others]


def _planned(source: FolderSource, shard_bytes: int) -> list[range]:
    """Return which photographs go into which shard, from their names and sizes alone."""
    shards, first, filled = [], 0, 0
    room = shard_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * BLOCK  # up to the zeros at the end
    for index, size in enumerate(source.sizes()):
        if size < 0:
            raise InputError(f"{source.path(index)}: cannot be read; repair or remove it")
        reason = refused(_member(source.names[index], size), source.names[index], {})
        if reason is not None:
            raise InputError(
                f"{source.path(index)}: would be lost, since readers pass over {reason}; change or remove it"
            )
        whole = len(_header(source.names[index], size)) + -(-size // BLOCK) * BLOCK
        if filled and filled + whole > room:
            shards.append(range(first, index))
            first, filled = index, 0
        filled += whole
    return [*shards, range(first, len(source.names))]


def _header(name: str, size: int) -> bytes:
    """Return what stands before a member."""
    return _member(name, size).tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _member(name: str, size: int) -> tarfile.TarInfo:
    """Return a member, nothing of which tells when, where or by whom it was made."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _begun(out: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Return the shards that the manifest at `out` lists, by name; refuse what is not ours, and what is another's."""
    entries = sorted(path.name for path in out.iterdir()) if out.exists() else []
    ours = re.compile(rf"shard-\d{{6}}\.tar({re.escape(INDEX_SUFFIX)})?")
    begun = MANIFEST in entries
    foreign = [
        name
        for name in entries
        if not (name in (MANIFEST, LOCK) or LEFTOVER.fullmatch(name) or (begun and ours.fullmatch(name)))
    ]
    if foreign:
        raise InputError(f"{out}: holds {foreign[0]}, which is no part of these shards; give another folder")
    if not begun:
        return {}
    manifest = read_json(out / MANIFEST)
    for name, value in head.items():
        if manifest.get(name) != value:
            raise InputError(
                f"{out}: was begun with {name} {manifest.get(name)!r}, not {value!r}; give the same photographs and "
                "options, or another folder"
            )
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise InputError(f"{out / MANIFEST}: has no list of shards; remove the folder and pack again")
    return {str(shard.get("file")): shard for shard in shards}


def _pack(
    source: FolderSource,
    out: Path,
    shards: list[range],
    head: dict[str, Any],
    before: dict[str, Any],
    watch: Callable[[Sequence[Any]], Iterable[Any]],
) -> Packed:
    for path in out.iterdir():
        if LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)
    done: list[dict[str, Any]] = []
    made = 0
    _note(out, head, done + list(before.values()), complete=False)
    for number, numbers in enumerate(watch(shards)):
        path = out / f"shard-{number:06d}.tar"
        known = before.pop(path.name, None)
        entry = None if known is None or _changed(source, numbers, path) else _found(path, known)
        if entry is None:
            entry, made = _made(source, numbers, path), made + 1
            _note(out, head, [*done, entry, *before.values()], complete=False)
        done.append(entry)
    _note(out, head, done, complete=True)
    num_bytes = sum(entry["bytes"] for entry in done)
    return Packed(pictures=len(source.names), shards=len(done), made=made, num_bytes=num_bytes)


def _note(out: Path, head: dict[str, Any], shards: list[dict[str, Any]], *, complete: bool) -> None:
    write_json(out / MANIFEST, {**head, "complete": complete, "shards": shards})


def _found(path: Path, known: dict[str, Any]) -> dict[str, Any] | None:
    """Return a shard of the manifest if it is whole, with its index; None if it has to be made."""
    if not path.is_file() or path.stat().st_size != known.get("bytes") or sha256(path) != known.get("sha256"):
        return None
    if read_index(Path(f"{path}{INDEX_SUFFIX}"), known["bytes"]) is None:
        _write_index(path)
    return known


def _changed(source: FolderSource, numbers: range, path: Path) -> bool:
    """Whether a photograph was written or replaced after its shard was begun, though its size is as before."""
    try:
        begun = path.stat().st_mtime_ns
        seen = [source.path(number).stat() for number in numbers]
    except OSError:
        return True
    return any(max(each.st_mtime_ns, each.st_ctime_ns) > begun for each in seen)


def _made(source: FolderSource, numbers: range, path: Path) -> dict[str, Any]:
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            begun = os.fstat(file.fileno()).st_mtime_ns
            for number in numbers:
                data = _data(source.path(number))
                file.write(_header(source.names[number], len(data)) + data + bytes(-len(data) % BLOCK))
            file.write(bytes(-(file.tell() + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))
        os.utime(temporary, ns=(begun, begun))  # for `_changed`
    _write_index(path)
    return {"file": path.name, "pictures": len(numbers), "bytes": path.stat().st_size, "sha256": sha256(path)}


def _data(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); repair or remove it") from error


def _write_index(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        index = index_of(file, size, str(path))
    if not len(index.names):
        raise RunError(f"{path}: holds no picture; remove it and pack again")
    write_index(Path(f"{path}{INDEX_SUFFIX}"), index)
