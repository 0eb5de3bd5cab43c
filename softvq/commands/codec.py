"""Photographs to small files and back: `softvq compress` and `softvq decompress`."""

import argparse
from pathlib import Path

from softvq import codec
from softvq.codec import CodecConfig
from softvq.commands.common import check_output, load_tokenizer, results
from softvq.data.images import SUFFIXES, read_image
from softvq.data.svq import read_svq
from softvq.errors import InputError
from softvq.files import replacing, write_bytes
from softvq.training.distributed import choose_device

__all__ = ["compress", "decompress"]

LONGEST = {".webp": 16_383, ".jpg": 65_500, ".jpeg": 65_500}
"""Side in pixels that a format can hold; PNG holds whatever a `.svq` file does."""


def compress(arguments: argparse.Namespace) -> None:
    """Write a photograph as a `.svq` file, and tell its size."""
    out = Path(arguments.out)
    if out.suffix != ".svq" or out.is_dir():
        raise InputError(f"{out}: is to be a compressed picture, give a name that ends in .svq")
    check_output(out, arguments.overwrite)
    config = CodecConfig(
        coder=arguments.coder, tokens=arguments.tokens, bits=arguments.bits, top=arguments.top, fit=arguments.fit
    )
    image = read_image(arguments.photo)
    tokenizer = load_tokenizer(arguments.model, choose_device(arguments.device))
    data = codec.compress(tokenizer, image, config)
    write_bytes(out, data)
    rate = 8 * len(data) / (image.width * image.height)
    results().print(
        f"{out}: {len(data):,} bytes, {rate:.4f} bits a pixel of {image.width} x {image.height}", soft_wrap=True
    )


def decompress(arguments: argparse.Namespace) -> None:
    """Write the picture of a `.svq` file."""
    out = Path(arguments.out)
    if not out.name.lower().endswith(SUFFIXES) or out.is_dir():
        raise InputError(f"{out}: is to be a picture, give a name that ends in {', '.join(SUFFIXES)}")
    check_output(out, arguments.overwrite)
    data = read_svq(arguments.file)
    tokenizer = load_tokenizer(arguments.model, choose_device(arguments.device))
    try:
        picture = codec.decompress(tokenizer, data)
    except InputError as error:
        raise InputError(f"{arguments.file}: {error}") from error
    longest = LONGEST.get(out.suffix.lower(), max(picture.size))
    if max(picture.size) > longest:
        raise InputError(
            f"{out}: cannot hold {picture.width} x {picture.height}, at most {longest:,} a side; take .png"
        )
    with replacing(out) as temporary:
        picture.save(temporary)
    results().print(f"{out}: {picture.width} x {picture.height}", soft_wrap=True)
