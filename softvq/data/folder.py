"""A set of photographs as an endless, keyed stream of batches.

What stands at a position depends on the seed, the position and the files alone: not on the number of workers or ranks,
nor on where a run was started. Resuming is asking for a later step.
"""

import dataclasses
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softvq.data.images import (
    MAX_PIXELS,
    PILLOW_MAX_PIXELS,
    center_crop,
    halve,
    largest_crop_side,
    random_crop,
    to_tensor,
)
from softvq.data.order import index_at
from softvq.data.sources import fingerprint_of, open_source
from softvq.errors import InputError, RunError
from softvq.randomness import generator

__all__ = ["Batch", "DataConfig", "PhotoFolder", "Sample", "batches"]

NAMES_SHOWN = 5
RESTARTS = 3
"""How often data workers that died are replaced in one run; more often it is no accident."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where the photographs are and how they are prepared."""

    path: str | None = None
    """Folder of images: one subfolder a class, or images directly in it, which then have no classes; or a folder, a
    pattern or a URL of tar shards, or `hf:NAME[:SPLIT[:IMAGE_COLUMN[:LABEL_COLUMN]]]`; see docs/data.md."""

    crop: Literal["random", "center"] = "random"
    """Square cut from each photograph: a random one of at least 0.8 of the shorter side, or the middle."""

    flip: bool = True
    """Mirror half of the photographs."""

    num_workers: int = 0
    """Processes that decode ahead, on each rank; 0 decodes in the training process."""

    max_bad_fraction: float = 0.05
    """Share of unreadable files, in [0, 1), above which a run stops; below it they are skipped and reported."""

    max_pixels: int = MAX_PIXELS
    """Largest photograph in pixels; larger ones count as unreadable."""

    cache_megabytes: int = 256
    """Memory on each rank, shared by its workers, for keeping decoded photographs; 0 keeps none."""

    def __post_init__(self) -> None:
        if not 0 <= self.num_workers <= 256:
            raise InputError(f"num_workers is {self.num_workers}, expected 0 to 256")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise InputError(f"max_bad_fraction is {self.max_bad_fraction}, expected at least 0 and below 1")
        if not 1 <= self.max_pixels <= PILLOW_MAX_PIXELS:
            raise InputError(f"max_pixels is {self.max_pixels}, expected 1 to {PILLOW_MAX_PIXELS}")
        if self.cache_megabytes < 0:
            raise InputError(f"cache_megabytes is {self.cache_megabytes}, expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One photograph as a model sees it."""

    image: Float[Tensor, "3 size size"]
    """RGB in [-1, 1]."""

    label: int
    """Index of the class in `PhotoFolder.classes`, -1 where there are none."""

    skipped: tuple[str, ...]
    """Names, relative to the folder, of unreadable files in whose place this photograph stands."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """This rank's part of one step."""

    images: Float[Tensor, "batch 3 size size"]
    """RGB in [-1, 1]."""

    labels: Int64[Tensor, " batch"]
    """Indices of classes, -1 where there are none."""

    positions: Int64[Tensor, " batch"]
    """Global sample numbers."""

    skipped: list[str]
    """Names of unreadable files met in this batch, each once; a file is met again in every epoch."""

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from where it can be copied to a GPU in the background."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("images", "labels", "positions")}
        return dataclasses.replace(self, **pinned)


class PhotoFolder(Dataset[Sample]):
    """The photographs of a folder or another source, addressed by global position.

    Where no image lies directly in the folder, its subfolders are the classes, sorted by name.

    Args:
        root: The folder, or what else `softvq.data.sources.open_source` takes.
        image_size: Side of the squares in pixels.
        config: How photographs are prepared; its `path` is not looked at.
        seed: Of the run; decides order, crops and flips.

    Raises:
        InputError: If the folder does not exist or holds no image.
    """

    def __init__(self, root: Path | str, image_size: int, config: DataConfig, seed: int) -> None:
        if not str(root).lower().endswith(".tar") and Path(root).is_file():
            raise InputError(f"{root}: is a file, expected a folder of images")
        if image_size < 1:
            raise InputError(f"image_size is {image_size}, expected 1 or more")
        self.source = open_source(root)
        self.root, self.image_size, self.config, self.seed = self.source.title, image_size, config, seed
        self.names, self.labels, self.classes = self.source.names, self.source.labels, self.source.classes
        self._bad: set[int] = set()
        self._decoded: dict[int, Image.Image] = {}
        self._room = config.cache_megabytes * 2**20 // max(1, config.num_workers)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    @property
    def fingerprint(self) -> str:
        """As `softvq.data.sources.fingerprint_of` has it: changes when the data set does."""
        return fingerprint_of(self.source)

    def sample(self, position: int) -> Sample:
        """Return the photograph at a global position, prepared with the randomness of that position.

        In place of an unreadable file stands the next readable one in the order of the same epoch.

        Args:
            position: Global sample number, 0 or more.

        Returns:
            The photograph, its label and whom it replaces.

        Raises:
            RunError: If no file of the folder can be read.
        """
        size = len(self)
        epoch_start = position - position % size
        skipped: list[str] = []
        for step in range(size):
            index = index_at(epoch_start + (position + step) % size, size, self.seed)
            photograph = self._read(index)
            if photograph is not None:
                image = self._prepare(photograph, generator(self.seed, "augment", position))
                return Sample(image=image, label=self.labels[index], skipped=tuple(skipped))
            skipped.append(self.names[index])
        raise RunError(f"{self.root}: none of its {size} images can be read, the first is {self.names[0]}")

    def check_bad(self, bad: set[str]) -> None:
        """Stop if these unreadable files are too many.

        Args:
            bad: Distinct names met so far.

        Raises:
            RunError: If they are more than `max_bad_fraction` of all files.
        """
        if len(bad) > self.config.max_bad_fraction * len(self):
            shown = ", ".join(sorted(bad)[:NAMES_SHOWN]) + (", ..." if len(bad) > NAMES_SHOWN else "")
            raise RunError(
                f"{self.root}: {len(bad)} of {len(self)} images cannot be read ({shown}), more than max_bad_fraction "
                f"{self.config.max_bad_fraction:g} allows; repair or remove them, or raise it"
            )

    def _read(self, index: int) -> Image.Image | None:
        if index in self._bad:
            return None
        if index in self._decoded:
            return self._decoded[index]
        try:
            photograph = self.source.image(index, self.config.max_pixels)
        except InputError:
            self._bad.add(index)
            return None
        photograph = halve(photograph, self._largest_side)  # every crop would begin so
        num_bytes = 4 * photograph.width * photograph.height  # Pillow keeps RGB in four
        if num_bytes <= self._room:
            self._room -= num_bytes
            self._decoded[index] = photograph
        return photograph

    @property
    def _largest_side(self) -> int:
        return largest_crop_side(self.image_size) if self.config.crop == "random" else self.image_size

    def _prepare(self, photograph: Image.Image, draws: torch.Generator) -> Float[Tensor, "3 size size"]:
        mirrored = self.config.flip and bool(torch.randint(2, (), generator=draws))
        if self.config.crop == "random":
            square = random_crop(photograph, self.image_size, draws)
        else:
            square = center_crop(photograph, self.image_size)
        return to_tensor(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else square)


def batches(
    folder: PhotoFolder,
    batch_size: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Return this rank's part of steps `start_step` to `start_step + num_steps - 1`.

    Step s holds the positions s * batch_size to (s + 1) * batch_size - 1; rank r takes the r-th of `world_size` equal
    stretches. The result does not depend on `num_workers`, and torch's global generator is not touched.

    Args:
        folder: Where the photographs are.
        batch_size: Of all ranks together; a multiple of `world_size`.
        start_step: First step, 0 or more.
        num_steps: Number of steps, 0 or more.
        num_workers: Processes that decode ahead; 0 decodes in this one.
        rank: In [0, world_size).
        world_size: Number of ranks.

    Returns:
        Batches in the order of their steps.

    Raises:
        InputError: If `batch_size` cannot be shared out.
        RunError: If more than `max_bad_fraction` of the files were met and found unreadable; if workers died often.
    """
    if batch_size < 1 or batch_size % world_size:
        raise InputError(f"batch_size is {batch_size}, expected a positive multiple of the {world_size} processes")
    assert 0 <= rank < world_size, f"rank is {rank} of {world_size}"
    steps = _Steps(folder=folder, batch_size=batch_size, rank=rank, world_size=world_size)

    def load(step: int) -> Iterator[Batch | RunError]:
        before = signal.getsignal(signal.SIGCHLD)
        loader = DataLoader(
            steps,
            batch_size=None,
            sampler=range(step, start_step + num_steps),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_leave_interrupts_to_parent,
            generator=torch.Generator(),  # else it draws from the global one
        )
        loaded = iter(loader)
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            # torch's would tell of a dead worker in the middle of an update; asking for a batch tells as well
            signal.signal(signal.SIGCHLD, before)
        return loaded

    return _checked(load, load(start_step), start_step, folder)


def _checked(
    load: Callable[[int], Iterator[Batch | RunError]], loaded: Iterator[Any], step: int, folder: PhotoFolder
) -> Iterator[Batch]:
    bad: set[str] = set()
    died = 0
    try:
        while True:
            try:
                batch = next(loaded, None)
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if type(error) is RuntimeError and "DataLoader worker" not in str(error):
                    raise
                died += 1
                if died > RESTARTS:
                    reason = f"data workers died {died} times, often for want of memory; lower num_workers and resume"
                    raise RunError(reason) from error
                warnings.warn(f"a data worker died before step {step + 1}; others take its place", stacklevel=2)
                loaded = load(step)
                continue
            if batch is None:
                return
            if isinstance(batch, RunError):
                raise batch
            bad.update(batch.skipped)
            folder.check_bad(bad)
            yield batch
            step += 1
    finally:
        del loaded  # ends the workers now


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Steps(Dataset["Batch | RunError"]):
    """Whole batches by step; an error is returned, since one raised in a worker comes back as a traceback in text."""

    folder: PhotoFolder
    batch_size: int
    rank: int
    world_size: int

    def __getitem__(self, index: int) -> Batch | RunError:
        share = self.batch_size // self.world_size
        first = index * self.batch_size + self.rank * share
        positions = range(first, first + share)
        try:
            samples = [self.folder.sample(position) for position in positions]
        except RunError as error:
            return error
        return Batch(
            images=torch.stack([sample.image for sample in samples]),
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            skipped=list(dict.fromkeys(name for sample in samples for name in sample.skipped)),
        )


def _leave_interrupts_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
