"""The compressed picture, a `.svq` file: a header of fixed length, and what an entropy coder made of the tokens.

    bytes  what it is, numbers with the lowest byte first
    4      magic, 89 53 56 51
    1      version, 1
    1      coder: 0 latents, 1 latents with statistics of their own, 2 codewords
    1      fit: 0 stretch, 1 shape, 2 crop
    1      bits
    8      beginning of the tokenizer's latent fingerprint
    2 + 2  width and height of the picture in pixels
    2      tokens
    2      codewords of each token; 0 for latents
    4      CRC-32 of the 24 bytes before it and of all bytes after it
    ...    payload, whole 32-bit words

Everything in a file is checked before anything is computed or made room for, so that a stranger's file can do no harm.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from softvq.data.images import MAX_PIXELS
from softvq.errors import InputError

__all__ = [
    "CODERS",
    "FITS",
    "MAX_BITS",
    "MAX_BYTES",
    "MAX_TOKENS",
    "MAX_TOP",
    "SvqHeader",
    "pack",
    "read_svq",
    "unpack",
]

MAGIC = b"\x89SVQ"
VERSION = 1
LAYOUT = struct.Struct("<4sBBBB8sHHHH")
CHECKSUM = struct.Struct("<I")
CODERS = ("latents", "latents-fitted", "codewords")
"""By their numbers in files; the second is the first with means and deviations of its own."""
FITS = ("stretch", "shape", "crop")
"""By their numbers in files."""
MAX_BITS, MAX_TOP, MAX_SIDE, MAX_TOKENS = 12, 256, 65_535, 65_535
MAX_BYTES = 1 << 24
"""No file is larger: 8,192 tokens of 128 codewords each are not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SvqHeader:
    """What a file says before its payload."""

    coder: str
    """One of `CODERS`."""
    fit: str
    """One of `FITS`: how the picture was brought to a size that the tokenizer takes."""
    bits: int
    """Of latents, steps are 8 / 2^bits deviations; of codewords, what a weight takes, 0 if there are none."""
    fingerprint: bytes
    """The first 8 bytes of `ImageTokenizer.latent_fingerprint()`."""
    width: int
    """Of the picture in pixels."""
    height: int
    """Of the picture in pixels."""
    tokens: int
    """How many of the first tokens there are."""
    top: int
    """Codewords of each token; 0 for latents."""

    def __post_init__(self) -> None:
        """Refuse what no picture has."""
        codewords = self.coder == "codewords"
        bounds = (
            ("width", self.width, 1, MAX_SIDE),
            ("height", self.height, 1, MAX_SIDE),
            ("tokens", self.tokens, 1, MAX_TOKENS),
            ("bits", self.bits, 0 if codewords else 1, MAX_BITS),
            ("top", self.top, int(codewords), MAX_TOP if codewords else 0),
        )
        for name, value, least, most in bounds:
            if not least <= value <= most:
                raise InputError(f"{name} is {value}, expected {least} to {most}")
        if self.width * self.height > MAX_PIXELS:
            raise InputError(f"the picture has {self.width} x {self.height} pixels, the limit is {MAX_PIXELS:,}")
        if self.fit == "crop" and self.width != self.height:
            raise InputError(f"the picture is a middle square, but has {self.width} x {self.height} pixels")
        if self.top > 1 and self.bits == 0:
            raise InputError(f"bits is 0, expected 1 to {MAX_BITS} for the weights of {self.top} codewords")


def pack(header: SvqHeader, payload: bytes) -> bytes:
    """Return the bytes of a file."""
    head = LAYOUT.pack(
        MAGIC, VERSION, CODERS.index(header.coder), FITS.index(header.fit), header.bits, header.fingerprint,
        header.width, header.height, header.tokens, header.top,
    )  # fmt: skip
    return head + CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def unpack(data: bytes) -> tuple[SvqHeader, bytes]:
    """Read a file's header, and check that its bytes are the ones that were written.

    Args:
        data: The whole file.

    Returns:
        The header, and the payload, which is still to be decoded.

    Raises:
        InputError: If this is no such file, of another version, damaged, or of an impossible size.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise InputError("is not a picture compressed by softvq")
    if len(data) < LAYOUT.size + CHECKSUM.size or len(data) > MAX_BYTES:
        raise InputError(f"has {len(data):,} bytes, expected {LAYOUT.size + CHECKSUM.size} to {MAX_BYTES:,}")
    head, payload = data[: LAYOUT.size], data[LAYOUT.size + CHECKSUM.size :]
    _, version, coder, fit, bits, fingerprint, width, height, tokens, top = LAYOUT.unpack(head)
    if version != VERSION:
        raise InputError(f"is of version {version}, this softvq reads {VERSION}; compress the picture again")
    (checksum,) = CHECKSUM.unpack_from(data, LAYOUT.size)
    if checksum != zlib.crc32(payload, zlib.crc32(head)) or len(payload) % 4:
        raise InputError("is damaged or cut short, its checksum is another; fetch it again")
    if coder >= len(CODERS) or fit >= len(FITS):
        raise InputError(f"has coder {coder} and fit {fit}, this softvq knows {len(CODERS)} and {len(FITS)} of them")
    header = SvqHeader(
        coder=CODERS[coder], fit=FITS[fit], bits=bits, fingerprint=fingerprint, width=width, height=height,
        tokens=tokens, top=top,
    )  # fmt: skip
    return header, payload


def read_svq(path: Path | str) -> bytes:
    """Return the bytes of a file, unless there are more of them than any picture has.

    Args:
        path: A file that `softvq compress` wrote.

    Returns:
        What `unpack` takes.

    Raises:
        InputError: If there is no such file, or it is too large or cannot be read.
    """
    path = Path(path)
    if not path.is_file():  # also a pipe or a device, which could block for ever
        raise InputError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path}: is larger than {MAX_BYTES:,} bytes, which no compressed picture is")
    return data
