"""Tar shards as WebDataset lays them out, on disk or behind any URL that fsspec opens, read at random by an index.

An index is looked for beside its shard, as `softvq data pack` leaves it there; one that is missing or does not fit is
made by looking at the headers, and kept beside the shard, or in the cache folder where that cannot be written.
"""

import collections
import contextlib
import fnmatch
import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from softvq.config import read_json
from softvq.data.images import find_images, read_image
from softvq.data.sources import labelled_by_folder
from softvq.data.tar_index import NO_LABEL, ShardIndex, Texts, index_of, read_index, write_index
from softvq.errors import InputError, RunError
from softvq.files import write_bytes

__all__ = ["INDEX_SUFFIX", "MANIFEST", "ShardSource", "names_shards", "open_shards", "read_manifest", "shard_files"]

INDEX_SUFFIX = ".index.safetensors"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = "softvq-shards-1"
MAX_SHARDS = 100_000
MAX_SHARD_BYTES = 1 << 40
MAX_INDEX_BYTES = 1 << 31
VERSIONS = ("etag", "contentmd5", "md5hash", "md5", "crc32c", "checksum", "digest", "blobid", "generation")
VERSIONS += ("lastmodified", "modified", "mtime", "updated", "created")
"""What file systems call that which changes when a file does, the clock's last."""
BLOCK = 512
REMOTE_THREADS = 8
RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")


def names_shards(where: str) -> bool:
    """Return whether a text means tar shards, not a folder of images: by its look, or by what the folder holds."""
    path = Path(where)
    if _is_url(where) or not path.is_dir():
        return _is_url(where) or where.lower().endswith(".tar")
    if not any(_is_shard(each) for each in path.iterdir()):
        return read_manifest(path) is not None
    try:
        image = find_images(path)[0]
    except InputError:
        return True
    raise InputError(
        f"{path}: holds both tar shards and images ({image.relative_to(path)}); name the shards as {path / '*.tar'}, "
        "or move one kind to another folder"
    )


def open_shards(where: str) -> "ShardSource":
    """Look at tar shards.

    Args:
        where: A folder with shards, a shard, or a pattern of them with `*`, `?` and `{000..123}`; the same as a URL
            that fsspec opens.

    Returns:
        Their pictures, shard by shard in the order of names or numbers.

    Raises:
        InputError: If a shard is missing, damaged, too large or not to be had, or none holds a picture.
    """
    shards = shard_files(where)
    threads = REMOTE_THREADS if _is_url(where) else 1  # looking at headers on disk would only wait for Python
    with ThreadPoolExecutor(threads) as pool:
        return ShardSource(where, shards, list(pool.map(_index, shards)))


def shard_files(where: str) -> list[str]:
    """Return the paths or URLs of the shards that a text means; see `open_shards`."""
    remote = _is_url(where)
    found = [each for part in _expanded(where) for each in (_remote_files(part) if remote else _local_files(part))]
    if not found:
        raise InputError(f"{where}: there is no .tar shard; check the path or the pattern")
    if len(found) > MAX_SHARDS:
        raise InputError(f"{where}: means {len(found):,} shards, expected at most {MAX_SHARDS:,}; make larger ones")
    return found


