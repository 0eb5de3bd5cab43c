"""Every kind of bad input through the program: exit code, one sentence, and nothing touched."""

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from softvq.data.latents import read_latents
from tests.program import (
    DIM,
    PATCH,
    TOKENS,
    Program,
    contents,
    full_disk,
    make_model,
    make_photos,
    photograph,
    png,
    write_recipe,
)


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    make_photos(Path("photos"))
    Path("x.safetensors").write_bytes(b"what was there before")
    return Program(capsys)


def encode(photos: object, *flags: str) -> tuple[str, ...]:
    return ("encode", "model", str(photos), "x.safetensors", "--overwrite", *flags)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be enormous."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


WHOLE = png(photograph())
FLIPPED = WHOLE[: len(WHOLE) // 2] + bytes([WHOLE[len(WHOLE) // 2] ^ 255]) + WHOLE[len(WHOLE) // 2 + 1 :]
BAD_PHOTOS = {
    "truncated.png": (WHOLE[: len(WHOLE) // 2], "is damaged or cut short"),
    "corrupt.png": (FLIPPED, "is damaged or cut short"),
    "zero.jpg": (b"", "is empty (0 bytes)"),
    "bomb.png": (bomb(12_000, 12_000), "12000 x 12000 pixels"),
    "larger-bomb.png": (bomb(2**30, 2**30), "pixels"),
    "text.jpg": (b"just some words", "is not a JPEG, PNG or WebP image"),
    "vector.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a JPEG, PNG or WebP image"),
}


def odd_photo(mode: str) -> bytes:
    buffer = io.BytesIO()
    image = photograph()
    if mode == "animated":
        image.save(buffer, "WEBP", save_all=True, append_images=[photograph(seed=5)], lossless=True)
    elif mode == "cmyk":
        image.convert("CMYK").save(buffer, "JPEG")
    elif mode == "16-bit":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(buffer, "PNG")
    else:
        image.convert({"grey": "L", "palette": "P", "transparent": "RGBA", "bilevel": "1"}[mode]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", BAD_PHOTOS)
def test_a_photograph_that_cannot_be_read(program: Program, name: str) -> None:
    data, message = BAD_PHOTOS[name]
    Path(name).write_bytes(data)
    before = contents(Path())
    program.refuses(*encode(name), names=(name, message))
    program.refuses("reconstruct", "model", name, "out", names=(name, message))
    program.refuses("fit-stats", "model", name, names=(name, message))
    assert contents(Path()) == before


@pytest.mark.parametrize("mode", ["animated", "cmyk", "16-bit", "grey", "palette", "transparent", "bilevel"])
def test_an_odd_photograph_is_read_like_any_other(program: Program, mode: str) -> None:
    suffix = {"animated": "webp", "cmyk": "jpg"}.get(mode, "png")
    Path(f"odd.{suffix}").write_bytes(odd_photo(mode))
    result = program(*encode(f"odd.{suffix}"))
    assert (result.code, result.err) == (0, "")
    assert read_latents("x.safetensors").latents.shape == (1, TOKENS, DIM)


def test_more_bad_photographs_than_good_ones_in_a_folder(program: Program) -> None:
    for name, (data, _) in BAD_PHOTOS.items():
        Path("photos", name).write_bytes(data)
    before = contents(Path())
    program.refuses(*encode("photos"), code=3, names=("photos", "7 of 10 photographs could not be used", "bomb.png"))
    program.refuses("fit-stats", "model", "photos", code=3, names=("7 of 10",))
    assert contents(Path()) == before
    assert "skipped: photos/zero.jpg: is empty" in program(*encode("photos")).err


@pytest.mark.parametrize("path", ["empty", "nowhere", "no/where.png"])
def test_no_photographs(program: Program, path: str) -> None:
    Path("empty").mkdir()
    before = contents(Path())
    for command in (encode(path), ("reconstruct", "model", path, "out"), ("fit-stats", "model", path)):
        program.refuses(*command, names=(path, "give"))
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("size", "names"),
    [
        ("33", ("--size", "'33'", "patch size 8", "32x32")),
        ("3", ("--size", "'3'", "8x8")),
        ("32x45", ("--size", "'32x45'", "32x48")),
        ("big", ("--size", "'big'", "256x384")),
        ("-8", ("--size",)),
        ("0x8", ("--size", "'0x8'", "8x8")),
    ],
)
def test_a_size_that_is_not_divisible(program: Program, size: str, names: tuple[str, ...]) -> None:
    before = contents(Path())
    program.refuses(*encode("photos", "--size", size), names=names)
    assert contents(Path()) == before


def test_a_photograph_whose_own_size_is_not_divisible(program: Program) -> None:
    photograph(50, 41).save("odd.png")
    names = ("odd.png", "50x41", f"patch size {PATCH}", "--size 48x40")
    program.refuses(*encode("odd.png", "--size", "native"), names=names)


@pytest.mark.parametrize("command", ["encode", "decode", "reconstruct", "inspect", "fit-stats"])
@pytest.mark.parametrize("model", ["nowhere", "photos/a.png", "photos", "../../etc"])
def test_no_such_model(program: Program, command: str, model: str) -> None:
    rest = {"inspect": (), "fit-stats": ("photos",), "decode": ("x.safetensors", "out")}.get(command, ("photos", "out"))
    rest = (rest[0], "new.safetensors") if command == "encode" else rest
    before = contents(Path())
    program.refuses(command, model, *rest, names=(model.rpartition("/")[2],))
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:99", "torch sees"),
        ("abacus", "expected auto, cpu"),
        ("meta", "expected auto, cpu"),
        ("", "expected auto"),
    ],
)
def test_no_such_device(program: Program, device: str, message: str) -> None:
    program.refuses(*encode("photos", "--device", device), names=(repr(device), message))


