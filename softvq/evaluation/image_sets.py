"""Sets of images that are to be scored, whatever they are kept in, as batches of 8-bit pixels that always are the same.

A set is a folder of image files, tar shards, an .npz file of samples, latents with the tokenizer that decodes them, or
a tensor. Neither the size of a batch nor how many threads and processes share the work changes a pixel, and no image is
left out.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from softvq.data.ahead import mapped_ahead
from softvq.data.images import MAX_PIXELS, SUFFIXES, center_crop, find_images, read_image
from softvq.data.latent_cache import HEADER, cache_info, read_cache
from softvq.data.latents import read_latents
from softvq.data.shards import names_shards
from softvq.data.sources import HUB_PREFIX, Source, StoredImage, open_source
from softvq.errors import InputError, RunError
from softvq.evaluation.npz_images import open_npz, read_npz
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = ["ImageBatch", "ImageSet", "in_memory", "open_images", "picked", "pixel_fingerprint"]

Pixels = UInt8[np.ndarray, "height width 3"]

Item = Path | StoredImage | np.ndarray
"""A file or a picture to decode, or pixels."""
Items = Generator[Item, None, None]
"""Of some images in order."""

DIGEST_BYTES = 16
DECODED_AT_ONCE = 32
BATCH_BYTES = 256 << 20
GRID, RECIPE = "grid.png", "recipe.json"  # of `softvq sample`
NO_CROP = "none"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """Some images of a set, that follow one another."""

    pixels: UInt8[Tensor, "batch 3 height width"]
    """RGB, on the CPU, contiguous."""
    places: Int64[Tensor, " batch"]
    """The number of each image in the set, from 0."""
    names: tuple[str, ...]
    """Paths relative to the folder with forward slashes, or the names stored with latents, or else numbers."""
    digests: tuple[bytes, ...]
    """BLAKE2b, of 16 bytes, of the size and the pixels of each image; for `pixel_fingerprint`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ImageSet:
    """Images that are to be scored, and not read yet; `open_images` and `in_memory` build it."""

    source: str
    """What the user gave."""
    count: int
    """Images in the set, at least 1."""
    size: tuple[int, int]
    """Height and width of every image as it is handed out, in pixels."""
    crop: str
    """What is done to get that size: `none` or `centre N (ADM)`."""
    kind: Literal["folder", "npz", "latents", "memory"]
    """What the images are kept in."""
    names: Sequence[str] | None = dataclasses.field(repr=False, compare=False)
    """One for each image; None numbers them."""
    items: Callable[[int, int], Items] = dataclasses.field(repr=False, compare=False)
    """Returns the images from one place to before another; it is used by one thread at a time."""

    def batches(self, batch_size: int, *, workers: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[ImageBatch]:
        """Return one rank's share of the images, in order of place; nothing is read before the first is asked for.

        Rank r of R gets the places from floor(r count / R) to before floor((r + 1) count / R), which may be none.

        Args:
            batch_size: Images of a batch, >= 1; the last may be smaller, and all are where images are huge.
            workers: Threads that decode, crop and digest ahead of what is asked for; 0 does it on demand.
            rank: In [0, ranks).
            ranks: Processes that share the set, >= 1.

        Returns:
            Batches that hold the same images whatever `workers` is.

        Raises:
            InputError: If `batch_size` or `workers` is too small; and, while reading, if an image is damaged or of
                another size than the others.
            RunError: While reading, if the tokenizer decodes latents to values that are not finite.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}, expected at least 1")
        if workers < 0:
            raise InputError(f"workers is {workers}, expected 0 or more")
        assert 0 <= rank < ranks, f"rank is {rank} of {ranks}"
        share = range(rank * self.count // ranks, (rank + 1) * self.count // ranks)
        return self._batches(share, batch_size, workers)

    def _batches(self, share: range, batch_size: int, workers: int) -> Iterator[ImageBatch]:
        if self.kind in ("memory", "latents"):  # often made by networks, on a device and in modes of this thread
            workers = 0
        batch_size = max(1, min(batch_size, BATCH_BYTES // (3 * self.size[0] * self.size[1])))
        items = self.items(share.start, share.stop)
        ahead = batch_size + 2 * workers  # so that the next batch is made while this one is used
        with (
            contextlib.closing(items),
            contextlib.closing(mapped_ahead(self._digested, items, workers, ahead)) as images,
        ):
            for start in share[::batch_size]:
                places = range(start, min(start + batch_size, share.stop))
                found = [next(images) for _ in places]
                pixels = torch.from_numpy(np.stack([image.pixels for image in found]))
                yield ImageBatch(
                    pixels=pixels.permute(0, 3, 1, 2).contiguous(),
                    places=torch.arange(places.start, places.stop),
                    names=tuple(f"{place:06d}" if self.names is None else self.names[place] for place in places),
                    digests=tuple(image.digest for image in found),
                )

    def _digested(self, item: Item) -> "_Digested":
        image = read_image(item) if isinstance(item, Path) else item.read() if isinstance(item, StoredImage) else item
        if self.crop != NO_CROP:
            whole = Image.fromarray(image) if isinstance(image, np.ndarray) else image
            image = center_crop(whole, self.size[0])
        pixels = np.ascontiguousarray(image)
        if pixels.shape[:2] != self.size:
            name = self.source if isinstance(item, np.ndarray) else item
            raise InputError(
                f"{name}: is {_by(pixels.shape)} (height x width), expected {_by(self.size)} like the first of "
                f"{self.source}; give images of one size, or --crop with --size N"
            )
        return _Digested(pixels, _digest(pixels))


def open_images(
    source: Path | str, *, size: int | None = None, crop: bool = False, tokenizer: ImageTokenizer | None = None
) -> ImageSet:
    """Look at what holds a set of images, and read no more of it than tells the size of an image.

    Args:
        source: A folder of JPEG, PNG or WebP files, or one of them; tar shards or a Hugging Face data set, as
            `softvq.data.sources.open_source` takes them; an .npz file with `arr_0` as ADM writes samples; a
            latent file of `softvq encode`, or a cache of `softvq cache-latents`, of which the view as it is counts.
            The `grid.png` that `softvq sample` lays beside its `recipe.json` is left out.
        size: Side of the images in pixels; None takes the size of the first image.
        crop: Scale and cut out the middle square of side `size` as ADM does (`softvq.data.images.center_crop`), which
            leaves squares of that side as they are. Otherwise all images must have one size.
        tokenizer: Decodes latents, on its own device and in float32; for latents only.

    Returns:
        The set.

    Raises:
        InputError: If there is nothing to read, an image cannot be used or is of another size, latents come without
            their tokenizer, or `crop` without `size`.
    """
    if crop and size is None:
        raise InputError(f"{source}: is to be cropped, but to no size; give --size N as well")
    if size is not None and size < 1:
        raise InputError(f"size is {size}, expected at least 1 pixel")
    path = Path(source)
    found = _opened(source, tokenizer)
    if crop and size is not None:
        return dataclasses.replace(found, source=str(source), size=(size, size), crop=f"centre {size} (ADM)")
    if size is not None and found.size != (size, size):
        first = path / found.names[0] if found.kind == "folder" and path.is_dir() and found.names else path
        raise InputError(
            f"{first}: is {_by(found.size)} (height x width), expected {size}x{size}; give images of that size, or "
            "--crop to cut them"
        )
    return dataclasses.replace(found, source=str(source))


def in_memory(
    pixels: UInt8[Tensor, "image 3 height width"], source: str, names: Sequence[str] | None = None
) -> ImageSet:
    """Return images that are there already as a set.

    Args:
        pixels: RGB, at least one image; a tensor on another device is copied to the CPU.
        source: What to call them.
        names: One for each; None numbers them.

    Returns:
        The set.

    Raises:
        InputError: If there are no images, or not as many names.
    """
    count, _, height, width = pixels.shape
    if not count or not height or not width:
        raise InputError(f"{source}: pixels are {list(pixels.shape)}, expected at least one image")
    if names is not None and len(names) != count:
        raise InputError(f"{source}: {len(names)} names are given for {count} images, expected one for each")
    array = pixels.detach().cpu().permute(0, 2, 3, 1).numpy()

    def items(start: int, stop: int) -> Items:
        yield from array[start:stop]

    return _set(source, "memory", count, (height, width), names, items)


def picked(images: ImageSet, places: Sequence[int]) -> ImageSet:
    """Return some images of a set as a set.

    Args:
        images: Where they are taken from; what lies between two of them may have to be read.
        places: Ascending, at least one.

    Returns:
        A set of as many images as there are places.
    """
    places = list(places)
    assert places, "no places"
    assert places == sorted(set(places)), f"places are {places[:5]}, expected ascending ones"
    assert places[-1] < images.count, f"place {places[-1]} of {images.count}"

    def items(start: int, stop: int) -> Items:
        chosen = places[start:stop]
        wanted = set(chosen)
        for place, item in enumerate(images.items(chosen[0], chosen[-1] + 1), chosen[0]) if chosen else ():
            if place in wanted:
                yield item

    names = None if images.names is None else [images.names[place] for place in places]
    return dataclasses.replace(images, count=len(places), names=names, items=items)


def pixel_fingerprint(digests: Iterable[bytes]) -> str:
    """Return what tells a set of pictures from others: SHA-256 of the sorted digests, hexadecimal.

    The same pictures give the same, in any order, from any container, over any number of workers and ranks; a picture
    that is there twice counts twice.

    Args:
        digests: Of all images, as `ImageBatch.digests` has them.

    Returns:
        64 digits.
    """
    ordered = sorted(digests)
    assert all(len(digest) == DIGEST_BYTES for digest in ordered), "digests are not those of batches"
    return hashlib.sha256(b"".join(ordered)).hexdigest()


class _Digested(NamedTuple):
    pixels: Pixels
    digest: bytes


def _digest(pixels: Pixels) -> bytes:
    height, width, _ = pixels.shape
    digest = hashlib.blake2b(f"{height}x{width}:".encode(), digest_size=DIGEST_BYTES)
    digest.update(pixels.data)
    return digest.digest()


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _set(
    source: str,
    kind: Literal["folder", "npz", "latents", "memory"],
    count: int,
    size: tuple[int, int],
    names: Sequence[str] | None,
    items: Callable[[int, int], Items],
) -> ImageSet:
    return ImageSet(source=source, count=count, size=size, crop=NO_CROP, kind=kind, names=names, items=items)


def _opened(source: Path | str, tokenizer: ImageTokenizer | None) -> ImageSet:
    path = Path(source)
    if str(source).startswith(HUB_PREFIX) or names_shards(str(source)):
        return _stored(open_source(source))
    suffix = path.suffix.lower()
    if suffix == ".safetensors" and path.is_file():
        return _latent_file(path, _needed(path, tokenizer))
    if path.is_dir() and (path / HEADER).is_file():
        return _cache(path, _needed(path, tokenizer))
    if suffix == ".npz" and path.is_file():
        images = open_npz(path)
        return _set(
            str(path), "npz", images.count, (images.height, images.width), None, lambda a, b: read_npz(images, a, b)
        )
    if path.is_file() and suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a folder of images, an .npz file, or latents in a .safetensors file")
    return _folder(path)


def _folder(path: Path) -> ImageSet:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give a folder of images, an .npz file or latents")
    paths = [each for each in find_images(path) if each.name != GRID or not (each.parent / RECIPE).is_file()]
    if not paths:
        raise InputError(f"{path}: holds no image but {GRID}; give a folder with at least one")
    names = [path.name] if path.is_file() else [each.relative_to(path).as_posix() for each in paths]
    first = read_image(paths[0])

    def items(start: int, stop: int) -> Items:
        yield from paths[start:stop]

    return _set(str(path), "folder", len(paths), (first.height, first.width), names, items)


def _stored(source: Source) -> ImageSet:
    first = source.image(0, MAX_PIXELS)

    def items(start: int, stop: int) -> Items:
        for index in range(start, stop):
            yield StoredImage(source, index)

    return _set(source.title, "folder", len(source.names), (first.height, first.width), source.names, items)


def _needed(path: Path, tokenizer: ImageTokenizer | None) -> ImageTokenizer:
    if tokenizer is None:
        raise InputError(f"{path}: holds latents; give the tokenizer that made them with --tokenizer")
    return tokenizer


def _latent_file(path: Path, tokenizer: ImageTokenizer) -> ImageSet:
    content = read_latents(path, tokenizer.latent_fingerprint())
    sizes = [(height, width) for height, width in content.sizes.tolist()]
    for name, size in zip(content.names, sizes, strict=True):
        if size != sizes[0]:
            raise InputError(
                f"{path}: the image {name!r} is {_by(size)} (height x width), the first {_by(sizes[0])}; encode them "
                "again with one --size"
            )
    return _latents(path, content.latents, content.names, sizes[0], tokenizer)


def _cache(path: Path, tokenizer: ImageTokenizer) -> ImageSet:
    side = cache_info(path).image_size
    cache = read_cache(path, tokenizer.latent_fingerprint())
    latents = cache.latents[:, 0].clone()  # a view would keep the mirrored ones in memory
    return _latents(path, latents, cache.names, (side, side), tokenizer)


def _latents(
    path: Path,
    latents: Float[Tensor, "image token dim"],
    names: Sequence[str],
    size: tuple[int, int],
    tokenizer: ImageTokenizer,
) -> ImageSet:
    config = tokenizer.config
    least, (tokens, dim) = config.min_latent_tokens or config.num_latent_tokens, latents.shape[1:]
    if not least <= tokens <= config.num_latent_tokens or dim != config.latent_dim:
        expected = f"{config.num_latent_tokens} tokens of {config.latent_dim}"
        raise InputError(
            f"{path}: an image is {tokens} tokens of {dim}, the tokenizer decodes {expected}; encode again"
        )
    if size[0] % config.patch_size or size[1] % config.patch_size:
        raise InputError(
            f"{path}: images are {_by(size)} (height x width), expected multiples of {config.patch_size}; encode again"
        )

    def items(start: int, stop: int) -> Items:
        # always in the same groups, since what networks compute may depend in its last digits on how many there are
        for first in range(start - start % DECODED_AT_ONCE, stop, DECODED_AT_ONCE):
            group = _decoded(latents[first : first + DECODED_AT_ONCE], size, tokenizer, path)
            yield from group[max(start - first, 0) : stop - first]

    return _set(str(path), "latents", len(latents), size, names, items)


@torch.no_grad()
def _decoded(
    latents: Float[Tensor, "batch token dim"], size: tuple[int, int], tokenizer: ImageTokenizer, path: Path
) -> UInt8[np.ndarray, "batch height width 3"]:
    device = tokenizer.latent_mean.device
    with torch.autocast(device.type, enabled=False):
        images = tokenizer.decode(latents.to(device, torch.float32), size).float()
    is_finite = images.isfinite().all()
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    if not bool(is_finite):
        raise RunError(f"{path}: the tokenizer decodes to values that are not finite; look at its weights")
    return pixels.numpy()
