"""What several commands need: consoles, models, photographs of one size, care with what is there already."""

import argparse
import contextlib
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from torch import Tensor

from softvq.data.ahead import mapped_ahead
from softvq.data.images import center_crop, find_images, read_image, to_tensor
from softvq.errors import InputError, RunError
from softvq.files import remove_leftovers
from softvq.tokenizers.autoencoder import ImageTokenizer

__all__ = [
    "Photo",
    "Photos",
    "batched",
    "check_output",
    "check_tokens",
    "choose_size",
    "finite_images",
    "load_tokenizer",
    "machine_name",
    "messages",
    "open_photos",
    "precision_of",
    "progress",
    "results",
    "round_trip",
]

AHEAD = 4
"""Photographs for each thread that may wait to be asked for."""

T = TypeVar("T")


def results() -> Console:
    """Return the console for what was asked for: stdout, with nothing in the text taken for markup."""
    return Console(markup=False, highlight=False)


def messages() -> Console:
    """Return the console for progress and remarks: stderr."""
    return Console(stderr=True, markup=False, highlight=False)


def progress(items: Sequence[T], label: str, console: Console) -> Iterable[T]:
    """Return the items, with a bar that goes forward with them where there is a terminal to draw it on."""
    return track(items, label, console=console, transient=True, disable=not console.is_terminal)


def machine_name(device: torch.device) -> str:
    """Return what ran something, for beside its figures: the GPU's name, or the processor's with its cores.

    Args:
        device: Where it ran.

    Returns:
        A few words.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    threads = torch.get_num_threads()
    return f"{name[1] if name else platform.machine()}, {threads} thread{'s' * (threads != 1)}"


def precision_of(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the context the networks run in: plain float32, or bfloat16 autocast."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision != "float32")


def load_tokenizer(model: str, device: torch.device) -> ImageTokenizer:
    """Load a tokenizer for use.

    Args:
        model: A folder, or a name on the hub.
        device: Where to.

    Returns:
        The tokenizer in evaluation mode.

    Raises:
        InputError: If there is no such model, or its files are not whole.
    """
    return ImageTokenizer.from_pretrained(model).to(device).eval()


def check_tokens(count: int | None, tokenizer: ImageTokenizer) -> None:
    """Refuse a number of tokens that a tokenizer does not decode; None is all of them."""
    most = tokenizer.config.num_latent_tokens
    least = tokenizer.config.min_latent_tokens or most
    if count is not None and not least <= count <= most:
        takes = f"{least} to {most}" if least < most else f"{most}, and no fewer"
        raise InputError(f"--tokens is {count}, but the model decodes {takes}")


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that would replace something, or that cannot be made, before any work is done.

    Args:
        path: A file or a folder that is to be written.
        overwrite: Whether it may replace what is there.

    Raises:
        InputError: If `path` is a file or a folder that is not empty, and `overwrite` is false; or if something on the
            way to it is a file.
    """
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise InputError(f"{path}: is already there; give another name, or --overwrite to replace it")
    if path.is_dir():
        remove_leftovers(path, below=False)  # of a call that was killed
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: cannot be made, because {parent} is a file; give another name")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot be made, because {parent} may not be written to; give another name")


def choose_size(text: str | None, tokenizer: ImageTokenizer) -> tuple[int, int] | None:
    """Return the height and width photographs are brought to, or None for the size each of them has.

    Args:
        text: `native`, `N`, `HxW`, or None for the model's own image size.
        tokenizer: The model that is to encode them.

    Returns:
        Height and width in pixels, multiples of the patch size.

    Raises:
        InputError: If the size is not one, or no multiple of the patch size.
    """
    if text is None:
        return tokenizer.config.image_size, tokenizer.config.image_size
    if text == "native":
        return None
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text, re.ASCII)
    if not match:
        raise InputError(f"--size is {text!r}, expected native, a number such as 256, or HxW such as 256x384")
    size = int(match[1]), int(match[2] or match[1])
    nearest = _nearest(size, tokenizer.config.patch_size)
    if size != nearest:
        raise InputError(
            f"--size is {text!r}, expected multiples of the patch size {tokenizer.config.patch_size}; "
            f"the nearest is {nearest[0]}x{nearest[1]}"
        )
    return size


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """One photograph, ready to be encoded."""

    name: str
    """Its path relative to the folder it was found in, with forward slashes."""
    image: Float[Tensor, "3 height width"]
    """In [-1, 1]."""