@pytest.mark.parametrize(
    ("out", "names"),
    [
        ("x.bin", ("x.bin", ".safetensors")),
        ("folder.safetensors", ("folder.safetensors", "is a folder")),
        ("model/config.json/x.safetensors", ("x.safetensors", "config.json is a file")),
    ],
)
def test_an_output_that_cannot_be(program: Program, out: str, names: tuple[str, ...]) -> None:
    Path("folder.safetensors").mkdir()
    before = contents(Path())
    program.refuses("encode", "model", "photos", out, "--overwrite", names=names)
    assert contents(Path()) == before


@pytest.mark.parametrize("out", ["pair.png", "model/config.json", "model/config.json/out"])
def test_an_output_folder_that_cannot_be(program: Program, out: str) -> None:
    before = contents(Path())
    program.refuses("reconstruct", "model", "photos", out, "--overwrite", names=(out, "give"))
    assert contents(Path()) == before


def edited_latents(path: str, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata)


def test_latents_of_another_model(program: Program) -> None:
    other = make_model(Path("other"), seed=1)
    assert program(*encode("photos")).code == 0
    found = read_latents("x.safetensors").fingerprint
    names = ("x.safetensors", found[:12], other.latent_fingerprint()[:12], "model that encoded them")
    program.refuses("decode", "other", "x.safetensors", "out", names=names)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("edit", "names"),
    [
        (lambda t: t.update(latents=t["latents"][:, :3].contiguous()), (f"[3, {DIM}]", f"[{TOKENS}, {DIM}]")),
        (lambda t: t.update(latents=t["latents"][0]), (f"[{TOKENS}, {DIM}]", "[image, token, dim]")),
        (lambda t: t["latents"][1].fill_(torch.nan), ("'b.jpg'", "not all finite")),
        (lambda t: t["sizes"][1].fill_(33), ("'b.jpg'", "33x33", f"multiples of {PATCH}")),
        (lambda t: t["sizes"][1].fill_(2**40), ("'b.jpg'", "pixels")),
        (lambda t: t.pop("sizes"), ("not a latent file",)),
    ],
)
def test_damaged_latents(program: Program, edit: Callable[[dict[str, torch.Tensor]], None], names: tuple[str]) -> None:
    assert program(*encode("photos")).code == 0
    edited_latents("x.safetensors", edit)
    program.refuses("decode", "model", "x.safetensors", "out", names=("x.safetensors", *names))
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.safetensors", b"", "not a whole safetensors file"),
        ("x.safetensors", b"\xff" * 64, "not a whole safetensors file"),
        ("x.safetensors", pickle.dumps({"latents": [1.0]}), "pickle"),
        ("x.pt", b"PK\3\4", "pickle"),
        ("model/model.safetensors", None, "not a latent file"),
        ("nowhere.safetensors", None, "no such file"),
    ],
)
def test_no_latent_file(program: Program, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        Path(name).write_bytes(data)
    program.refuses("decode", "model", name, "out", names=(name, message))


def test_a_truncated_latent_file(program: Program) -> None:
    assert program(*encode("photos")).code == 0
    data = Path("x.safetensors").read_bytes()
    Path("x.safetensors").write_bytes(data[:-8])
    program.refuses("decode", "model", "x.safetensors", "out", names=("x.safetensors", "not a whole safetensors file"))


def edited_weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        from safetensors import safe_open

        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata)

    return apply


