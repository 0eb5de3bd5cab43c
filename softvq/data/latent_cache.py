"""The latent cache: the latents of every photograph of a folder, as it is and mirrored, for training generators.

A folder of `cache.json`, which is written first and says what the cache is to hold, and of shards
`latents-00000.safetensors`, each with the latents of as many photographs, in the order of `PhotoFolder.names`. A shard
is whole or absent, so that whoever is killed goes on by doing the same again.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from softvq.config import from_dict
from softvq.errors import InputError
from softvq.files import read_tensors, sha256, write_tensors

__all__ = [
    "AGAIN",
    "DTYPES",
    "HEADER",
    "CacheHeader",
    "CachePlan",
    "CacheShard",
    "LatentCache",
    "ShardContent",
    "cache_info",
    "damaged",
    "read_cache",
    "read_shard",
    "write_shard",
]

HEADER = "cache.json"
FORMAT = "softvq-latent-cache"
FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 26
MAX_PHOTOGRAPHS = 1 << 32
MAX_SHARDS = 100_000
SPARE_BYTES = 1 << 20
ENTRY = "softvq-latent-shard"
"""The only entry of a shard's header: several would be written in random order, and no two files be the same."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}
AGAIN = "run softvq cache-latents again"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """What the latents of a cache are made with; only the same plan goes on with a cache."""

    tokenizer: str
    """The tokenizer as the user called it; the same one may be called otherwise when it goes on."""
    fingerprint: str
    """`ImageTokenizer.latent_fingerprint()`."""
    tokens: int
    """Latent tokens of one image."""
    dim: int
    """Numbers in each."""
    flip: bool = True
    """Keep the latents of the mirrored photograph too, as a second view."""
    dtype: Literal["float16", "float32"] = "float16"
    """How latents are stored."""
    precision: Literal["float32", "bf16"] = "float32"
    """What the tokenizer computes in."""
    shard_size: int = 4096
    """Photographs of one shard, those that cannot be read counted too."""
    softvq_version: str
    """The version of this library that begins the cache; a later one may go on."""

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("tokens", "dim", "shard_size"):
            if not 1 <= getattr(self, name) <= 1 << 16:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 to {1 << 16}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheShard:
    """One file of a cache."""

    file: str
    """Its name in the folder."""
    count: int
    """Images in it."""
    sha256: str
    """Of its bytes, hexadecimal."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CacheHeader:
    """What `cache.json` says."""

    format: Literal["softvq-latent-cache"] = FORMAT
    """Tells it from other files."""
    version: Literal[1] = FORMAT_VERSION
    """Of the format."""
    plan: CachePlan
    """How the latents are made."""
    data_fingerprint: str
    """`PhotoFolder.fingerprint` of the photographs."""
    classes: tuple[str, ...]
    """Names of the classes; none if the photographs have no classes."""
    photographs: int
    """Files in the folder of photographs, those that cannot be read counted too."""
    image_size: int
    """Side in pixels of the squares that were encoded."""
    complete: bool = False
    """Whether every shard is there."""
    shards: tuple[CacheShard, ...] = ()
    """The shards that are there, in order."""
    skipped: tuple[str, ...] = ()
    """Photographs that could not be read, in order."""

    def __post_init__(self) -> None:
        """Refuse what cannot be, such as a shard outside the folder."""
        if not 1 <= self.photographs <= MAX_PHOTOGRAPHS or self.image_size < 1:
            raise InputError(f"photographs are {self.photographs} of side {self.image_size}, expected 1 or more")
        if -(-self.photographs // self.plan.shard_size) > MAX_SHARDS:
            raise InputError(f"shard_size is {self.plan.shard_size}, which makes more than {MAX_SHARDS} shards")
        if any(shard.count < 0 for shard in self.shards):
            raise InputError("a shard holds fewer than no images")
        names = [shard.file for shard in self.shards]
        if not set(names) <= set(self.files) or (self.complete and names != self.files):
            raise InputError("shards are not those that the photographs fill")
        if self.complete and (self.images < 1 or self.images + len(self.skipped) != self.photographs):
            raise InputError(f"{self.images} images and {len(self.skipped)} skipped are not {self.photographs}")

    @property
    def views(self) -> int:
        """Latents of one image: 2 if the mirrored one is there, else 1."""
        return 2 if self.plan.flip else 1

    @property
    def images(self) -> int:
        """Images in the shards that are there."""
        return sum(shard.count for shard in self.shards)

    @property
    def files(self) -> list[str]:
        """Names of all shards there have to be."""
        return [f"latents-{index:05d}.safetensors" for index in range(-(-self.photographs // self.plan.shard_size))]

    @property
    def digest(self) -> str:
        """SHA-256 over the shards and what their labels mean, hexadecimal; for the record of a run."""
        content = [self.plan.fingerprint, self.classes, [shard.sha256 for shard in self.shards]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def numbers(self, index: int) -> range:
        """Return which photographs of the folder belong to a shard."""
        size = self.plan.shard_size
        return range(index * size, min((index + 1) * size, self.photographs))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardContent:
    """What is in one file of a cache."""

    latents: Float[Tensor, "image view token dim"]
    """In the dtype of the plan."""
    labels: Int64[Tensor, " image"]
    """Indices of classes, -1 where there are none."""
    names: tuple[str, ...]
    """Of the photographs."""
    skipped: tuple[str, ...]
    """Of the photographs of this stretch that could not be read."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LatentCache:
    """All that a cache holds, in memory."""

    latents: Float[Tensor, "image view token dim"]
    """Normalised latents; view 0 is the photograph as it is, view 1, if there is one, mirrored."""
    labels: Int64[Tensor, " image"]
    """Indices of classes, -1 where there are none."""
    classes: tuple[str, ...]
    """Names of the classes."""
    names: tuple[str, ...]
    """Of the photographs, relative to their folder, with forward slashes."""
    fingerprint: str
    """Of the tokenizer that made the latents."""
    tokenizer: str
    """What the user called it."""
    image_size: int
    """Side in pixels of the squares that were encoded."""
    data_fingerprint: str
    """Of the folder of photographs."""
    digest: str
    """Of the content, see `CacheHeader.digest`."""