@dataclass(kw_only=True, slots=True)
class Photos:
    """The photographs at a path, one at a time.

    In a folder, a photograph that cannot be used is skipped, and named in `skipped`; after the last one, more than half
    of them raises `RunError`. A single photograph that cannot be used raises `InputError`.
    """

    source: Path
    """A photograph, or a folder that is searched for them."""
    size: tuple[int, int] | None
    """Height and width to scale and centre-crop to; None keeps each photograph's own."""
    patch_size: int
    """Height and width have to be multiples of this."""
    console: Console
    """Where progress and skipped photographs are told."""
    workers: int = 0
    """Threads that read ahead; 0 reads each photograph when it is asked for."""
    paths: list[Path] = field(init=False)
    """What was found."""
    skipped: list[str] = field(init=False, default_factory=list)
    """Names of the photographs that could not be used so far."""

    def __post_init__(self) -> None:
        """Search the path."""
        self.paths = find_images(self.source)

    @property
    def names(self) -> tuple[str, ...]:
        """One for each of `paths`: relative to the folder, with forward slashes."""
        if self.source.is_file():
            return (self.source.name,)
        return tuple(path.relative_to(self.source).as_posix() for path in self.paths)

    def __iter__(self) -> Iterator[Photo]:
        self.skipped.clear()
        pairs = list(zip(self.paths, self.names, strict=True))
        read = mapped_ahead(self._read, iter(self.paths), self.workers, AHEAD * self.workers)
        with contextlib.closing(read):
            for path, name in progress(pairs, "photographs", self.console):
                image = next(read)
                if isinstance(image, InputError):
                    if path == self.source:
                        raise image
                    self.skipped.append(name)
                    self.console.print(f"skipped: {image}", soft_wrap=True)
                    continue
                yield Photo(name=name, image=image)
        if self.skipped:
            count = f"{len(self.skipped)} of {len(self.paths)} photographs"
            if 2 * len(self.skipped) > len(self.paths):
                raise RunError(f"{self.source}: {count} could not be used, the first {self.skipped[0]}; look at them")
            self.console.print(f"skipped {count}", soft_wrap=True)

    def _read(self, path: Path) -> Float[Tensor, "3 height width"] | InputError:
        try:
            return to_tensor(self._fit(read_image(path), path))
        except InputError as error:  # told in its turn, and by one thread
            return error

    def _fit(self, image: Image.Image, path: Path) -> Image.Image:
        if self.size is not None:
            height, width = self.size
            if height == width:
                return center_crop(image, height)
            return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        size = image.height, image.width
        nearest = _nearest(size, self.patch_size)
        if size != nearest:
            raise InputError(
                f"{path}: is {size[0]}x{size[1]} (height x width), not a multiple of the patch size {self.patch_size}; "
                f"the nearest is --size {nearest[0]}x{nearest[1]}"
            )
        return image


def open_photos(arguments: argparse.Namespace, tokenizer: ImageTokenizer) -> Photos:
    """Return the photographs a command was given, at the size it was asked for."""
    size = choose_size(arguments.size, tokenizer)
    patch_size = tokenizer.config.patch_size
    return Photos(source=Path(arguments.photos), size=size, patch_size=patch_size, console=messages())


def batched(
    photos: Iterable[Photo], batch_size: int
) -> Iterator[tuple[list[str], Float[Tensor, "batch 3 height width"]]]:
    """Group photographs that follow one another and have one size.

    Args:
        photos: In the order in which they come back.
        batch_size: Most of them in one group, >= 1.

    Yields:
        Names, and images stacked in the same order; at most `batch_size` of them.
    """
    waiting: list[Photo] = []
    for photo in photos:
        if waiting and (len(waiting) == batch_size or waiting[0].image.shape != photo.image.shape):
            yield [each.name for each in waiting], torch.stack([each.image for each in waiting])
            waiting = []
        waiting.append(photo)
    if waiting:
        yield [each.name for each in waiting], torch.stack([each.image for each in waiting])


def round_trip(
    tokenizer: ImageTokenizer, images: Float[Tensor, "batch 3 height width"], precision: str
) -> Float[Tensor, "batch 3 height width"]:
    """Encode and decode images on the tokenizer's device.

    Args:
        tokenizer: In evaluation mode.
        images: In [-1, 1], of a size the patch divides.
        precision: `float32` or `bf16`.

    Returns:
        What came back, on the CPU in [-1, 1].

    Raises:
        RunError: If the model gives values that are not finite.
    """
    device = tokenizer.latent_mean.device
    with precision_of(device, precision):
        latents = tokenizer.encode(images.to(device))
        decoded = tokenizer.decode(latents, (images.shape[2], images.shape[3]))
    return finite_images(decoded)


def finite_images(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Bring decoded images to the CPU, clamped.

    Args:
        images: As the tokenizer decodes them.

    Returns:
        Images in [-1, 1].

    Raises:
        RunError: If a value is not finite, as overflowing weights make it.
    """
    if not bool(images.isfinite().all()):
        raise RunError("the model paints values that are not finite; try --precision float32, or another model")
    return images.float().clamp(-1.0, 1.0).cpu()


def _nearest(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    height, width = (max(1, round(length / patch_size)) * patch_size for length in size)
    return height, width