class ShardSource:
    """The pictures of tar shards.

    Args:
        title: What the user gave.
        shards: Paths or URLs.
        indices: One for each.

    Raises:
        InputError: If none holds a picture, or classes are numbers in one place and names in another.
    """

    def __init__(self, title: str, shards: Sequence[str], indices: Sequence[ShardIndex]) -> None:
        self.title, self.shards = title, list(shards)
        counts = [len(index.names) for index in indices]
        if not sum(counts):
            raise InputError(f"{title}: no shard of it holds an image; give shards with at least one")
        self._first = np.cumsum([0, *counts])
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._sizes = np.concatenate([index.sizes for index in indices])
        self._headers = np.concatenate([index.headers for index in indices])
        self.names: Sequence[str] = _joined(self.shards, indices)
        self.classes, self.labels = _classes(title, indices)
        passed_over: collections.Counter[str] = collections.Counter()
        for index in indices:
            passed_over.update(index.passed_over)
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(passed_over.items()))
        self.remarks = [f"{title}: members were passed over: {listed}"] if listed else []

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Read a picture; RunError if a server does not give it, lest luck puts another in its place."""
        shard = self.shards[int(np.searchsorted(self._first, index, "right")) - 1]
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            data = _read(shard, offset - BLOCK, BLOCK + size)
        except InputError as error:
            if _is_url(shard):
                raise RunError(str(error)) from error
            raise
        name = f"{shard}: {self.names[index]}"
        if len(data) != BLOCK + size or zlib.crc32(data[:BLOCK]) != self._headers[index]:
            raise InputError(f"{name}: is not where its index says; remove {_index_place(shard)} if the shard is new")
        return read_image(data[BLOCK:], max_pixels, name)

    def sizes(self) -> Iterable[int]:
        """Return the bytes of every picture."""
        return self._sizes.tolist()


def _joined(shards: Sequence[str], indices: Sequence[ShardIndex]) -> Texts:
    """Return all names, each with its shard before it if a name stands in several."""
    ends, total = [], 0
    for index in indices:
        ends.append(index.names.ends + total)
        total += len(index.names.block)
    names = Texts(b"".join(index.names.block for index in indices), np.concatenate(ends))
    if len(set(names)) == len(names):
        return names
    stems = [Path(shard).name for shard in shards]
    if len(set(stems)) < len(stems):
        stems = [f"{place:06d}-{stem}" for place, stem in enumerate(stems)]
    return Texts.of([f"{stem}/{name}" for stem, index in zip(stems, indices, strict=True) for name in index.names])


def _classes(title: str, indices: Sequence[ShardIndex]) -> tuple[list[str], list[int]]:
    """Return classes and labels: of `.cls` and `.json` members if there are any, else the folders of the names."""
    numbers = np.concatenate([index.labels for index in indices])
    if (numbers == NO_LABEL).all():
        return labelled_by_folder([name for index in indices for name in index.names])
    has_names, has_numbers = bool((numbers < NO_LABEL).any()), bool((numbers > NO_LABEL).any())
    if has_names and has_numbers:
        raise InputError(f"{title}: classes are numbers in some members and names in others; expected one of both")
    if has_numbers:
        return [str(number) for number in range(int(numbers.max()) + 1)], numbers.tolist()
    classes = sorted({text for index in indices for text in index.label_texts})
    places = {text: place for place, text in enumerate(classes)}
    labels: list[int] = []
    for index in indices:
        own = [places[text] for text in index.label_texts]
        labels += [NO_LABEL if label == NO_LABEL else own[-2 - label] for label in index.labels.tolist()]
    return classes, labels


def _expanded(where: str) -> list[str]:
    """Return a text with each `{000..123}` written out."""
    found = RANGE.search(where)
    if found is None:
        return [where]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise InputError(f"{where}: {found[0]} means {last - first + 1:,} shards, expected 1 to {MAX_SHARDS:,}")
    head, tails = where[: found.start()], _expanded(where[found.end() :])
    if (last - first + 1) * len(tails) > MAX_SHARDS:
        raise InputError(f"{where}: means more than {MAX_SHARDS:,} shards; give fewer")
    return [f"{head}{each:0{len(found[1])}d}{tail}" for each in range(first, last + 1) for tail in tails]


def _local_files(where: str) -> list[str]:
    path = Path(where)
    if path.is_dir():
        manifest = read_manifest(path)
        found = sorted(str(each) for each in path.iterdir() if _is_shard(each))
        listed = found if manifest is None else [str(path / shard["file"]) for shard in manifest["shards"]]
        if manifest is not None and not manifest["complete"]:
            raise InputError(f"{path}: its packing is not finished; run softvq data pack again")
    elif path.exists() or not any(each in where for each in "*?["):
        listed = [where]
    else:
        folder, pattern = path.parent, path.name
        if any(each in str(folder) for each in "*?["):
            raise InputError(f"{where}: has a pattern in its folder, expected one in the name of the shards alone")
        beside = [each for each in folder.iterdir() if _is_shard(each)] if folder.is_dir() else []
        listed = sorted(str(each) for each in beside if fnmatch.fnmatchcase(each.name, pattern))
    for each in listed:
        if not Path(each).is_file():  # also a pipe or a device, which could block for ever
            raise InputError(f"{each}: no such shard; fetch it, or give a pattern without it")
    return listed


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what `softvq data pack` says of a folder, None if it did not make it; InputError for strange shards."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        return None
    shards = manifest.get("shards")
    if manifest.get("format") != MANIFEST_FORMAT or not isinstance(shards, list):
        return None
    for shard in shards:
        name = shard.get("file") if isinstance(shard, dict) else None
        if not isinstance(name, str) or not re.fullmatch(r"shard-\d{6}\.tar", name):
            raise InputError(
                f"{folder / MANIFEST}: names a shard {name!r}; expected names as softvq data pack gives them"
            )
    return {**manifest, "complete": manifest.get("complete") is True}


def _index(shard: str) -> ShardIndex:
    size, version = _size_and_version(shard)
    if size > MAX_SHARD_BYTES:
        raise InputError(f"{shard}: has {size:,} bytes, expected at most {MAX_SHARD_BYTES:,}; pack smaller shards")
    places = [_cached_index(shard, version)]
    if not _is_url(shard):
        places.insert(0, Path(shard + INDEX_SUFFIX))
    elif not places[0].is_file():
        before = _cached_index(shard, "").name.replace(".", "*.", 1)  # of what the shard was
        for old in places[0].parent.glob(before):
            old.unlink(missing_ok=True)
        _fetch_index(shard, places[0])
    for place in places:
        index = read_index(place, size) if place.is_file() else None
        if index is not None and _fits(shard, place, index):
            return index
    with _opened(shard) as file:
        index = index_of(file, size, shard)
    for place in places:
        with contextlib.suppress(RunError):  # it is made anew the next time
            write_index(place, index)
            break
    return index


def _fits(shard: str, place: Path, index: ShardIndex) -> bool:
    """Whether an index is of this shard and not of one that it replaced, as time and some of the headers tell."""
    if not _is_url(shard) and place.stat().st_mtime_ns < Path(shard).stat().st_mtime_ns:
        return False
    count = len(index.names)
    entries = [index.entry(number) for number in sorted({0, count // 2, count - 1}) if count]
    return all(zlib.crc32(_read(shard, entry.offset - BLOCK, BLOCK)) == entry.header for entry in entries)


def _cached_index(shard: str, version: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = shard if _is_url(shard) else str(Path(shard).resolve())
    stem = hashlib.sha256(os.fsencode(name)).hexdigest()
    return root / "softvq" / "shards" / f"{stem}{version and f'-{version}'}{INDEX_SUFFIX}"


def _index_place(shard: str) -> str:
    beside = Path(shard + INDEX_SUFFIX)
    return str(
        beside if not _is_url(shard) and beside.exists() else _cached_index(shard, "*" if _is_url(shard) else "")
    )


def _fetch_index(shard: str, place: Path) -> None:
    """Copy the index that lies beside a shard on a server, if there is one."""
    url = shard + INDEX_SUFFIX
    try:
        files, path = _file_system(url)
        if not files.exists(path) or (files.size(path) or 0) > MAX_INDEX_BYTES:
            return
        data = files.cat_file(path)
    except Exception:  # as many kinds as there are servers; the index is made then
        return
    with contextlib.suppress(RunError):
        write_bytes(place, data)


def _size_and_version(shard: str) -> tuple[int, str]:
    """Return a shard's bytes and, of one on a server, digits that change when it does, if the server tells any."""
    if not _is_url(shard):
        return Path(shard).stat().st_size, ""
    with _told(shard):
        files, path = _file_system(shard)
        info = files.info(path)
        size = info.get("size")
        if size is None:
            raise InputError(f"{shard}: the server does not tell its size, which reading at random needs; copy it here")
    told = {re.sub(r"[^a-z0-9]", "", str(name).lower()): value for name, value in info.items() if value is not None}
    found = next((f"{name}={told[name]}" for name in VERSIONS if name in told), None)  # one: listings tell fewer
    return size, "" if found is None else hashlib.sha256(found.encode("utf-8", "replace")).hexdigest()[:16]


