"""Hostile files, each made on the spot, and a way to change whole ones at random."""

import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from tests.image_zoo import chunk, png_header

CODE = "import pathlib; pathlib.Path({marker!r}).write_text('ran')"


class _Call:
    """Unpickles to what calling a function gives."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def pickles(marker: Path) -> dict[str, bytes]:
    """Return pickles that leave a file behind if anyone opens them."""
    code, shell = CODE.format(marker=str(marker)), f"touch {marker}"
    calls = {
        "system": _Call(os.system, shell),
        "popen": _Call(os.popen, shell),
        "eval": _Call(eval, f"exec({code!r})"),
        "exec": _Call(exec, code),
        "open": _Call(open, str(marker), "w"),
        "getattr": _Call(getattr(os, "system"), shell),  # noqa: B009 - as it is written in such files
        "nested": {"state_dict": [_Call(exec, code)]},
        "in a list": [1, 2, _Call(os.system, shell)],
    }
    found = {f"{name}, protocol {p}": pickle.dumps(call, p) for name, call in calls.items() for p in (0, 2, 4)}
    found["by hand"] = b"cos\nsystem\n(S'" + shell.encode() + b"'\ntR."
    found["behind a number"] = pickle.dumps(1) + pickle.dumps(calls["system"])
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(calls["exec"], 2))
        file.writestr("archive/version", "3\n")
    found["as torch.save"] = archive.getvalue()
    return found


def safetensors_of(header: bytes | dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def hostile_safetensors() -> dict[str, bytes]:
    """Return files that no writer of safetensors makes."""
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "a header of a terabyte": safetensors_of(b"{}", length=1 << 40),
        "a header of 2^64 - 1 bytes": safetensors_of(b"{}", length=(1 << 64) - 1),
        "a header of 99 MB that is not there": safetensors_of(b"{}", length=99_000_000),
        "a header of 20 MB of brackets": safetensors_of(b"[" * 20_000_000),
        "a header of 20 MB of spaces": safetensors_of(b"{" + b" " * 20_000_000 + b"}", bytes(8)) + b"x",
        "deep nesting": safetensors_of(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "no header": b"\x01\x00",
        "overlapping": safetensors_of({"a": one, "b": one}, bytes(8)),
        "a hole": safetensors_of({"a": {**one, "data_offsets": [8, 16]}}, bytes(16)),
        "negative offsets": safetensors_of({"a": {**one, "data_offsets": [-8, 0]}}, bytes(8)),
        "offsets backwards": safetensors_of({"a": {**one, "data_offsets": [8, 0]}}, bytes(8)),
        "beyond the end": safetensors_of({"a": {**one, "data_offsets": [0, 1 << 40]}}, bytes(8)),
        "a shape of 2^63": safetensors_of({"a": {**one, "shape": [1 << 63]}}, bytes(8)),
        "a shape that overflows to 8 bytes": safetensors_of({"a": {**one, "shape": [1 << 33, 1 << 31, 2]}}, bytes(8)),
        "a negative shape": safetensors_of({"a": {**one, "shape": [-2, -1]}}, bytes(8)),
        "an unknown dtype": safetensors_of({"a": {**one, "dtype": "F3"}}, bytes(8)),
        "not UTF-8": safetensors_of(b'{"\xff\xfe": {}}'),
        "NaN": safetensors_of(b'{"a": NaN}'),
        "extra bytes": safetensors_of({"a": one}, bytes(80)),
        "too few bytes": safetensors_of({"a": one}, bytes(7)),
        "text": b"just some words, long enough for a header",
    }


def hostile_configs(marker: Path) -> dict[str, str]:
    """Return YAML that would run code, take for ever, or fill the memory elsewhere."""
    laughs = "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(f'*{chr(97 + i)}' for _ in range(9))}]\n" for i in range(9)
    )
    return {
        "a tag": f"model: !!python/object/apply:os.system ['touch {marker}']",
        "a tag for a module": "model: !!python/module:antigravity",
        "_target_": "model: {_target_: os.system, command: 'touch x'}",
        "class_path": "model: {class_path: antigravity.fly, init_args: {}}",
        "a billion laughs": f"a: &a [lol]\n{laughs}",
        "merged for ever": "a: &a {<<: *a}",
        "a million levels": "[" * 1_000_000,
        "a million items": f"model: [{'1,' * 500_000}1]",
        "a hundred thousand keys": "".join(f"k{number}: 1\n" for number in range(90_000)),
        "a hundred megabytes": "a: " + "x" * 100_000_000,
        "a number of a million digits": f"seed: {'9' * 1_000_000}",
        "a key twice": "seed: 1\nseed: 2",
        "an unknown key": "sede: 1",
        "NaN": "train: {ema_decay: .nan}",
        "2^40 tokens": "model: {preset: softvq-s-64, num_latent_tokens: 1099511627776}",
        "10^9 layers": "model: {preset: softvq-s-64, encoder: {depth: 1000000000}}",
        "a codebook of 2^50": "model: {preset: softvq-s-64, quantizer: {codebook_size: 1125899906842624}}",
        "an image of 2^30": "model: {preset: softvq-s-64, image_size: 1073741824}",
        "a batch of 2^60": "model: {preset: softvq-s-64}\ntrain: {batch_size: 1152921504606846976}",
    }


def image_bombs() -> dict[str, bytes]:
    """Return small image files that claim or unfold to a lot."""
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    whole = small.getvalue()

    def with_chunk(kind: bytes, data: bytes) -> bytes:
        return whole[:33] + chunk(kind, data) + whole[33:]

    def encoded(kind: str, size: tuple[int, int], **options: Any) -> bytes:
        file = io.BytesIO()
        Image.new("L", size).save(file, kind, **options)
        return file.getvalue()

    zeros = zlib.compress(bytes(50_000_000), 1)
    found = {f"a PNG header of {side}": png_header(side, side) for side in (8_001, 12_000, 20_000, 60_000, 1 << 30)}
    found |= {
        "a PNG of 9,000 x 9,000": encoded("PNG", (9_000, 9_000)),
        "a JPEG header of 65,500 x 65,500": _jpeg_header(65_500),
        "a WebP header of 16,383 x 16,383": _webp_header(16_383),
        "zTXt": with_chunk(b"zTXt", b"note\0\0" + zeros),
        "iTXt": with_chunk(b"iTXt", b"note\0\1\0\0\0" + zeros),
        "iCCP": with_chunk(b"iCCP", b"icc\0\0" + zeros),
        "a chunk of 2 GB that is not there": whole[:33] + struct.pack(">I", 0x7FFFFFFF) + b"tEXt" + whole[33:],
        "a thousand comments": whole[:33] + chunk(b"tEXt", b"a\0" + bytes(1000)) * 1000 + b"x" + whole[33:],
    }
    return found


def _jpeg_header(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def _webp_header(side: int) -> bytes:
    bits = (side - 1) | (side - 1) << 14
    body = b"\x2f" + struct.pack("<I", bits) + bytes(16)
    inner = b"VP8L" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(inner)) + b"WEBP" + inner


def disallowed_images() -> dict[str, bytes]:
    """Return pictures of formats that are not decoded, whatever they are called."""
    found = {}
    for kind in ("BMP", "GIF", "TIFF", "PPM", "ICO", "TGA", "SGI", "PCX", "EPS", "PDF", "JPEG2000"):
        file = io.BytesIO()
        try:
            Image.new("RGB", (16, 16)).save(file, kind)
        except (KeyError, OSError):  # not in every build
            continue
        found[kind] = file.getvalue()
    found["PSD"] = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(64)
    found["FITS"] = b"SIMPLE  =                    T".ljust(2880)
    found["SVG"] = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    return found


def whole_images() -> dict[str, bytes]:
    """Return a good file of each format, with notes and transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 4), dtype=np.uint8)
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "words", zip=True)
    found = {}
    for kind, mode, options in (
        ("JPEG", "RGB", {"progressive": True}),
        ("PNG", "RGBA", {"pnginfo": note}),
        ("WEBP", "RGBA", {}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind, **options)
        found[kind] = file.getvalue()
    return found


def hostile_tars(folder: Path) -> dict[str, Path]:
    """Write archives that lead out of a folder if they are unpacked, or hold more than they should."""
    found = {}
    for name, make in {
        "parent": lambda tar: _member(tar, "../escaped.jpg", b"x"),
        "absolute": lambda tar: _member(tar, str(folder / "escaped.jpg"), b"x"),
        "symlink": lambda tar: _link(tar, "a.jpg", "/etc/passwd", tarfile.SYMTYPE),
        "hardlink": lambda tar: _link(tar, "a.jpg", "../../etc/passwd", tarfile.LNKTYPE),
        "device": lambda tar: _link(tar, "a.jpg", "", tarfile.CHRTYPE),
        "pipe": lambda tar: _link(tar, "a.jpg", "", tarfile.FIFOTYPE),
        "long name": lambda tar: _member(tar, "a" * 65_000 + ".jpg", b"x"),
        "twice": lambda tar: [_member(tar, "a.jpg", b"x") for _ in range(2)],
    }.items():
        path = folder / f"{name.replace(' ', '-')}.tar"
        with tarfile.open(path, "w") as tar:
            make(tar)
        found[name] = path
    return found


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _link(tar: tarfile.TarFile, name: str, target: str, kind: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def mutations(whole: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield changed copies: bytes replaced, cut, doubled, taken out, or numbers made huge."""
    draws = random.Random(seed)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draws.choice((1, 1, 2, 8))):
            place = draws.randrange(max(1, len(data)))
            end = min(len(data), place + draws.choice((1, 2, 4, 16)))
            how = draws.randrange(5)
            if how == 0:
                data[place:end] = draws.randbytes(end - place)
            elif how == 1:
                data[place:end] = b"\xff" * (end - place)
            elif how == 2:
                data[place:place] = data[place:end]
            elif how == 3:
                del data[place:end]
            else:
                del data[place:]
        yield bytes(data)


def modules_now() -> set[str]:
    """Return the names of all imported modules."""
    return set(sys.modules)
