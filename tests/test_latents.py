import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from softvq.data.latents import LatentFile, picture_names, read_latents, write_latents
from softvq.errors import InputError, RunError
from tests.program import contents, full_disk

HEADER = {"version": 1, "tokenizer": "f" * 64, "softvq_version": "0", "names": ["a.png", "b.png"]}
SIZES = torch.ones(2, 2, dtype=torch.int64)


def a_file(**changes: Any) -> LatentFile:
    fields: dict[str, Any] = {
        "latents": torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4),
        "names": ("a.png", "sub/b.png"),
        "sizes": torch.tensor([[32, 48], [64, 64]]),
        "fingerprint": "f" * 64,
        "softvq_version": "1.2.3",
    }
    return LatentFile(**{**fields, **changes})


def save(path: Path, latents: torch.Tensor, sizes: torch.Tensor, header: str) -> None:
    safetensors.torch.save_file({"latents": latents, "sizes": sizes}, path, {"softvq-latents": header})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_is_written_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    written = a_file(latents=torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype))
    write_latents(tmp_path / "x.safetensors", written)
    read = read_latents(tmp_path / "x.safetensors", "f" * 64)
    for field in dataclasses.fields(LatentFile):
        a, b = getattr(written, field.name), getattr(read, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    write_latents(tmp_path / "x.safetensors", a_file())
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"latents", "sizes"}
        header = json.loads(file.metadata()["softvq-latents"])
    assert (header["tokenizer"], header["names"]) == ("f" * 64, ["a.png", "sub/b.png"])


def test_the_same_latents_make_the_same_file(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_latents(tmp_path / name, a_file())
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("a", "a")}, "'a' stands twice"),
        ({"names": ("a",)}, "2 latents, 1 names and 2 sizes"),
        ({"names": ("a", "../b")}, r"'\.\./b' leads out"),
        ({"names": ("a", "/etc/passwd")}, "leads out"),
        ({"names": ("a", "b//c")}, "leads out"),
        ({"names": ("a", "")}, "leads out"),
        ({"names": ("a", "C:/b")}, "leads out"),
        ({"names": ("a", "..\\b")}, "leads out"),
        ({"names": ("a", "b\0c")}, "leads out"),
        ({"sizes": torch.tensor([[32, 48], [0, 64]])}, "'sub/b.png' is 0x64"),
        ({"sizes": torch.tensor([[32, 48], [10**6, 10**6]])}, "'sub/b.png' is 1000000x1000000"),
        ({"latents": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, r"\[2, 3, 4\] in bfloat16"),
        ({"latents": torch.zeros(0, 3, 4), "names": (), "sizes": torch.zeros(0, 2, dtype=torch.int64)}, "no latents"),
    ],
)
def test_nonsense_is_not_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_latents(tmp_path / "x.safetensors", a_file(**changes))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_no_numbers_are_refused_both_ways(tmp_path: Path, value: float) -> None:
    latents = torch.zeros(2, 3, 4)
    latents[1, 2, 3] = value
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match=r"latents of 'sub/b.png' are not all finite"):
        write_latents(path, a_file(latents=latents))
    save(path, latents, SIZES, json.dumps(HEADER))
    with pytest.raises(InputError, match=r"x.safetensors: the latents of 'b.png' are not all finite"):
        read_latents(path)


def test_latents_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    write_latents(tmp_path / "x.safetensors", a_file())
    with pytest.raises(InputError, match="belong to tokenizer ffffffffffff, not to 000000000000"):
        read_latents(tmp_path / "x.safetensors", "0" * 64)


@pytest.mark.parametrize(
    ("latents", "sizes", "message"),
    [
        (torch.zeros(2, 12), SIZES, r"latents are \[2, 12\] in float32"),
        (torch.zeros(2, 3, 4, dtype=torch.float64), SIZES, "in float64"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), r"sizes are \[2, 3\] in int64"),
        (torch.zeros(2, 3, 4), SIZES.float(), r"sizes are \[2, 2\] in float32"),
        (torch.zeros(1, 3, 4), SIZES[:1], "1 latents, 2 names and 1 sizes"),
    ],
)
def test_tensors_of_another_layout_are_refused(
    tmp_path: Path, latents: torch.Tensor, sizes: torch.Tensor, message: str
) -> None:
    save(tmp_path / "x.safetensors", latents, sizes, json.dumps(HEADER))
    with pytest.raises(InputError, match=message):
        read_latents(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "not a latent file"),
        ("{", "not a latent file"),
        ("[" * 100_000, "not a latent file"),
        ("[]", "not a latent file"),
        (json.dumps({**HEADER, "names": "ab"}), "not a latent file"),
        (json.dumps({**HEADER, "names": [1, 2]}), "not a latent file"),
        (json.dumps({**HEADER, "tokenizer": None}), "not a latent file"),
        (json.dumps({**HEADER, "version": True}), "not a latent file"),
        (json.dumps({**HEADER, "version": 2}), "of format 2, this version of softvq reads 1"),
    ],
)
def test_headers_that_are_none_of_ours_are_refused(tmp_path: Path, header: str, message: str) -> None:
    save(tmp_path / "x.safetensors", torch.zeros(2, 3, 4), SIZES, header)
    with pytest.raises(InputError, match=message):
        read_latents(tmp_path / "x.safetensors")


def test_other_tensors_are_no_latent_file(tmp_path: Path) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="not a latent file of softvq"):
        read_latents(tmp_path / "x.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_latents(path, a_file())
    before = contents(tmp_path)
    large = a_file(latents=torch.zeros(2, 300, 4))
    with full_disk(), pytest.raises(RunError, match=r"x.safetensors: cannot be written"):
        write_latents(path, large)
    assert contents(tmp_path) == before
    write_latents(path, large)


@given(st.lists(st.text("ab./", min_size=1, max_size=5), unique=True, min_size=1, max_size=6))
def test_picture_names_are_as_many_and_all_different(names: list[str]) -> None:
    usable = tuple(name for name in names if not any(part in ("", ".", "..") for part in name.split("/")))
    files = picture_names(usable)
    assert len(set(files)) == len(usable)
    assert all(name.endswith(".png") for name in files)