def cache_info(folder: Path | str) -> CacheHeader:
    """Read what a cache says of itself, and nothing of its shards.

    Args:
        folder: Written by `write_cache`, complete or not.

    Returns:
        What `cache.json` says.

    Raises:
        InputError: If there is no cache, or `cache.json` is damaged or of another version.
    """
    path = Path(folder) / HEADER
    if not path.is_file():
        raise InputError(f"{folder}: is no latent cache, it holds no {HEADER}; make one with softvq cache-latents")
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise InputError(f"{path}: larger than {MAX_HEADER_BYTES >> 20} MiB, which no header is")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not plain JSON; make the cache again in another folder") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{path}: not of a latent cache; make one with softvq cache-latents in another folder")
    if data.get("version") != FORMAT_VERSION:
        raise InputError(f"{path}: version is {data.get('version')!r}, this softvq reads {FORMAT_VERSION}")
    return from_dict(CacheHeader, data, str(path))


def read_cache(folder: Path | str, fingerprint: str | None = None, verify: bool = True) -> LatentCache:
    """Read a complete cache into memory.

    Args:
        folder: Written by `write_cache`.
        fingerprint: If given, the fingerprint of the tokenizer the latents have to belong to.
        verify: Compare the SHA-256 of every shard; shapes, names and finite numbers are looked at in any case.

    Returns:
        All latents in one tensor, in the dtype they are stored in, on the CPU.

    Raises:
        InputError: If the cache is missing, not finished, damaged, or of another tokenizer.
    """
    folder = Path(folder)
    header = cache_info(folder)
    plan = header.plan
    if fingerprint is not None and plan.fingerprint != fingerprint:
        raise InputError(
            f"{folder}: these latents belong to tokenizer {plan.fingerprint[:12]} ({plan.tokenizer}), not to "
            f"{fingerprint[:12]}; make a cache with that one"
        )
    if not header.complete:
        done = f"{len(header.shards)} of {len(header.files)} shards are there"
        raise InputError(f"{folder}: is not finished ({done}); {AGAIN} to go on")
    _check_sizes(folder, header)
    latents = torch.empty(header.images, header.views, plan.tokens, plan.dim, dtype=DTYPES[plan.dtype])
    labels = torch.empty(header.images, dtype=torch.int64)
    names: list[str] = []
    for index, shard in enumerate(header.shards):
        path = folder / shard.file
        if not path.is_file():
            raise InputError(f"{path}: is missing; {AGAIN} to make it")
        if verify and sha256(path) != shard.sha256:
            raise damaged(path, "is not as it was written, its SHA-256 differs")
        content = read_shard(path, header, index)
        if len(content.names) != shard.count:
            raise damaged(path, f"holds {len(content.names)} images, expected {shard.count}")
        place = slice(len(names), len(names) + shard.count)
        latents[place], labels[place] = content.latents, content.labels
        names += content.names
    return LatentCache(
        latents=latents,
        labels=labels,
        classes=header.classes,
        names=tuple(names),
        fingerprint=plan.fingerprint,
        tokenizer=plan.tokenizer,
        image_size=header.image_size,
        data_fingerprint=header.data_fingerprint,
        digest=header.digest,
    )


