"""Making a latent cache: photographs are encoded shard by shard; whoever was interrupted goes on after the last one."""

import contextlib
import dataclasses
import re
import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softvq.config import to_dict
from softvq.data.folder import PhotoFolder
from softvq.data.images import center_crop, to_tensor
from softvq.data.latent_cache import (
    DTYPES,
    HEADER,
    CacheHeader,
    CachePlan,
    CacheShard,
    ShardContent,
    cache_info,
    damaged,
    read_shard,
    write_shard,
)
from softvq.errors import InputError, RunError
from softvq.files import sha256, write_json
from softvq.locks import LOCK, folder_lock

__all__ = ["MAX_BAD_FRACTION", "write_cache"]

MAX_BAD_FRACTION = 0.05
"""Share of unreadable photographs above which a cache is not made."""
NAMES_SHOWN = 5
LEFTOVER_HEADER = re.compile(r"\.cache\.json\.[0-9a-f]{8}\.tmp\.json")
LEFTOVER = re.compile(
    rf"{LEFTOVER_HEADER.pattern}|\.latents-\d{{5,}}\.safetensors\.[0-9a-f]{{8}}\.tmp\.\w+|\.tmp\w{{6}}"
)
"""What a killed process leaves: temporary files of `softvq.files.replacing`, and in a cache those of safetensors."""


def write_cache(
    out: Path | str,
    folder: PhotoFolder,
    plan: CachePlan,
    encode: Callable[[Float[Tensor, "batch 3 size size"]], Float[Tensor, "batch token dim"]],
    *,
    batch_size: int = 16,
    num_workers: int = 0,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
    tell: Callable[[str], object] = str,
) -> tuple[CacheHeader, int]:
    """Encode every photograph of a folder, or go on with that.

    Shards that are there already are checked, not made again. With the same `batch_size` the result is the same, byte
    for byte, as if nothing had come between.

    Args:
        out: The folder of the cache; made if need be, otherwise empty or begun with the same plan and photographs.
        folder: The photographs; each is centre-cropped to the folder's image size.
        plan: What `encode` is.
        encode: Images in [-1, 1], on the CPU, to normalised latents on any device.
        batch_size: Photographs encoded at once, in all their views.
        num_workers: Processes that decode photographs ahead; 0 decodes in this one.
        watch: Gives back the items it is given, and may show how far they are.
        tell: Is given a sentence for each photograph that cannot be read.

    Returns:
        What `cache.json` says now, and how many photographs were encoded, 0 if every shard was there.

    Raises:
        InputError: If `out` holds anything else, or a cache of another plan or other photographs, or a damaged shard.
        RunError: If the latents are not finite, too many photographs cannot be read, or the disk is full.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected 1 or more")
    out = Path(out)
    with _lock(out):
        header = _begin(out, folder, plan)
        return _write(out, folder, header, encode, batch_size, num_workers, watch, tell)


def _lock(out: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the folder of a cache, but put nothing into one that will be refused."""
    ours = not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} & {HEADER, LOCK})
    fresh = out.is_dir() and not any(out.iterdir())
    return folder_lock(out, "written", leave=False) if ours or fresh else contextlib.nullcontext()


