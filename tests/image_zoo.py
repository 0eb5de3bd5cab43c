"""Odd and hostile image files, each made on the spot from a few lines."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

__all__ = ["BAD", "ODD", "encoded", "photograph", "png_header"]

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def photograph(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Return smooth random colours, which survive JPEG well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped_bit(data: bytes) -> bytes:
    middle = data.index(b"IDAT") + 12
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def text_bomb() -> bytes:
    """Return a small PNG whose comment unfolds to 100 MB before the pixels are reached."""
    whole = encoded(photograph())
    comment = chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(100_000_000)))
    return whole[:33] + comment + whole[33:]


def grey16() -> Image.Image:
    return Image.fromarray(np.array([[0, 257 * 40], [40_000, 65_535]], dtype=np.uint16))


def palette_with_hole() -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return encoded(image, transparency=1)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (GREEN, RED)]
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)


def turned(orientation: int) -> bytes:
    """Return a lossless picture, red in its left half as stored, with a note how to hold it."""
    image = Image.new("RGB", (8, 4), BLUE)
    image.paste(RED, (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, exif=exif)


def half_clear(kind: str) -> bytes:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    return encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), kind, **options)


# What cannot be used, and words of the reason given.
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero.jpg": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"this is no picture\n" * 9, "not a JPEG, PNG or WebP"),
    "page.png": (lambda: b"<html><body>404 Not Found</body></html>", "not a JPEG, PNG or WebP"),
    "noise.webp": (lambda: np.random.default_rng(0).bytes(4096), "not a JPEG, PNG or WebP"),
    "gif.jpg": (lambda: encoded(photograph(), "GIF"), "not a JPEG, PNG or WebP"),
    "tiff.jpg": (lambda: encoded(photograph(), "TIFF"), "not a JPEG, PNG or WebP"),
    "bmp.png": (lambda: encoded(photograph(), "BMP"), "not a JPEG, PNG or WebP"),
    "eps.jpg": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a JPEG"),
    "cut.jpg": (lambda: encoded(photograph(), "JPEG")[:-200], "damaged or cut short"),
    "cut.png": (lambda: encoded(photograph())[:-200], "damaged or cut short"),
    "flipped.png": (lambda: flipped_bit(encoded(photograph())), "damaged or cut short"),
    "no_data.png": (lambda: png_header(8, 8), "damaged or cut short"),
    "comment.png": (text_bomb, "damaged or cut short"),
    "bomb.png": (lambda: png_header(9_000, 9_000), "9000 x 9000 pixels, the limit is 64,000,000"),
    "big_bomb.png": (lambda: png_header(60_000, 60_000), "more than 178,956,970 pixels"),
}

# What is odd and yet fine, with the size and the colour of the first pixel once decoded.
ODD: dict[str, tuple[Callable[[], bytes], tuple[int, int], tuple[int, int, int]]] = {
    "cmyk.jpg": (lambda: encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (8, 8), RED),
    "grey.png": (lambda: encoded(Image.new("L", (3, 2), 77)), (3, 2), (77, 77, 77)),
    "grey.jpg": (lambda: encoded(Image.new("L", (8, 8), 77), "JPEG"), (8, 8), (77, 77, 77)),
    "grey16.png": (lambda: encoded(grey16().rotate(180)), (2, 2), WHITE),
    "bilevel.png": (lambda: encoded(Image.new("1", (2, 2), 1)), (2, 2), WHITE),
    "grey_alpha.png": (lambda: encoded(Image.new("LA", (2, 2), (0, 0))), (2, 2), WHITE),
    "palette.png": (palette_with_hole, (2, 1), RED),
    "clear.png": (lambda: half_clear("PNG"), (2, 2), WHITE),
    "clear.webp": (lambda: half_clear("WEBP"), (2, 2), WHITE),
    "animated.png": (lambda: animated("PNG"), (4, 4), GREEN),
    "animated.webp": (lambda: animated("WEBP"), (4, 4), GREEN),
    "turned.png": (lambda: turned(6), (4, 8), RED),
    "wrong_suffix.jpg": (lambda: encoded(Image.new("RGB", (3, 3), BLUE)), (3, 3), BLUE),
    "dot.png": (lambda: encoded(Image.new("RGB", (1, 1), BLUE)), (1, 1), BLUE),
    "tall.png": (lambda: encoded(Image.new("RGB", (1, 20_000), BLUE)), (1, 20_000), BLUE),
    "wide.png": (lambda: encoded(Image.new("RGB", (20_000, 1), BLUE)), (20_000, 1), BLUE),
}