@contextlib.contextmanager
def _opened(shard: str) -> Iterator[Any]:
    with _told(shard), contextlib.ExitStack() as stack:
        if _is_url(shard):
            files, path = _file_system(shard)
            yield stack.enter_context(files.open(path, "rb"))
        else:
            yield stack.enter_context(Path(shard).open("rb"))


def _read(shard: str, start: int, count: int) -> bytes:
    with _told(shard):
        if _is_url(shard):
            files, path = _file_system(shard)
            return files.cat_file(path, start=start, end=start + count)
        with Path(shard).open("rb", buffering=0) as file:  # anew each time: nothing to share with data workers
            return os.pread(file.fileno(), count, start)


def _remote_files(url: str) -> list[str]:
    caches, chained, inner = url.rpartition("::")  # as in simplecache::s3://bucket/shards
    if inner.lower().endswith(".tar") and not any(each in inner for each in "*?["):
        return [url]
    with _told(url):
        files, path = _file_system(inner)
        files.invalidate_cache()  # a listing of before would hide what changed
        pattern = path if path.lower().endswith(".tar") else path.rstrip("/") + "/*.tar"
        return [caches + chained + files.unstrip_protocol(each) for each in sorted(files.glob(pattern))]


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it; fsspec keeps one for each process."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise InputError(f"{url}: needs fsspec, which is not installed; pip install 'softvq[data]'") from error
    try:
        return url_to_fs(url)
    except ImportError as error:  # of the package for this kind of server, which the message names
        raise InputError(f"{url}: cannot be opened here ({error}); install that package") from error


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Tell what goes wrong with a file or a server as one sentence."""
    try:
        yield
    except (InputError, RunError):
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name}: no such shard; fetch it, or give a pattern without it") from error
    except Exception as error:  # as many kinds as there are servers
        if not (_is_url(name) or isinstance(error, OSError)):
            raise
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise InputError(f"{name}: cannot be read ({reason}); check the address and the network") from error


def _is_url(where: str) -> bool:
    return "://" in where or "::" in where


def _is_shard(path: Path) -> bool:
    return path.name.lower().endswith(".tar") and not path.name.startswith(".") and not path.is_dir()
