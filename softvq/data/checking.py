"""What a set of pictures is like before anybody trains on it: unreadable, too small, twice there, in train and val."""

import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softvq.data.ahead import mapped_ahead
from softvq.data.images import MAX_PIXELS
from softvq.data.packing import check_manifest
from softvq.data.shards import ShardSource
from softvq.data.sources import Source, fingerprint_of, open_source
from softvq.errors import InputError

__all__ = ["BINS", "SetReport", "check_set", "shared_pictures"]

BINS = (64, 128, 256, 512, 1024, 2048)
"""Borders of the histogram of shorter sides, in pixels; each is the first of its bin."""
DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SetReport:
    """What was found."""

    source: str
    """What the user gave."""
    pictures: int
    """Readable or not."""
    fingerprint: str
    """Of names and sizes."""
    classes: dict[str, int]
    """Pictures of each class; empty without classes."""
    unlabelled: int
    """Pictures without a class in a set with classes."""
    shorter_sides: dict[str, int]
    """Pictures by the length of their shorter side in pixels, such as `256-511`."""
    unreadable: dict[str, str]
    """Why, by name."""
    too_small: dict[str, tuple[int, int]]
    """Width and height in pixels, by name."""
    duplicates: list[list[str]]
    """Names of pictures that have the same pixels."""
    damaged_shards: list[str]
    """A sentence for each shard that is not as the manifest says."""
    remarks: list[str]
    """Of the source: what it passed over."""
    digests: np.ndarray
    """Of the pixels, 16 bytes for each readable picture in order."""
    digest_names: list[str]
    """Whose they are."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        hidden = ("digests", "digest_names")
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in hidden}


def check_set(
    where: Path | str,
    *,
    min_side: int = 1,
    max_pixels: int = MAX_PIXELS,
    workers: int = 0,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> SetReport:
    """Decode every picture of a set.

    Args:
        where: As `softvq.data.sources.open_source` takes it.
        min_side: Pictures whose shorter side has fewer pixels are listed.
        max_pixels: Larger pictures count as unreadable.
        workers: Threads that decode; 0 decodes in this one.
        watch: Gives back the items it is given, and may show how far they are.

    Returns:
        What was found; it does not depend on `workers`.

    Raises:
        InputError: If there is no such set.
    """
    source = open_source(where)
    unreadable: dict[str, str] = {}
    too_small: dict[str, tuple[int, int]] = {}
    sides: collections.Counter[int] = collections.Counter()
    digests, names = [], []
    found = _looked_at(source, max_pixels, workers)
    for name, look in zip(watch(source.names), found, strict=True):
        if isinstance(look, str):
            unreadable[name] = look
            continue
        sides[int(np.searchsorted(BINS, min(look.size), "right"))] += 1
        if min(look.size) < min_side:
            too_small[name] = look.size
        digests.append(look.digest)
        names.append(name)
    table = np.frombuffer(b"".join(digests), dtype=f"V{DIGEST_BYTES}")
    counts = collections.Counter(source.labels)
    return SetReport(
        source=source.title,
        pictures=len(source.names),
        fingerprint=fingerprint_of(source),
        classes={name: counts[number] for number, name in enumerate(source.classes)},
        unlabelled=counts[-1] if source.classes else 0,
        shorter_sides={_bin(place): sides[place] for place in range(len(BINS) + 1)},
        unreadable=unreadable,
        too_small=too_small,
        duplicates=_groups(table, names),
        damaged_shards=check_manifest(where) if isinstance(source, ShardSource) else [],
        remarks=list(source.remarks),
        digests=table,
        digest_names=names,
    )


def shared_pictures(train: SetReport, val: SetReport) -> list[tuple[str, str]]:
    """Return the pictures of `val` that are in `train` too, with the same pixels: pairs of names, train's first."""
    _, in_train, in_val = np.intersect1d(train.digests, val.digests, return_indices=True)
    repeated = np.flatnonzero(np.isin(val.digests, val.digests[in_val])) if len(in_val) else []
    first = {
        val.digests[there].tobytes(): train.digest_names[here] for here, there in zip(in_train, in_val, strict=True)
    }
    return [(first[val.digests[place].tobytes()], val.digest_names[place]) for place in repeated]


@dataclasses.dataclass(frozen=True, slots=True)
class _Look:
    size: tuple[int, int]
    digest: bytes


def _looked_at(source: Source, max_pixels: int, workers: int) -> Iterator[_Look | str]:
    """Yield what is found of each picture in order, or why it cannot be read."""

    def look(index: int) -> _Look | str:
        try:
            image = source.image(index, max_pixels)
        except InputError as error:
            return str(error)
        digest = hashlib.blake2b(f"{image.width}x{image.height}:".encode(), digest_size=DIGEST_BYTES)
        digest.update(image.tobytes())
        return _Look(image.size, digest.digest())

    with contextlib.closing(mapped_ahead(look, iter(range(len(source.names))), workers, 4 * workers)) as found:
        yield from found


def _groups(digests: np.ndarray, names: list[str]) -> list[list[str]]:
    """Return the names of what is there more than once, in order of the first of each."""
    _, inverse, counts = np.unique(digests, return_inverse=True, return_counts=True)
    groups: dict[int, list[str]] = {}
    for place in np.flatnonzero(counts[inverse] > 1).tolist():
        groups.setdefault(int(inverse[place]), []).append(names[place])
    return list(groups.values())


def _bin(place: int) -> str:
    if place == 0:
        return f"below {BINS[0]}"
    return f"{BINS[place - 1]}-{BINS[place] - 1}" if place < len(BINS) else f"{BINS[-1]} and more"
