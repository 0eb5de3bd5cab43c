"""Image files to pixels and back: strangers' files decoded safely, the crops of ADM, tensors in [-1, 1]."""

import io
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from softvq.errors import InputError

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "PILLOW_MAX_PIXELS",
    "SUFFIXES",
    "center_crop",
    "find_images",
    "halve",
    "largest_crop_side",
    "random_crop",
    "read_image",
    "to_image",
    "to_tensor",
    "upright_rgb",
]

MAX_PIXELS = 64_000_000
PILLOW_MAX_PIXELS = 178_956_970  # above this Pillow refuses by itself
MAX_FILE_BYTES = 1 << 29
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP")
MIN_CROP_FRACTION = 0.8  # of the shorter side, in `random_crop`
MAX_ASPECT = 16  # longer strips are cropped while they are resized
ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: Path | str | bytes, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Image.Image:
    """Decode a JPEG, PNG or WebP of any colour mode to upright 8-bit RGB.

    Of an animation the first frame is taken, 16-bit grey is scaled, transparency is laid over white. The number of
    pixels is read from the header, so that a small file that unfolds to gigabytes is refused before it is decoded.

    Args:
        source: A file, or the bytes of one.
        max_pixels: Largest width times height, at most `PILLOW_MAX_PIXELS`.
        name: What to call it in errors; by default the file's path.

    Returns:
        An image of mode RGB that depends on the file no more.

    Raises:
        InputError: If the file is missing, empty, too large, damaged, or of another format.
    """
    if name is None:
        name = "image" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read_bytes(Path(source))
    if not data:
        raise InputError(f"{name}: is empty (0 bytes); fetch it again or remove it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd but usable files; what matters raises
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    size = f"{opened.width} x {opened.height} pixels"
                    raise InputError(f"{name}: is {size}, the limit is {max_pixels:,}; shrink it or raise max_pixels")
                return upright_rgb(opened, name)
        except (InputError, MemoryError):
            raise
        except Image.UnidentifiedImageError as error:
            raise InputError(f"{name}: is not a JPEG, PNG or WebP image; convert it or remove it") from error
        except Image.DecompressionBombError as error:
            raise InputError(f"{name}: has more than {PILLOW_MAX_PIXELS:,} pixels; shrink it or remove it") from error
        except Exception as error:  # a decoder given hostile bytes fails in every way there is
            raise _damaged(name, error) from error


def upright_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Return a picture of any colour mode as upright 8-bit RGB.

    Grey of 16 bits, which is also what mode I is taken for, is scaled, and transparency is laid over white. The result
    has no note how to hold it, so that nothing turns it again.

    Args:
        image: Open or in memory; it stays as it is.
        name: What to call it in errors.

    Returns:
        An image of mode RGB without metadata.

    Raises:
        InputError: If it has no pixels or they cannot be decoded, or if their range is not known, as of mode F.
    """
    if image.mode == "F":
        raise InputError(f"{name}: is of mode F, whose range is not known; scale it to 0 to 255 and convert it to L")
    if 0 in image.size:
        raise InputError(f"{name}: is {image.width} x {image.height} pixels; remove it")
    try:
        upright = _upright(_to_rgb(image), _orientation(image))
    except MemoryError:
        raise
    except Exception as error:  # see `read_image`
        raise _damaged(name, error) from error
    upright.info = {}
    return upright


def to_tensor(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Return an RGB image as float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1).to(torch.float32).div(127.5).sub(1.0).contiguous()


def to_image(tensor: Float[Tensor, "3 height width"]) -> Image.Image:
    """Return a tensor as an RGB image: clamped to [-1, 1] and rounded to the nearest of 256 levels."""
    pixels = tensor.detach().to("cpu", torch.float32).clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut out the middle square, as ADM (arXiv:2105.05233) prepares ImageNet.

    Args:
        image: Of any size.
        size: Side of the square in pixels; smaller images are enlarged.

    Returns:
        A square of side `size`.
    """
    width, height = _resized(image.size, size)
    return _resize_and_cut(image, size, size, (width - size) // 2, (height - size) // 2)


def random_crop(image: Image.Image, size: int, generator: torch.Generator) -> Image.Image:
    """Resize the shorter side to a random length in [size, size / 0.8] and cut out a random square of side `size`.

    Args:
        image: Of any size.
        size: Side of the square in pixels; smaller images are enlarged.
        generator: Source of the three draws: length, column, row.

    Returns:
        A square of side `size`.
    """
    shorter = _draw(size, largest_crop_side(size), generator)
    width, height = _resized(image.size, shorter)
    left, top = _draw(0, width - size, generator), _draw(0, height - size, generator)
    return _resize_and_cut(image, size, shorter, left, top)


def largest_crop_side(size: int) -> int:
    """Return the longest that `random_crop` makes the shorter side, in pixels."""
    return math.ceil(size / MIN_CROP_FRACTION)


def halve(image: Image.Image, shorter: int) -> Image.Image:
    """Average 2 x 2 pixels while the shorter side is at least twice `shorter`: the first half of an ADM resize."""
    while min(image.size) >= 2 * shorter:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def find_images(path: Path | str) -> list[Path]:
    """Return the images at a path, sorted: the file itself, or all below a folder by suffix; hidden names are skipped.

    Args:
        path: An image, whatever its suffix, or a folder; links are followed.

    Returns:
        Paths that begin with `path`.

    Raises:
        InputError: If the path does not exist, cannot be read, or holds no image.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; give an image or a folder of images")
    found: list[Path] = []
    seen: set[str] = set()
    for parent, folders, names in os.walk(path, onerror=_refuse_folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise InputError(f"{path}: holds no image ({', '.join(SUFFIXES)}); give a folder with at least one")
    return sorted(found)


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected an image file")
    if not path.is_file():  # also a pipe or a device, which could block for ever
        raise InputError(f"{path}: no such file; check the path")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: is larger than {MAX_FILE_BYTES >> 20} MiB; shrink it or remove it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error


def _damaged(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name}: is damaged or cut short ({reason}); fetch it again or remove it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        scaled = (np.asarray(image, dtype=np.float64) / 257.0).round().clip(0, 255)
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # the picture is whole, only the note about it is not
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _resized(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    while min(size) >= 2 * shorter:
        size = (size[0] // 2, size[1] // 2)
    scale = shorter / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _resize_and_cut(image: Image.Image, size: int, shorter: int, left: int, top: int) -> Image.Image:
    width, height = _resized(image.size, shorter)
    image = halve(image, shorter)
    if max(width, height) <= MAX_ASPECT * min(width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        return image.crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height  # a strip resized whole could take gigabytes
    right, bottom = min((left + size) * across, image.width), min((top + size) * down, image.height)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left * across, top * down, right, bottom))


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _refuse_folder(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error
