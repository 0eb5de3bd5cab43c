"""The latent file: the latents of many images, their names and sizes, and the tokenizer they belong to.

One safetensors file holds two tensors, `latents` `[image token dim]` in float16 or float32 (normalised) and `sizes`
`[image 2]` (height and width in pixels), and a header with the names and the tokenizer's fingerprint.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int
from torch import Tensor

from softvq.data.images import MAX_PIXELS
from softvq.errors import InputError
from softvq.files import read_tensors, write_tensors

__all__ = ["LatentFile", "latent_bytes", "picture_names", "read_latents", "write_latents"]

ENTRY = "softvq-latents"
"""The only entry of the header: several would be written in random order, and no two files be the same."""
FORMAT_VERSION = 1
DTYPES = (torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentFile:
    """The latents of some images and what is needed to decode them."""

    latents: Float[Tensor, "image token dim"]
    """Normalised latents, as `ImageTokenizer.encode` gives them; float16 or float32."""
    names: tuple[str, ...]
    """One name per image: a relative path with forward slashes, each only once."""
    sizes: Int[Tensor, "image 2"]
    """Height and width of each image as it was encoded, in pixels."""
    fingerprint: str
    """`ImageTokenizer.latent_fingerprint()` of the tokenizer that made the latents."""
    softvq_version: str
    """The version of this library that wrote the file."""


def write_latents(path: Path | str, content: LatentFile) -> None:
    """Write a latent file atomically.

    Args:
        path: Where to; the name ends in `.safetensors`.
        content: What to write; it is checked as strictly as when read.

    Raises:
        InputError: If `content` is no valid latent file, for example because a latent is NaN.
        RunError: If the file cannot be written; what was there before is untouched.
    """
    _check(path, content)
    write_tensors(path, *_parts(content))


def latent_bytes(content: LatentFile) -> bytes:
    """Return the bytes of a latent file, for sending it; an InputError says if `content` is no valid one."""
    _check("latents", content)
    return safetensors.torch.save(*_parts(content))


def read_latents(source: Path | str | bytes, fingerprint: str | None = None) -> LatentFile:
    """Read a latent file and check all of it.

    Args:
        source: A file written by `write_latents`, or the bytes of one.
        fingerprint: If given, the fingerprint of the tokenizer that is to decode the latents.

    Returns:
        Everything that is in it; all names are safe to be joined to a folder, all latents finite.

    Raises:
        InputError: If the file is missing, damaged, no latent file, not finite, or belongs to another tokenizer.
    """
    path = "latents" if isinstance(source, bytes) else source
    tensors, metadata = _unpacked(source) if isinstance(source, bytes) else read_tensors(source)
    header = _parse(metadata.get(ENTRY, ""))
    if header is None or set(tensors) != {"latents", "sizes"}:
        raise InputError(f"{path}: not a latent file of softvq; make one with softvq encode")
    if header["version"] != FORMAT_VERSION:
        raise InputError(
            f"{path}: is a latent file of format {header['version']}, this version of softvq reads {FORMAT_VERSION}; "
            "encode again"
        )
    if fingerprint is not None and header["tokenizer"] != fingerprint:
        raise InputError(
            f"{path}: these latents belong to tokenizer {_short(header['tokenizer'])}, not to {_short(fingerprint)}; "
            "decode them with the model that encoded them"
        )
    latents, sizes = tensors["latents"], tensors["sizes"]
    if latents.ndim != 3 or latents.dtype not in DTYPES:
        raise InputError(
            f"{path}: latents are {_layout(latents)}, expected [image, token, dim] in float16 or float32; encode again"
        )
    if tuple(sizes.shape) != (len(latents), 2) or sizes.dtype != torch.int64:
        raise InputError(f"{path}: sizes are {_layout(sizes)}, expected [{len(latents)}, 2] in int64; encode again")
    content = LatentFile(
        latents=latents,
        names=tuple(header["names"]),
        sizes=sizes,
        fingerprint=header["tokenizer"],
        softvq_version=header["softvq_version"],
    )
    _check(path, content)
    return content


def picture_names(names: tuple[str, ...]) -> list[str]:
    """Return one PNG name per image name, each only once.

    >>> picture_names(("cats/a.jpg", "b.webp"))
    ['cats/a.png', 'b.png']
    >>> picture_names(("a.jpg", "a.png"))
    ['a.jpg.png', 'a.png.png']
    """
    short = [str(PurePosixPath(name).with_suffix(".png")) for name in names]
    return short if len(set(short)) == len(short) else [f"{name}.png" for name in names]


def _parts(content: LatentFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a file."""
    header = {
        "version": FORMAT_VERSION,
        "tokenizer": content.fingerprint,
        "softvq_version": content.softvq_version,
        "names": content.names,
    }
    tensors = {"latents": content.latents.contiguous(), "sizes": content.sizes.to(torch.int64)}
    return tensors, {ENTRY: json.dumps(header)}


def _unpacked(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a file that is in memory."""
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"latents: not a whole safetensors file ({error}); send it again") from error
    return tensors, header.get("__metadata__") or {}


def _check(path: Path | str, content: LatentFile) -> None:
    count = len(content.latents)
    if count == 0:
        raise InputError(f"{path}: holds no latents; encode at least one image")
    if content.latents.dtype not in DTYPES:
        raise InputError(f"{path}: latents are {_layout(content.latents)}, expected float16 or float32")
    if len(content.names) != count or len(content.sizes) != count:
        raise InputError(
            f"{path}: {count} latents, {len(content.names)} names and {len(content.sizes)} sizes do not belong together"
        )
    repeated = [name for name, times in Counter(content.names).items() if times > 1]
    if repeated:
        raise InputError(f"{path}: the name {repeated[0]!r} stands twice; every image needs its own")
    for name in content.names:
        if not _is_safe(name):
            raise InputError(f"{path}: the name {name!r} leads out of the folder; expected a relative path")
    finite = content.latents.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        worst = content.names[int(finite.int().argmin())]
        raise InputError(f"{path}: the latents of {worst!r} are not all finite numbers; encode that image again")
    for name, (height, width) in zip(content.names, content.sizes.tolist(), strict=True):
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise InputError(f"{path}: the size of {name!r} is {height}x{width}, expected 1 to {MAX_PIXELS:,} pixels")


def _parse(text: str) -> dict[str, Any] | None:
    """Return the header's fields, or None if they are not what `write_latents` writes."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        return None
    types = {"version": int, "tokenizer": str, "softvq_version": str, "names": list}
    if not isinstance(header, dict) or any(type(header.get(name)) is not expected for name, expected in types.items()):
        return None
    return header if all(isinstance(name, str) for name in header["names"]) else None


def _is_safe(name: str) -> bool:
    """A name may be joined to an output folder without leaving it, on any system."""
    foreign = PureWindowsPath(name)
    stays = not any(part in ("", ".", "..") for part in name.split("/"))
    return stays and "\0" not in name and not foreign.anchor and ".." not in foreign.parts


def _layout(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def _short(fingerprint: str) -> str:
    return fingerprint[:12]