def _write(
    out: Path,
    folder: PhotoFolder,
    header: CacheHeader,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    num_workers: int,
    watch: Callable[[Sequence[Any]], Iterable[Any]],
    tell: Callable[[str], object],
) -> tuple[CacheHeader, int]:
    files = header.files
    done = {i: _checked(out / file, header, i, folder) for i, file in enumerate(files) if (out / file).exists()}
    bad = [name for shard in done.values() for name in shard.skipped]
    parts = [part for i in range(len(files)) if i not in done for part in _parts(header.numbers(i), i, batch_size)]
    count = 0
    waiting: list[tuple[_Read, Tensor]] = []
    for part, read in zip(watch(parts), _reads(folder, parts, num_workers), strict=True):
        if isinstance(read, RunError):
            raise read
        for sentence in read.sentences:
            tell(sentence)
        bad += read.skipped
        _check_bad(bad, folder)
        waiting.append((read, _encoded(read, header, encode, folder)))
        if part.last:
            content = _joined(waiting, folder)
            path = out / files[part.shard]
            write_shard(path, header, part.shard, content)
            done[part.shard] = _Done(shard=_entry(path, content), skipped=content.skipped)
            header = _noted(out, header, done)
            count += len(content.names)
            waiting = []
    return _noted(out, header, done), count


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A shard that is there."""

    shard: CacheShard
    skipped: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Photographs that are encoded at once."""

    shard: int
    numbers: range
    last: bool


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """The photographs of a part that could be read, and why the others could not."""

    images: Float[Tensor, "image 3 size size"]
    numbers: list[int]
    skipped: list[str]
    sentences: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reader(Dataset["_Read | RunError"]):
    """Decodes whole parts; an error is returned, since one raised in a worker comes back as a traceback in text."""

    folder: PhotoFolder
    parts: list[_Part]

    def __getitem__(self, index: int) -> _Read | RunError:
        folder = self.folder
        images, numbers, skipped, sentences = [], [], [], []
        for number in self.parts[index].numbers:
            name = folder.names[number]
            try:
                photograph = folder.source.image(number, folder.config.max_pixels)
            except InputError as error:
                skipped.append(name)
                sentences.append(str(error))
                continue
            except RunError as error:
                return error
            images.append(to_tensor(center_crop(photograph, folder.image_size)))
            numbers.append(number)
        stacked = torch.stack(images) if images else torch.empty(0, 3, folder.image_size, folder.image_size)
        return _Read(images=stacked, numbers=numbers, skipped=skipped, sentences=sentences)


def _begin(out: Path, folder: PhotoFolder, plan: CachePlan) -> CacheHeader:
    """Return the header of the cache at `out`, begun if nothing is there; remove what a killed process left in it."""
    new = CacheHeader(
        plan=plan,
        data_fingerprint=folder.fingerprint,
        classes=tuple(folder.classes),
        photographs=len(folder),
        image_size=folder.image_size,
    )
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected the folder of a latent cache; give another name")
    entries = {entry.name for entry in out.iterdir()} if out.exists() else set()
    begun = HEADER in entries
    header = _same(out, cache_info(out), new) if begun else new
    leftovers = {name for name in entries if (LEFTOVER if begun else LEFTOVER_HEADER).fullmatch(name)}
    foreign = sorted(entries - leftovers - {LOCK} - ({HEADER, *header.files} if begun else set()))
    if foreign:
        raise InputError(f"{out}: holds {foreign[0]}, which is no part of this latent cache; give another folder")
    for name in leftovers:
        (out / name).unlink(missing_ok=True)
    if not begun:
        write_json(out / HEADER, to_dict(header))
    return header


def _same(out: Path, old: CacheHeader, new: CacheHeader) -> CacheHeader:
    """Return the header on the disk if it is of the same plan and photographs."""
    before, now = old.plan.fingerprint, new.plan.fingerprint
    if before != now:
        raise InputError(
            f"{out}: these latents belong to tokenizer {before[:12]} ({old.plan.tokenizer}), not to {now[:12]}; "
            "give that model or another folder"
        )
    if (old.data_fingerprint, old.classes, old.photographs) != (new.data_fingerprint, new.classes, new.photographs):
        raise InputError(
            f"{out}: was begun with other photographs ({old.photographs} files then, {new.photographs} now); "
            "give those or another folder"
        )
    for name in ("image_size", "tokens", "dim", "flip", "dtype", "precision", "shard_size"):
        then, here = (getattr(header if name == "image_size" else header.plan, name) for header in (old, new))
        if then != here:
            raise InputError(f"{out}: was begun with {name} {then}, not {here}; give the same or another folder")
    return old