def write_shard(path: Path, header: CacheHeader, index: int, content: ShardContent) -> None:
    """Write one file of a cache atomically.

    Args:
        path: Where to.
        header: Of the cache.
        index: Which shard it is.
        content: What to write.

    Raises:
        RunError: If the file cannot be written; what was there before is untouched.
    """
    entry = {
        "version": FORMAT_VERSION,
        "tokenizer": header.plan.fingerprint,
        "data": header.data_fingerprint,
        "shard": index,
        "names": content.names,
        "skipped": content.skipped,
    }
    write_tensors(path, {"latents": content.latents, "labels": content.labels}, {ENTRY: json.dumps(entry)})


def read_shard(path: Path, header: CacheHeader, index: int) -> ShardContent:
    """Read one file of a cache and check that it is of that cache: its header, shapes and finite numbers.

    Args:
        path: Written by `write_shard`.
        header: Of the cache.
        index: Which shard it has to be.

    Returns:
        What is in it.

    Raises:
        InputError: If it is damaged or another cache's.
    """
    tensors, metadata = read_tensors(path)
    entry = _parse(metadata.get(ENTRY, ""))
    if entry is None or set(tensors) != {"latents", "labels"}:
        raise damaged(path, "is no shard of a latent cache")
    belongs = (header.plan.fingerprint, header.data_fingerprint, index)
    if (entry["tokenizer"], entry["data"], entry["shard"]) != belongs:
        raise damaged(path, "is a shard of another cache")
    names, skipped = tuple(entry["names"]), tuple(entry["skipped"])
    if len(names) + len(skipped) != len(header.numbers(index)):
        raise damaged(path, f"names {len(names) + len(skipped)} photographs, not {len(header.numbers(index))}")
    latents, labels, plan = tensors["latents"], tensors["labels"], header.plan
    expected = (len(names), header.views, plan.tokens, plan.dim)
    if tuple(latents.shape) != expected or latents.dtype != DTYPES[plan.dtype]:
        raise damaged(path, f"holds latents {_layout(latents)}, not {list(expected)} in {plan.dtype}")
    if tuple(labels.shape) != expected[:1] or labels.dtype != torch.int64:
        raise damaged(path, f"holds labels {_layout(labels)}, not [{len(names)}] in int64")
    if len(names) and not (labels.min() >= -1 and labels.max() < len(header.classes)):
        raise damaged(path, f"holds labels that are none of the {len(header.classes)} classes")
    finite = latents.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise damaged(path, f"holds latents of {names[int(finite.int().argmin())]!r} that are not all finite numbers")
    return ShardContent(latents=latents, labels=labels, names=names, skipped=skipped)


def _check_sizes(folder: Path, header: CacheHeader) -> None:
    """See that the shards are about as large as the header says, before memory is asked for; `read_shard` is exact."""
    each = header.views * header.plan.tokens * header.plan.dim * DTYPES[header.plan.dtype].itemsize
    for shard in header.shards:
        path = folder / shard.file
        if path.is_file() and 2 * path.stat().st_size + SPARE_BYTES < shard.count * each:
            raise damaged(path, f"is not a whole safetensors file, too small for its {shard.count} images")


def damaged(path: Path, problem: str) -> InputError:
    """Return the error for a shard that cannot be used."""
    return InputError(f"{path}: {problem}; remove it and {AGAIN}")


def _parse(text: str) -> dict[str, Any] | None:
    """Return the fields of a shard's header, or None if they are not what `write_shard` writes."""
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    types = {"version": int, "tokenizer": str, "data": str, "shard": int, "names": list, "skipped": list}
    if not isinstance(entry, dict) or any(type(entry.get(name)) is not expected for name, expected in types.items()):
        return None
    texts = all(isinstance(name, str) for name in [*entry["names"], *entry["skipped"]])
    return entry if texts and entry["version"] == FORMAT_VERSION else None


def _layout(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
