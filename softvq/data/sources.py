"""Where pictures are kept: a folder, tar shards, or a Hugging Face data set, all read by number.

A source knows names, labels and sizes before a picture is read, and reads any picture without those before it. That is
all that a keyed order needs, so every source gives the same batches for the same names.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from softvq.data.images import MAX_PIXELS, find_images, read_image

__all__ = ["HUB_PREFIX", "FolderSource", "Source", "StoredImage", "fingerprint_of", "labelled_by_folder", "open_source"]

HUB_PREFIX = "hf:"


@runtime_checkable
class Source(Protocol):
    """Pictures by number."""

    title: str
    """What the user gave, for errors."""
    names: Sequence[str]
    """One for each picture, with forward slashes; keys, which nobody may take for paths."""
    labels: list[int]
    """Indices of `classes`, -1 where a picture has none."""
    classes: list[str]
    """Names of the classes in their order; empty without classes."""
    remarks: list[str]
    """A sentence for each kind of thing that was passed over."""

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Read a picture as `read_image` does: InputError if it cannot be read, RunError if a server fails."""
        ...

    def sizes(self) -> Iterable[int]:
        """Return the bytes of every picture in order; -1 for one that is not there."""
        ...


def open_source(where: Path | str) -> Source:
    """Look at a set of pictures, without reading any.

    Args:
        where: A folder of images or one image; shards as `softvq.data.shards.open_shards` takes them; or
            `hf:NAME[:SPLIT[:IMAGE_COLUMN[:LABEL_COLUMN]]]`.

    Returns:
        The source.

    Raises:
        InputError: If there is nothing there, or nothing that holds pictures.
    """
    text = str(where)
    if text.startswith(HUB_PREFIX):
        from softvq.data.hub_images import open_hub_images

        return open_hub_images(text)
    from softvq.data.shards import names_shards, open_shards

    return open_shards(text) if names_shards(text) else FolderSource(Path(where))


class StoredImage(NamedTuple):
    """A picture of a source, not read yet."""

    source: Source
    """Where it is kept."""
    index: int
    """Its number."""

    def read(self) -> Image.Image:
        """Decode it."""
        return self.source.image(self.index, MAX_PIXELS)

    def __str__(self) -> str:
        return f"{self.source.title}: {self.source.names[self.index]}"


class FolderSource:
    """The image files below a folder, or a single one.

    Args:
        root: The folder, or an image.

    Raises:
        InputError: If it does not exist or holds no image.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.title = root, str(root)
        found = find_images(root)
        self.names: Sequence[str] = [path.relative_to(root).as_posix() if path != root else root.name for path in found]
        self.classes, self.labels = labelled_by_folder(self.names)
        self.remarks: list[str] = []

    def path(self, index: int) -> Path:
        """Return the file of a picture."""
        return self.root / self.names[index] if self.root.is_dir() else self.root

    def image(self, index: int, max_pixels: int) -> Image.Image:
        """Read a picture."""
        return read_image(self.path(index), max_pixels)

    def sizes(self) -> Iterable[int]:
        """Return the bytes of every file; -1 for a link to nothing, which is passed over when it is read."""
        for index in range(len(self.names)):
            try:
                yield self.path(index).stat().st_size
            except OSError:
                yield -1


def labelled_by_folder(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return classes and labels where the first folder of a name is its class.

    Args:
        names: Relative, with forward slashes.

    Returns:
        Classes sorted by name and a label for each name; no classes and labels of -1 if any name is in no folder.
    """
    if any("/" not in name for name in names):
        return [], [-1] * len(names)
    firsts = [name.split("/", 1)[0] for name in names]
    classes = sorted(set(firsts))
    numbers = {name: number for number, name in enumerate(classes)}
    return classes, [numbers[first] for first in firsts]


def fingerprint_of(source: Source) -> str:
    """Return what tells a set of pictures from others: SHA-256 over the sorted names and sizes in bytes, hexadecimal.

    Labels that the names do not tell count as well.
    A folder and the shards that `softvq data pack` makes of it have the same, so that a run may go on from either.

    Args:
        source: The pictures.

    Returns:
        64 digits.
    """
    digest = hashlib.sha256()
    for name, size in sorted(zip(source.names, source.sizes(), strict=True)):
        digest.update(os.fsencode(name) + b"\0%d\n" % size)
    if (source.classes, source.labels) != labelled_by_folder(source.names):
        digest.update(json.dumps([source.classes, source.labels]).encode())
    return digest.hexdigest()