def weights(data: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(data(path.read_bytes()))

    return apply


def edited_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (weights(lambda data: data[:-100]), ("model.safetensors", "not a whole safetensors file")),
        (weights(lambda data: b""), ("model.safetensors", "not a whole safetensors file")),
        (weights(lambda data: pickle.dumps({"a": 1})), ("model.safetensors", "pickle")),
        (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors",)),
        (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
        (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "not plain JSON")),
        (edited_weights(lambda t: t.pop("to_latents.bias")), ("1 tensors missing", "to_latents.bias")),
        (edited_weights(lambda t: t.update(extra=torch.zeros(1))), ("1 tensors unexpected", "extra")),
        (
            edited_weights(lambda t: t.update({"to_latents.bias": torch.zeros(9)})),
            ("mis-shaped", "to_latents.bias is [9], expected [8]"),
        ),
        (edited_weights(lambda t: t["to_latents.bias"].fill_(torch.nan)), ("not finite", "to_latents.bias")),
        (edited_config(colour="red"), ("config.json",)),
        (edited_config(latent_dim="wide"), ("config.json",)),
    ],
)
def test_a_damaged_model(program: Program, damage: Callable[[Path], object], names: tuple[str, ...]) -> None:
    damage(Path("model"))
    before = contents(Path())
    for command in (encode("photos"), ("inspect", "model"), ("fit-stats", "model", "photos")):
        program.refuses(*command, names=("model", *names))
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (encode("photos"), "x.safetensors"),
        (("decode", "model", "given.safetensors", "out"), ".png"),
        (("reconstruct", "model", "photos", "out", "--overwrite"), ".png"),
        (("fit-stats", "model", "photos"), "model.safetensors"),
        (("train", "tokenizer", "--config", "recipe.yaml", "--run", "run"), "run"),
    ],
)
def test_a_full_disk(program: Program, command: tuple[str, ...], name: str) -> None:
    write_recipe(Path("recipe.yaml"), data__path="photos")
    assert program("encode", "model", "photos", "given.safetensors").code == 0
    before = contents(Path())
    with full_disk():
        result = program(*command)
    *_, sentence = result.err.splitlines()
    assert result.code == 3
    assert sentence.startswith("softvq: ")
    assert name in sentence
    assert "cannot be written" in sentence
    assert "Traceback" not in result.err
    after = contents(Path())
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if ".tmp" in path or (path.endswith(".png") and path not in before)]
    assert program(*command, "--resume" if command[0] == "train" else "--debug").code == 0