def _checked(path: Path, header: CacheHeader, index: int, folder: PhotoFolder) -> _Done:
    """Return a shard that is there if it is what would be written in its place."""
    content = read_shard(path, header, index)
    entry = _entry(path, content)
    if any(shard.file == entry.file and shard.sha256 != entry.sha256 for shard in header.shards):
        raise damaged(path, "is not as it was written, its SHA-256 differs")
    skipped = set(content.skipped)
    expected = [(folder.names[i], folder.labels[i]) for i in header.numbers(index) if folder.names[i] not in skipped]
    if list(zip(content.names, content.labels.tolist(), strict=True)) != expected:
        raise damaged(path, "does not hold the photographs that belong there")
    return _Done(shard=entry, skipped=content.skipped)


def _entry(path: Path, content: ShardContent) -> CacheShard:
    return CacheShard(file=path.name, count=len(content.names), sha256=sha256(path))


def _noted(out: Path, header: CacheHeader, done: dict[int, _Done]) -> CacheHeader:
    """Write down which shards are there, if `cache.json` does not say so yet."""
    shards = [done[index] for index in sorted(done)]
    noted = dataclasses.replace(
        header,
        complete=len(done) == len(header.files),
        shards=tuple(each.shard for each in shards),
        skipped=tuple(name for each in shards for name in each.skipped),
    )
    if noted != header:
        write_json(out / HEADER, to_dict(noted))
    return noted


def _parts(numbers: range, shard: int, batch_size: int) -> list[_Part]:
    """Cut a shard into parts; none reaches into the next, so that what is encoded together depends on nothing else."""
    cuts = range(0, len(numbers), batch_size)
    return [_Part(shard=shard, numbers=numbers[i : i + batch_size], last=i == cuts[-1]) for i in cuts]


def _reads(folder: PhotoFolder, parts: list[_Part], num_workers: int) -> Iterable[_Read | RunError]:
    return DataLoader(
        _Reader(folder=folder, parts=parts),
        batch_size=None,
        sampler=range(len(parts)),
        num_workers=min(num_workers, len(parts)),
        worker_init_fn=_leave_interrupts_to_parent,
        generator=torch.Generator(),  # else it draws from the global one
    )


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_bad(bad: list[str], folder: PhotoFolder) -> None:
    if len(bad) > MAX_BAD_FRACTION * len(folder):
        shown = ", ".join(bad[:NAMES_SHOWN]) + (", ..." if len(bad) > NAMES_SHOWN else "")
        raise RunError(
            f"{folder.root}: {len(bad)} of {len(folder)} photographs cannot be read ({shown}), more than "
            f"{MAX_BAD_FRACTION:.0%}; repair or remove them, and give another folder to write to"
        )


def _encoded(
    read: _Read, header: CacheHeader, encode: Callable[[Tensor], Tensor], folder: PhotoFolder
) -> Float[Tensor, "image view token dim"]:
    """Return the latents of a part as they are stored, all views encoded at once."""
    plan, dtype, views = header.plan, DTYPES[header.plan.dtype], header.views
    if not read.numbers:
        return torch.empty(0, views, plan.tokens, plan.dim, dtype=dtype)
    images = torch.cat([read.images, read.images.flip(-1)]) if plan.flip else read.images
    latents = encode(images)
    if tuple(latents.shape) != (len(images), plan.tokens, plan.dim):
        expected = [len(images), plan.tokens, plan.dim]
        raise InputError(f"the tokenizer gives latents {list(latents.shape)}, expected {expected}; give its own sizes")
    stored = latents.to("cpu", dtype).unflatten(0, (views, len(read.numbers))).transpose(0, 1)
    finite = stored.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        name = folder.names[read.numbers[int(finite.int().argmin())]]
        raise RunError(
            f"{name}: its latents are not all finite numbers in {plan.dtype}; "
            "try --precision float32 with --dtype float32, or another model"
        )
    return stored


def _joined(parts: list[tuple[_Read, Tensor]], folder: PhotoFolder) -> ShardContent:
    numbers = [number for read, _ in parts for number in read.numbers]
    return ShardContent(
        latents=torch.cat([latents for _, latents in parts]),
        labels=torch.tensor([folder.labels[number] for number in numbers], dtype=torch.int64),
        names=tuple(folder.names[number] for number in numbers),
        skipped=tuple(name for read, _ in parts for name in read.skipped),
    )
