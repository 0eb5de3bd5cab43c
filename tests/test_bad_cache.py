"""A cache that is damaged, or of something else, is refused in one sentence, and nothing of it is touched."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softvq.data.folder import PhotoFolder
from softvq.data.latent_cache import cache_info, read_cache
from softvq.errors import InputError, RunError
from softvq.locks import folder_lock
from tests.caches import NAMES, PLAN, encode, failing_after, make, one_sentence, open_folder
from tests.program import contents, make_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoFolder:
    root = tmp_path_factory.mktemp("data") / "photos"
    make_photos(root, NAMES)
    return open_folder(root)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (
            {"fingerprint": "e" * 64},
            ("belong to tokenizer ffffffffffff (model), not to eeeeeeeeeeee", "give that model"),
        ),
        ({"flip": False}, ("flip True, not False",)),
        ({"dtype": "float32"}, ("dtype float16, not float32",)),
        ({"precision": "bf16"}, ("precision float32, not bf16",)),
        ({"shard_size": 7}, ("shard_size 6, not 7", "give the same or another folder")),
        ({"tokens": 5}, ("tokens 4, not 5",)),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_another_plan_is_refused(
    tmp_path: Path, photos: PhotoFolder, changes: dict[str, Any], names: tuple[str, ...], complete: bool
) -> None:
    if complete:
        make(tmp_path / "out", photos)
    else:
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out", photos, encode=failing_after(3))
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        make(tmp_path / "out", photos, dataclasses.replace(PLAN, **changes))
    one_sentence(error, tmp_path / "out", *names)
    assert contents(tmp_path) == before


def test_other_photographs_or_sizes_are_refused(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path / "out", photos)
    make_photos(tmp_path / "photos", NAMES[:-1])
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        make(tmp_path / "out", open_folder(tmp_path / "photos"))
    one_sentence(error, tmp_path / "out", "other photographs (22 files then, 21 now)")
    with pytest.raises(InputError) as error:
        make(tmp_path / "out", open_folder(photos.root, side=8))
    one_sentence(error, "image_size 16, not 8")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("name", ["notes.txt", "latents-00009.safetensors", ".hidden", "photos/a.png", ".tmp"])
def test_what_is_not_ours_is_left_alone(tmp_path: Path, photos: PhotoFolder, begun: bool, name: str) -> None:
    if begun:
        make(tmp_path, photos)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(InputError) as error:
        make(tmp_path, photos)
    one_sentence(error, tmp_path, name.split("/")[0], "no part of this latent cache", "another folder")
    assert contents(tmp_path) == before


def test_a_file_in_the_way_and_shards_without_a_header(tmp_path: Path, photos: PhotoFolder) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match="is a file, expected the folder of a latent cache"):
        make(tmp_path / "file", photos)
    (tmp_path / "out").mkdir()
    for name in ("latents-00000.safetensors", ".tmpAb12Cd"):
        path = tmp_path / "out" / name
        path.write_bytes(b"mine")
        with pytest.raises(InputError, match="no part of this latent cache"):
            make(tmp_path / "out", photos)
        path.unlink()
    (tmp_path / "out/.cache.json.0123abcd.tmp.json").write_bytes(b"{")  # killed while it was begun
    assert make(tmp_path / "out", photos)[1] == 22


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def edited(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata)

    return apply


def without_names(path: Path) -> None:
    save_file(load_file(path), path)


DAMAGE = [
    (edited(lambda t: t["latents"][2].fill_(torch.nan)), ("'ab/06.png'", "not all finite")),
    (edited(lambda t: t.update(latents=t["latents"][:, :1].contiguous())), ("[6, 1, 4, 3]", "[6, 2, 4, 3]")),
    (edited(lambda t: t.update(latents=t["latents"].float())), ("in float32", "in float16")),
    (edited(lambda t: t.update(labels=t["labels"][:2].contiguous())), ("labels [2]", "[6] in int64")),
    (edited(lambda t: t["labels"].fill_(2)), ("none of the 2 classes",)),
    (edited(lambda t: t.pop("labels")), ("no shard of a latent cache",)),
    (without_names, ("no shard of a latent cache",)),
    (lambda path: path.write_bytes(path.read_bytes()[:-8]), ("not a whole safetensors file",)),
    (lambda path: path.write_bytes(b""), ("not a whole safetensors file",)),
    (lambda path: path.write_bytes(path.with_name("latents-00001.safetensors").read_bytes()), ("another cache",)),
]


@pytest.mark.parametrize(("damage", "names"), DAMAGE)
def test_a_damaged_shard(
    tmp_path: Path, photos: PhotoFolder, damage: Callable[[Path], object], names: tuple[str, ...]
) -> None:
    header, _ = make(tmp_path, photos)
    path = tmp_path / "latents-00000.safetensors"
    damage(path)
    with pytest.raises(InputError) as error:
        read_cache(tmp_path)
    one_sentence(error, path, "SHA-256 differs", "remove it and run softvq cache-latents again")
    for call in (lambda: read_cache(tmp_path, verify=False), lambda: make(tmp_path, photos)):
        with pytest.raises(InputError) as error:
            call()
        one_sentence(error, path, *names)
    path.unlink()
    with pytest.raises(InputError, match=r"latents-00000.safetensors: is missing; run softvq cache-latents again"):
        read_cache(tmp_path)
    assert make(tmp_path, photos) == (header, 6)  # as the sentence said


def test_a_bit_that_flipped_is_found(tmp_path: Path, photos: PhotoFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, photos, encode=failing_after(5))
    flip_bit(tmp_path / "latents-00001.safetensors")
    with pytest.raises(InputError, match=r"latents-00001.safetensors: is not as it was written, its SHA-256 differs"):
        make(tmp_path, photos)
    flip_bit(tmp_path / "latents-00001.safetensors")
    make(tmp_path, photos)
    flip_bit(tmp_path / "latents-00003.safetensors")
    with pytest.raises(InputError, match=r"latents-00003.safetensors: is not as it was written, its SHA-256 differs"):
        read_cache(tmp_path)
    assert len(read_cache(tmp_path, verify=False).names) == 22


def test_a_shard_with_other_labels_is_found(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path, photos)
    edited(lambda t: t["labels"].fill_(1))(tmp_path / "latents-00000.safetensors")
    header_with(complete=False, shards=[])(tmp_path / "cache.json")  # as after a kill between the two files
    with pytest.raises(InputError, match=r"latents-00000.safetensors: does not hold the photographs that belong there"):
        make(tmp_path, photos)


def test_shards_that_changed_places_are_found(tmp_path: Path, photos: PhotoFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, photos, encode=failing_after(3))
    (tmp_path / "latents-00000.safetensors").rename(tmp_path / "latents-00001.safetensors")
    with pytest.raises(InputError, match=r"latents-00001.safetensors: is a shard of another cache"):
        make(tmp_path, photos)


@pytest.mark.parametrize(
    ("encode", "error", "names"),
    [
        (lambda images: encode(images).fill_(torch.nan), RunError, ("ab/00.png", "not all finite", "--dtype float32")),
        (lambda images: encode(images) + 1e6, RunError, ("ab/00.png", "not all finite numbers in float16")),
        (lambda images: encode(images)[:, :2], InputError, ("[8, 2, 3]", "[8, 4, 3]")),
    ],
)
def test_latents_that_cannot_be_kept(
    tmp_path: Path,
    photos: PhotoFolder,
    encode: Callable[[Tensor], Tensor],
    error: type[Exception],
    names: tuple[str, ...],
) -> None:
    with pytest.raises(error) as raised:
        make(tmp_path / "out", photos, encode=encode)
    one_sentence(raised, *names)
    assert set(contents(tmp_path / "out")) == {"cache.json"}


def header_with(**changes: object) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (Path.unlink, ("is no latent cache", "softvq cache-latents")),
        (lambda path: path.write_text("{"), ("cache.json", "not plain JSON")),
        (lambda path: path.write_text("[" * 100_000), ("cache.json", "not plain JSON")),
        (lambda path: path.write_text("{}"), ("cache.json", "not of a latent cache")),
        (header_with(version=2), ("version is 2", "reads 1")),
        (header_with(colour="red"), ("unknown field 'colour'",)),
        (header_with(photographs=23), ("22 images and 0 skipped are not 23",)),
        (header_with(photographs=0), ("photographs are 0",)),
        (header_with(shards=[{"file": "../x.safetensors", "count": 22, "sha256": ""}]), ("shards",)),
    ],
)
def test_a_damaged_header(
    tmp_path: Path, photos: PhotoFolder, damage: Callable[[Path], object], names: tuple[str, ...]
) -> None:
    make(tmp_path, photos)
    damage(tmp_path / "cache.json")
    for read in (cache_info, read_cache):
        with pytest.raises(InputError) as error:
            read(tmp_path)
        one_sentence(error, tmp_path, *names)


def test_a_header_that_promises_more_than_there_is_takes_no_memory(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path, photos)
    path = tmp_path / "cache.json"
    header = json.loads(path.read_text())
    header["plan"] |= {"tokens": 65536, "dim": 65536}
    path.write_text(json.dumps(header))
    with pytest.raises(InputError, match="too small for its 6 images"):
        read_cache(tmp_path, verify=False)
    header["photographs"] = 10**30
    path.write_text(json.dumps(header))
    with pytest.raises(InputError, match="photographs are 1000000"):
        read_cache(tmp_path)
    header["photographs"], header["plan"]["shard_size"] = 10**8, 1
    path.write_text(json.dumps(header))
    with pytest.raises(InputError, match="more than 100000 shards"):
        read_cache(tmp_path)


def test_two_processes_do_not_write_one_cache(tmp_path: Path, photos: PhotoFolder) -> None:
    with folder_lock(tmp_path / "out", "written"), pytest.raises(InputError, match="is being written by process"):
        make(tmp_path / "out", photos)
    make(tmp_path / "out", photos)
    assert not (tmp_path / "out" / ".lock").exists()
