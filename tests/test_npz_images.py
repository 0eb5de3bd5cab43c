"""Images in .npz files: read one after the other, and whatever is wrong with them told in one sentence."""

import io
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softvq.errors import InputError
from softvq.evaluation.image_sets import open_images
from tests.program import photograph

COUNT, HEIGHT, WIDTH = 7, 24, 16
PICTURES = np.stack([np.asarray(photograph(HEIGHT, WIDTH, seed=seed)) for seed in range(COUNT)])
DEFLATED, STORED = zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
CENTRAL = b"PK\x01\x02"


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


def zipped(*members: tuple[str, bytes], method: int = STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def npz(array: Any = PICTURES, method: int = STORED, name: str = "arr_0.npy") -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return zipped((name, file.getvalue()), method=method)


def patched(data: bytes, place: int, layout: str, *values: int) -> bytes:
    """Overwrite what the directory of an archive says of its first member."""
    start = data.index(CENTRAL) + place
    new = struct.pack(layout, *values)
    return data[:start] + new + data[start + len(new) :]


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_an_npz_is_never_read_whole(method: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "x.npz").write_bytes(npz(noise, method))
    each, lengths = noise[0].nbytes, []
    original = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        data = original(self, n)
        lengths.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    images = open_images(tmp_path / "x.npz")
    assert sum(lengths) <= 1 << 12
    lengths.clear()
    batches = images.batches(4)
    assert lengths == []
    next(batches)
    assert 4 * each <= sum(lengths) <= 4 * each + 1024  # and the header
    tracemalloc.start()
    for _ in batches:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == noise.nbytes + 128
    assert peak < noise.nbytes // 2


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("method", [STORED, DEFLATED])
def test_damage_is_found_when_it_is_reached(method: int, workers: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    whole = npz(noise, method)
    (tmp_path / "x.npz").write_bytes(flipped(whole, whole.index(CENTRAL) - 40))  # in the last image
    images = open_images(tmp_path / "x.npz")
    batches = images.batches(2, workers=workers)
    for place in range(0, 38, 2):
        assert torch.equal(next(batches).pixels.permute(0, 2, 3, 1), torch.from_numpy(noise[place : place + 2]))
    with pytest.raises(InputError, match=r"x\.npz: is damaged or cut short at image 39 of 40, counted from 0 \("):
        list(batches)
    assert len(list(images.batches(5, rank=0, ranks=4))) == 2
    with pytest.raises(InputError, match="image 39 of 40"):
        list(images.batches(5, rank=3, ranks=4, workers=workers))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


SPARE = ("arr_1.npy", bytes(9999))
LONG = header((COUNT + 1, HEIGHT, WIDTH, 3)) + PICTURES.tobytes()
SIZES = len(LONG) + PICTURES[0].nbytes
DAMAGED = "damaged or cut short at image 7 of 8"
BAD_NPZ: dict[str, tuple[Callable[[], bytes], str]] = {
    "no archive": (lambda: b"no archive at all", "is no whole .npz file"),
    "nothing": (lambda: b"", "is no whole .npz file"),
    "cut": (lambda: npz()[:-400], "is no whole .npz file"),
    "local header": (lambda: flipped(npz(), 1), "is no whole .npz file"),
    "empty": (lambda: zipped(), "holds no arr_0 but nothing"),
    "other name": (lambda: npz(name="images.npy"), "holds no arr_0 but images; expected arr_0 as uint8"),
    "statistics": (lambda: zipped(("mu.npy", b""), ("sigma.npy", b"")), "statistics (mu, sigma) but no images"),
    "float": (lambda: npz(PICTURES / np.float32(255)), "arr_0 is float32 [7, 24, 16, 3]; expected arr_0 as uint8"),
    "int64": (lambda: npz(PICTURES.astype(np.int64)), "arr_0 is int64 [7, 24, 16, 3]"),
    "one image": (lambda: npz(PICTURES[0]), "arr_0 is uint8 [24, 16, 3]"),
    "grey": (lambda: npz(PICTURES[..., :1]), "arr_0 is uint8 [7, 24, 16, 1]"),
    "alpha": (lambda: npz(PICTURES[..., [0, 1, 2, 2]]), "arr_0 is uint8 [7, 24, 16, 4]"),
    "channels first": (lambda: npz(PICTURES.transpose(0, 3, 1, 2).copy()), "arr_0 is uint8 [7, 3, 24, 16]"),
    "fortran": (lambda: npz(np.asfortranarray(PICTURES)), "numpy.ascontiguousarray"),
    "no images": (lambda: npz(PICTURES[:0]), "arr_0 is [0, 24, 16, 3], which is no image"),
    "no rows": (lambda: npz(PICTURES[:, :0]), "arr_0 is [7, 0, 16, 3], which is no image"),
    "objects": (lambda: npz(np.array([Trap("trap")], dtype=object)), "pickled objects, which are never opened"),
    "structured": (lambda: npz(np.zeros(3, dtype=[("a", "u1")])), "arr_0 is [('a', 'u1')] [3]"),
    "no array": (lambda: zipped(("arr_0.npy", b"\x93NUMPY\x01\0" + b"x" * 99)), "arr_0 is no array of numpy"),
    "no magic": (lambda: zipped(("arr_0.npy", PICTURES.tobytes())), "arr_0 is no array of numpy"),
    "deep header": (lambda: zipped(("arr_0.npy", b"\x93NUMPY\x01\0\x88\x13" + b"(" * 5000)), "is no array of numpy"),
    "long header": (
        lambda: zipped(("arr_0.npy", b"\x93NUMPY\x02\0" + struct.pack("<I", 1 << 31) + b" " * 99)),
        "is no array of numpy",
    ),
    "negative": (lambda: zipped(("arr_0.npy", header((-1, -1, 1, 3)) + bytes(3))), "which is no image"),
    "vast": (lambda: zipped(("arr_0.npy", header((10**9, 8, 8, 3)))), "promises 1000000000 images of 8x8"),
    "short": (lambda: zipped(("arr_0.npy", LONG), method=DEFLATED), "promises 8 images of 24x16"),
    "long": (lambda: zipped(("arr_0.npy", header((6, 24, 16, 3)) + PICTURES.tobytes())), "promises 6 images"),
    "huge images": (lambda: zipped(("arr_0.npy", header((1, 9000, 9000, 3)))), "limit is 64,000,000"),
    "bomb": (lambda: patched(npz(method=DEFLATED), 24, "<I", 10**9), "promises 1,000,000,000 bytes in"),
    "stored bomb": (lambda: patched(npz(), 24, "<I", SIZES), "which cannot be"),
    "past the end": (lambda: patched(npz(), 20, "<II", 10**6, 10**6), "which cannot be"),
    "encrypted": (lambda: patched(npz(), 8, "<H", 1), "is encrypted"),
    "bzip2": (lambda: npz(method=zipfile.ZIP_BZIP2), "is packed by method 12; write it with numpy.savez"),
    "into the next": (lambda: patched(zipped(("arr_0.npy", LONG), SPARE), 20, "<II", SIZES, SIZES), DAMAGED),
    "early end": (lambda: patched(zipped(("arr_0.npy", LONG), method=DEFLATED), 24, "<I", SIZES), DAMAGED),
}


@pytest.mark.parametrize("case", BAD_NPZ)
def test_a_bad_npz_is_refused_in_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = BAD_NPZ[case]
    Path("bad.npz").write_bytes(make())
    with pytest.raises(InputError) as error:
        list(open_images("bad.npz").batches(3))
    text = str(error.value)
    assert text.startswith("bad.npz: ")
    assert words in text
    assert "\n" not in text
    assert os.listdir() == ["bad.npz"]  # nothing was unpickled
