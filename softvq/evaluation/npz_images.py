"""Images in one .npz file, as ADM (arXiv:2105.05233) shares its samples, read one after the other.

Such a file is a zip archive with a member `arr_0.npy`: uint8 of the shape `[image, height, width, 3]`, often 10 GB. It
is never in memory as a whole, nothing in it is unpickled, and what its headers promise is compared with what is there.
"""

import contextlib
import dataclasses
import io
import math
import warnings
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from softvq.data.images import MAX_PIXELS
from softvq.errors import InputError

__all__ = ["NpzImages", "archive_errors", "array_header", "open_npz", "read_npz"]

ARRAY = "arr_0"
MEMBER = f"{ARRAY}.npy"
WANTED = f"expected {ARRAY} as uint8 [image, height, width, 3]"
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MAX_HEADER_BYTES = 1 << 12  # numpy writes 128 for such an array
MAX_DEFLATE_RATIO = 1032  # no stream of deflate unfolds to more
PIECE_BYTES = 1 << 20
ENCRYPTED = 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NpzImages:
    """What an .npz file of images says of itself, compared with its size."""

    path: Path
    """Of the file."""
    count: int
    """Images in it, at least 1."""
    height: int
    """Of each, in pixels."""
    width: int
    """Of each, in pixels."""
    offset: int
    """Bytes of the array's own header, before the first pixel."""


def open_npz(path: Path) -> NpzImages:
    """Look at the headers of an .npz file of images; no pixel is read.

    Args:
        path: Of the file; `arr_0` is stored or deflated, in C order.

    Returns:
        How many images there are, of which size.

    Raises:
        InputError: If the file is missing, no whole archive, holds no `arr_0` of 8-bit RGB images, or promises more
            than it can hold.
    """
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder, expected an .npz file' if path.is_dir() else 'no such file'}")
    with archive_errors(f"{path}: is no whole .npz file"), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if MEMBER not in names:
            raise _missing(path, names)
        info = archive.getinfo(MEMBER)
        _check_member(path, info)
        with archive.open(info) as member:
            head = member.read(MAX_HEADER_BYTES)
    shape, offset = _header(path, head)
    count, height, width, _ = shape
    if info.file_size != offset + math.prod(shape):
        raise InputError(
            f"{path}: promises {count} images of {height}x{width}, which are {offset + math.prod(shape):,} bytes, but "
            f"holds {info.file_size:,}; fetch or write it again"
        )
    return NpzImages(path=path, count=count, height=height, width=width, offset=offset)


def read_npz(images: NpzImages, start: int, stop: int) -> Generator[UInt8[np.ndarray, "height width 3"], None, None]:
    """Return some images in order, each read when it is asked for.

    What comes before `start` has to be read as well, but is not kept. Whoever reads up to the last image finds out
    whether the checksum of the archive is that of the pixels.

    Args:
        images: As `open_npz` gives them.
        start: Number of the first image.
        stop: Number after that of the last image, at most `images.count`.

    Yields:
        RGB of 8 bits, `[height, width, 3]`.

    Raises:
        InputError: If what is there is damaged or shorter than promised.
    """
    if start == stop:
        return
    each = images.height * images.width * 3
    with _member(images) as member:
        before = images.offset + start * each
        for done in range(0, before, PIECE_BYTES):
            _exactly(images, member, min(PIECE_BYTES, before - done), start)
        for place in range(start, stop):
            pixels = np.frombuffer(_exactly(images, member, each, place), dtype=np.uint8)
            yield pixels.reshape(images.height, images.width, 3)


@contextlib.contextmanager
def archive_errors(sentence: str) -> Iterator[None]:
    """Say in a sentence whatever goes wrong with an archive from strangers.

    Args:
        sentence: Where, and what it means; the reason is put behind it.

    Yields:
        Nothing.

    Raises:
        InputError: For every error but one of memory: hostile bytes make zipfile and numpy fail in every way there is.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{sentence} ({reason}); fetch or write it again") from error


def array_header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the header of a numpy array.

    Args:
        file: The beginning of it; it is left behind the header.

    Returns:
        The shape, whether the order is Fortran's, and the type.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that Python 2 wrote, which are fine
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)


def _missing(path: Path, names: list[str]) -> InputError:
    arrays = {name.removesuffix(".npy") for name in names}
    if {"mu", "sigma"} <= arrays:
        return InputError(f"{path}: holds statistics (mu, sigma) but no images; {WANTED}")
    listed = ", ".join(sorted(arrays)[:3]) or "nothing"
    return InputError(f"{path}: holds no {ARRAY} but {listed[:100]}; {WANTED}")


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & ENCRYPTED:
        raise InputError(f"{path}: is encrypted; write it again without a password")
    if info.compress_type not in METHODS:
        raise InputError(f"{path}: is packed by method {info.compress_type}; write it with numpy.savez")
    most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else MAX_DEFLATE_RATIO)
    if info.file_size > most or info.compress_size > path.stat().st_size:
        raise InputError(
            f"{path}: promises {info.file_size:,} bytes in {info.compress_size:,}, which cannot be; fetch or write it "
            "again"
        )


def _header(path: Path, head: bytes) -> tuple[tuple[int, int, int, int], int]:
    """Return the shape that an array's header tells, and how long the header is."""
    file = io.BytesIO(head)
    with archive_errors(f"{path}: {ARRAY} is no array of numpy, {WANTED}"):
        shape, is_fortran, dtype = array_header(file)
    if dtype.hasobject:
        raise InputError(f"{path}: {ARRAY} holds pickled objects, which are never opened; {WANTED}")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise InputError(f"{path}: {ARRAY} is {dtype} {list(shape)}; {WANTED}")
    if is_fortran:
        raise InputError(f"{path}: {ARRAY} is in Fortran's order; save numpy.ascontiguousarray of it")
    count, height, width, _ = shape
    if count < 1 or height < 1 or width < 1:
        raise InputError(f"{path}: {ARRAY} is {list(shape)}, which is no image; {WANTED} with at least one")
    if height * width > MAX_PIXELS:
        raise InputError(f"{path}: has images of {height}x{width} pixels, the limit is {MAX_PIXELS:,}; shrink them")
    return (count, height, width, 3), file.tell()


@contextlib.contextmanager
def _member(images: NpzImages) -> Iterator[zipfile.ZipExtFile]:
    with contextlib.ExitStack() as stack:
        with archive_errors(f"{images.path}: cannot be opened any more"):
            archive = stack.enter_context(zipfile.ZipFile(images.path))
            member = stack.enter_context(archive.open(MEMBER))
        assert isinstance(member, zipfile.ZipExtFile)
        yield member


def _exactly(images: NpzImages, member: zipfile.ZipExtFile, length: int, place: int) -> bytes:
    """Return the next bytes, which an image needs; the last 4 KiB come only if the checksum is that of all."""
    where = f"at image {place} of {images.count}, counted from 0"
    with archive_errors(f"{images.path}: is damaged or cut short {where}"):
        data = member.read(length)
        if len(data) < length:
            raise EOFError("it ends too early")
    return data
