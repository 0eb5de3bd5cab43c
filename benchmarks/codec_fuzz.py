"""Damage compressed pictures in every way there is, and see that each is refused in one sentence, or is a picture.

    python benchmarks/codec_fuzz.py --count 10000
    python benchmarks/codec_fuzz.py --count 1000 --model MODEL

Without --model a small tokenizer with random weights is taken. A third of the files carry the checksum that belongs to
their damage, as a stranger's would who means harm, so that what comes after the checksum is tried as well.
"""

import argparse
import random
import resource
import time
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from softvq.codec import CodecConfig, compress, decompress
from softvq.data.svq import CHECKSUM, LAYOUT
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.quantizers import SoftVQConfig
from softvq.tokenizers.vit import ViTConfig

VIT = ViTConfig(width=16, depth=1, num_heads=2)
SMALL = TokenizerConfig(
    encoder=VIT,
    decoder=VIT,
    num_latent_tokens=16,
    min_latent_tokens=4,
    latent_dim=8,
    quantizer=SoftVQConfig(codebook_size=64, num_codebooks=2),
    image_size=32,
    patch_size=8,
)
CONFIGS = (
    CodecConfig(),
    CodecConfig(bits=1, fit="crop"),
    CodecConfig(bits=12, fit="shape"),
    CodecConfig(coder="codewords"),
    CodecConfig(coder="codewords", top=4, bits=3),
)


def small_tokenizer() -> ImageTokenizer:
    """Return a tokenizer that costs next to nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTokenizer(SMALL).eval()


def whole_files(tokenizer: ImageTokenizer) -> list[bytes]:
    """Return a file of each coder and fit."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return [compress(tokenizer, Image.fromarray(pixels), config) for config in CONFIGS]


def resealed(data: bytes) -> bytes:
    """Return a file with the checksum that its bytes have."""
    head, payload = data[: LAYOUT.size], data[LAYOUT.size + CHECKSUM.size :]
    return head + CHECKSUM.pack(zlib.crc32(payload, zlib.crc32(head))) + payload


def damaged(files: list[bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Give so many damaged files, each with the kind of its damage."""
    draw = random.Random(seed)
    kinds = {
        "bits flipped": _flipped,
        "cut short": lambda data, draw: data[: draw.randrange(len(data))],
        "bytes added": lambda data, draw: data + draw.randbytes(draw.randint(1, 64)),
        "two spliced": lambda data, draw: data[: draw.randrange(len(data))] + draw.choice(files)[draw.randrange(28) :],
        "random bytes": lambda data, draw: draw.randbytes(draw.randrange(400)),
        "random after the magic": lambda data, draw: data[:4] + draw.randbytes(draw.randrange(400)),
        "header fields, checksum mended": lambda data, draw: resealed(_field(data, draw)),
        "bits flipped, checksum mended": lambda data, draw: resealed(_flipped(data, draw)),
        "random payload, checksum mended": lambda data, draw: resealed(data[:28] + draw.randbytes(200)),
    }  # fmt: skip
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        yield kind, kinds[kind](draw.choice(files), draw)


def outcome(tokenizer: ImageTokenizer, data: bytes, files: list[bytes]) -> str:
    """Return `refused`, `picture`, or what went wrong."""
    try:
        picture = decompress(tokenizer, data)
    except InputError as error:
        return "refused" if str(error) and "\n" not in str(error) else f"no sentence: {error!r}"
    except Exception as error:  # which is what is looked for
        return f"crash: {type(error).__name__}: {error}"
    if data != resealed(data) and data not in files:
        return "crash: a damaged file was taken"
    return "picture" if picture.mode == "RGB" else f"crash: {picture.mode}"


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _field(data: bytes, draw: random.Random) -> bytes:
    fields = list(LAYOUT.unpack_from(data))
    place = draw.choice((1, 2, 3, 4, 6, 7, 8, 9))
    fields[place] = draw.randrange(256 if place < 5 else 65536)
    if place in (6, 7) and draw.random() < 0.5:
        fields[place] = draw.choice((0, 1, 65535))
    return LAYOUT.pack(*fields) + data[LAYOUT.size :]


def main() -> None:
    """Print what became of the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a tokenizer's folder")
    arguments = parser.parse_args()
    tokenizer = ImageTokenizer.from_pretrained(arguments.model) if arguments.model else small_tokenizer()
    files = whole_files(tokenizer)
    for data in files:
        decompress(tokenizer, data)
    found: Counter[tuple[str, str]] = Counter()
    before, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0
    for kind, data in damaged(files, arguments.count, arguments.seed):
        started = time.perf_counter()
        found[kind, outcome(tokenizer, data, files)] += 1
        slowest = max(slowest, time.perf_counter() - started)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    console = Console(width=120, highlight=False)
    for (kind, what), times in sorted(found.items()):
        console.print(f"{times:6}  {kind}: {what}", markup=False)
    wrong = sum(times for (_, what), times in found.items() if what not in {"refused", "picture"})
    console.print(
        f"{arguments.count} damaged files: {wrong} crashes, the slowest took {slowest:.2f} s, "
        f"memory grew by at most {grown:.0f} MiB"
    )
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
