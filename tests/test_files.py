"""Files are whole or absent, readable by others, and never pickles."""

import contextlib
import hashlib
import json
import os
import pickle
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from softvq.errors import InputError, RunError
from softvq.files import read_tensors, replacing, sha256, write_bytes, write_json, write_tensors, write_text

TENSORS = {
    "weight": torch.arange(600, dtype=torch.float32).reshape(20, 30),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(7),
    "none": torch.zeros(0, 4),
}


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes, which fails as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_tensors(path, TENSORS, {"kind": "test"})
    return path


def test_writes_replace_and_leave_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text(path, "first")
    write_text(path, "grüße")
    assert path.read_bytes() == "grüße".encode()
    write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert path.read_text().endswith("\n")
    assert os.listdir(path.parent) == ["file.txt"]


def write_half(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise error("in the body")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, InputError])
def test_a_body_that_fails_changes_nothing(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    for before in ([], ["file.txt"]):
        with pytest.raises(error):
            write_half(path, error)
        assert os.listdir(tmp_path) == before
        path.write_text("whole")
    assert path.read_text() == "whole"


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.parent == path.parent  # a rename across file systems is not atomic
        assert temporary.suffix == path.suffix
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_nan_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "file.json", float("nan"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", [None, b"what was there"])
@pytest.mark.parametrize("room", [0, 100, 2000])
def test_full_disk(room: int, before: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if before is not None:
        path.write_bytes(before)
    with full_disk(room):
        with pytest.raises(RunError, match=rf"{path}: cannot be written \(.*File too large.*untouched"):
            write_tensors(path, TENSORS)
        with pytest.raises(RunError, match=rf"{path}: cannot be written \(File too large\).*untouched"):
            write_bytes(path, bytes(3000))
    assert os.listdir(tmp_path) == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(RunError, match="file/inner: cannot be written"):
        write_text(tmp_path / "file" / "inner", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match=r"folder: cannot be written \(Is a directory\)"):
        write_text(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    with umask(mask):
        write_text(tmp_path / "text", "x")
        write_tensors(tmp_path / "tensors", TENSORS)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_tensors_round_trip(saved: Path) -> None:
    tensors, metadata = read_tensors(saved)
    assert metadata == {"kind": "test"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_any_layout_can_be_written(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4)
    tensors = {"transposed": shared.T, "strided": shared[:, ::2], "grad": shared.clone().requires_grad_()}
    write_tensors(tmp_path / "x.safetensors", tensors)
    read, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {}
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor.detach())
        assert not read[name].requires_grad


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    write_tensors(tmp_path / "x.safetensors", {"a": tied, "b": tied, "view": tied[1:3]})
    read, _ = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(read["a"], tied)
    assert torch.equal(read["b"], tied)
    assert torch.equal(read["view"], tied[1:3])


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".PT"])
def test_pickle_names_are_never_opened(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    with pytest.raises(InputError, match=rf"model{suffix}: is a pickle.*give a .safetensors file"):
        read_tensors(path)


class Bomb:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.witness,)


def test_pickles_under_another_name_are_never_run(tmp_path: Path) -> None:
    path, witness = tmp_path / "model.safetensors", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Bomb(witness)))
    with pytest.raises(InputError, match=r"model.safetensors: is a pickle under another name"):
        read_tensors(path)
    torch.save({"a": Bomb(witness)}, path)
    with pytest.raises(InputError, match=r"model.safetensors: is a pickle under another name"):
        read_tensors(path)
    assert not witness.exists()


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"model.safetensors: no such file"):
        read_tensors(path)
    with pytest.raises(InputError, match="is a folder, expected a file"):
        read_tensors(tmp_path)
    for data in (b"", b"\x00", b"hello", bytes(1000), b"\xff" * 1000):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"model.safetensors: not a whole safetensors file"):
            read_tensors(path)


def test_truncation_at_every_point_is_noticed(saved: Path) -> None:
    whole = saved.read_bytes()
    cuts = {*range(0, 16), *range(16, len(whole), 37), *range(len(whole) - 16, len(whole))}
    for cut in cuts:
        saved.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"not a whole safetensors file .*fetch or save it again"):
            read_tensors(saved)
    saved.write_bytes(whole + b"\x00")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_tensors(saved)


@given(position=st.integers(0, 400), byte=st.integers(0, 255))
@example(position=0, byte=0x80)
@example(position=0, byte=ord("P"))
def test_a_damaged_header_is_an_input_error_or_other_tensors(
    position: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    write_tensors(path, TENSORS)
    data = bytearray(path.read_bytes())
    data[position] = byte
    path.write_bytes(data)
    with contextlib.suppress(InputError):  # anything else is a traceback for the user
        read_tensors(path)


def test_a_file_that_may_not_be_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(safetensors, "safe_open", refuse)  # root may read everything, so chmod proves nothing
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read \(Permission denied\)"):
        read_tensors(saved)


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()
