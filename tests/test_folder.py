import csv
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import softvq
from softvq.config import from_dict, to_dict
from softvq.data.folder import Batch, DataConfig, PhotoFolder, batches
from softvq.data.images import center_crop, read_image, to_tensor
from softvq.data.order import index_at
from softvq.errors import InputError, RunError
from softvq.files import sha256
from tests.image_zoo import BAD, ODD, encoded, photograph

# from Python 3.12 on, and of no concern to processes that only decode
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PLAIN = DataConfig(crop="center", flip=False)
PHOTOS = Path(softvq.__file__).parent / "assets/photos"


def make_folder(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph(seed=seed)))
    return root


def spoil(root: Path, *names: str) -> None:
    for name in names:
        (root / name).write_bytes(b"spoilt")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", [f"{'cat' if i % 3 else 'ant'}/{i}.png" for i in range(10)])


def listed(folder: PhotoFolder, **options: int) -> list[Batch]:
    chosen = {"batch_size": 4, "start_step": 0, "num_steps": 6, "num_workers": 0} | options
    return list(batches(folder, **chosen))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Batch):
            mine, yours = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(mine, yours) if isinstance(mine, torch.Tensor) else mine == yours, field.name


def test_class_folders_give_labels_by_sorted_name(root: Path) -> None:
    folder = PhotoFolder(root, 16, PLAIN, seed=0)
    assert folder.classes == ["ant", "cat"]
    assert len(folder) == 10
    for position in range(10):
        sample = folder.sample(position)
        name = folder.names[index_at(position, 10, 0)]
        assert sample.label == ["ant", "cat"].index(name.split("/")[0])
        assert torch.equal(sample.image, to_tensor(center_crop(read_image(root / name), 16)))
        assert sample.skipped == ()


def test_one_image_outside_a_subfolder_means_no_classes(root: Path) -> None:
    make_folder(root, ["stray.png"])
    folder = PhotoFolder(root, 16, PLAIN, seed=0)
    assert folder.classes == []
    assert {folder.sample(position).label for position in range(11)} == {-1}


def test_deep_folders_belong_to_their_first_name(tmp_path: Path) -> None:
    folder = PhotoFolder(make_folder(tmp_path, ["b/deep/er/x.png", "a/y.png"]), 16, PLAIN, seed=0)
    assert folder.classes == ["a", "b"]
    assert sorted(folder.labels) == [0, 1]


def test_batches_have_the_types_that_training_needs(root: Path) -> None:
    batch = listed(PhotoFolder(root, 16, DataConfig(), seed=0), num_steps=1)[0]
    assert (batch.images.shape, batch.images.dtype) == ((4, 3, 16, 16), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((4,), torch.int64)
    assert (batch.positions.tolist(), batch.positions.dtype) == ([0, 1, 2, 3], torch.int64)
    assert batch.skipped == []
    assert batch.images.min() >= -1
    assert batch.images.max() <= 1


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("cache_megabytes", [0, 256])
def test_workers_and_cache_change_nothing(root: Path, num_workers: int, cache_megabytes: int) -> None:
    spoil(root, "ant/0.png", "cat/4.png")
    config = DataConfig(max_bad_fraction=0.5, cache_megabytes=cache_megabytes)
    expected = listed(PhotoFolder(root, 16, DataConfig(max_bad_fraction=0.5), seed=3))
    assert {name for batch in expected for name in batch.skipped} == {"ant/0.png", "cat/4.png"}
    assert_same(listed(PhotoFolder(root, 16, config, seed=3), num_workers=num_workers), expected)


@pytest.mark.parametrize("start", [1, 2, 5])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_a_step_gives_the_same_batches(root: Path, start: int, num_workers: int) -> None:
    expected = listed(PhotoFolder(root, 16, DataConfig(), seed=1))[start:]
    resumed = PhotoFolder(root, 16, DataConfig(), seed=1)
    assert_same(listed(resumed, start_step=start, num_steps=6 - start, num_workers=num_workers), expected)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_the_global_batch_in_order(root: Path, world_size: int) -> None:
    whole = listed(PhotoFolder(root, 16, DataConfig(), seed=1))
    parts = [
        listed(PhotoFolder(root, 16, DataConfig(), seed=1), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for name in ("images", "labels", "positions"):
            joined = torch.cat([getattr(part[step], name) for part in parts])
            assert torch.equal(joined, getattr(batch, name)), name


@given(st.integers(1, 8), st.integers(0, 20))
def test_steps_tile_the_positions(batch_size: int, start: int) -> None:
    folder = PhotoFolder(PHOTOS / "val", 8, PLAIN, seed=0)
    found = [p for b in listed(folder, batch_size=batch_size, start_step=start, num_steps=2) for p in b.positions]
    assert [int(p) for p in found] == list(range(start * batch_size, (start + 2) * batch_size))


def test_an_epoch_shows_every_photograph_once_and_differently_each_time(root: Path) -> None:
    folder = PhotoFolder(root, 16, DataConfig(), seed=0)
    plain = PhotoFolder(root, 16, PLAIN, seed=0)
    first = Counter(plain.sample(p).image.numpy().tobytes() for p in range(10))
    second = Counter(plain.sample(p).image.numpy().tobytes() for p in range(10, 20))
    assert first == second
    assert set(first.values()) == {1}
    augmented = {folder.sample(position).image.numpy().tobytes() for position in range(20)}
    assert len(augmented) == 20


def test_about_half_are_mirrored(tmp_path: Path) -> None:
    (tmp_path / "ramp.png").write_bytes(encoded(Image.fromarray(np.tile(np.arange(0, 250, 10, np.uint8), (25, 1)))))
    folder = PhotoFolder(tmp_path, 25, DataConfig(crop="center"), seed=0)
    images = [folder.sample(position).image for position in range(400)]
    mirrored = [bool(image[0, 0, 0] > image[0, 0, -1]) for image in images]
    assert 160 <= sum(mirrored) <= 240
    assert torch.equal(images[mirrored.index(True)].flip(-1), images[mirrored.index(False)])


def test_the_next_in_the_epoch_replaces_a_bad_image(root: Path) -> None:
    names = PhotoFolder(root, 16, PLAIN, seed=0).names
    order = [names[index_at(position, 10, 0)] for position in range(10)]
    spoil(root, order[3], order[4], order[9])
    folder = PhotoFolder(root, 16, PLAIN, seed=0)

    def stands_at(position: int) -> str:
        image = folder.sample(position).image
        return next(n for n in order if n not in bad and torch.equal(image, whole(root / n)))

    def whole(path: Path) -> torch.Tensor:
        return to_tensor(center_crop(read_image(path), 16))

    bad = {order[3], order[4], order[9]}
    for _ in range(2):  # the second time they are known to be bad, which must not show
        assert (stands_at(3), folder.sample(3).skipped) == (order[5], (order[3], order[4]))
        assert (stands_at(4), folder.sample(4).skipped) == (order[5], (order[4],))
        assert (stands_at(9), folder.sample(9).skipped) == (order[0], (order[9],))
        assert (stands_at(5), folder.sample(5).skipped) == (order[5], ())


def test_a_bad_image_changes_nothing_at_other_positions(root: Path) -> None:
    before = PhotoFolder(root, 16, DataConfig(), seed=0)
    expected = [before.sample(position) for position in range(20)]
    spoil(root, "cat/5.png")
    after = PhotoFolder(root, 16, DataConfig(), seed=0)
    changed = [p for p in range(20) if not torch.equal(after.sample(p).image, expected[p].image)]
    assert changed == [p for p in range(20) if before.names[index_at(p, 10, 0)] == "cat/5.png"]
    assert len(changed) == 2


def test_the_whole_zoo_is_decoded_or_skipped(tmp_path: Path) -> None:
    for name, (make, *_) in (BAD | ODD).items():
        (tmp_path / name).write_bytes(make())
    folder = PhotoFolder(tmp_path, 16, DataConfig(max_bad_fraction=0.9), seed=0)
    met = {name for batch in listed(folder, batch_size=len(folder), num_steps=1) for name in batch.skipped}
    assert met == set(BAD)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_bad_images_stop_the_run(root: Path, num_workers: int) -> None:
    bad = ["ant/0.png", "cat/1.png", "cat/2.png"]
    spoil(root, *bad)
    allowed = PhotoFolder(root, 16, DataConfig(max_bad_fraction=0.3), seed=0)
    assert len(listed(allowed, num_workers=num_workers)) == 6  # the same three in every epoch are still three
    refused = PhotoFolder(root, 16, DataConfig(max_bad_fraction=0.29), seed=0)
    with pytest.raises(RunError) as caught:
        listed(refused, num_workers=num_workers)
    message = str(caught.value)
    assert message.startswith(f"{root}: 3 of 10 images cannot be read ({', '.join(bad)}), more than max_bad_fraction")
    assert "\n" not in message


def test_only_the_first_few_bad_names_are_shown(root: Path) -> None:
    folder = PhotoFolder(root, 16, DataConfig(), seed=0)
    with pytest.raises(RunError, match=r"7 of 10 .* \(a0, a1, a2, a3, a4, \.\.\.\)"):
        folder.check_bad({f"a{number}" for number in range(7)})


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_folder_without_one_good_image_stops_the_run(root: Path, num_workers: int) -> None:
    folder = PhotoFolder(root, 16, DataConfig(max_bad_fraction=0.99), seed=0)
    spoil(root, *folder.names)
    with pytest.raises(RunError, match="none of its 10 images can be read") as caught:
        listed(folder, num_workers=num_workers)
    assert "\n" not in str(caught.value)


DEADLY = """
import os, signal, sys, time, warnings
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Loaded
from softvq.cli import _explain
from softvq.data.folder import DataConfig, PhotoFolder, batches
Loaded._try_get_data.__defaults__ = (0.2,)  # seconds until workers are looked after; torch has 5

class Deadly(PhotoFolder):
    def sample(self, position):  # the first of each step lets its worker die, as often as is asked
        mark = f"{sys.argv[2]}/{position // 4}"
        deaths = len(os.listdir(sys.argv[2]))
        if position in (8, 12) and deaths < int(os.environ["DEATHS"]):
            open(f"{mark}-{deaths}", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(position)

whole = list(batches(PhotoFolder(sys.argv[1], 16, DataConfig(), seed=0), 4, 0, 5, 0))
for deaths in (3, 99):
    os.environ["DEATHS"] = str(deaths)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = []
        try:
            for batch in batches(Deadly(sys.argv[1], 16, DataConfig(), seed=0), 4, 0, 5, 2):
                found.append(batch)
                sum(range(300_000))  # in which nothing may be raised
        except Exception as error:
            print(*_explain(error))
    print(len(found), all(a.images.equal(b.images) for a, b in zip(found, whole)))
    print(len([each for each in told if "others take its place" in str(each.message)]))
"""


def test_dead_workers_are_replaced_where_they_were(root: Path, tmp_path: Path) -> None:
    """In a process of its own, which has nothing but these children; two workers may die at once."""
    (tmp_path / "marks").mkdir()
    command = [sys.executable, "-c", DEADLY, root, tmp_path / "marks"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    whole, replaced, sentence, part, often = result.stdout.splitlines()
    assert whole == "5 True", result.stderr
    assert part in ("0 True", "1 True", "2 True")  # with a worker goes what it has not handed over yet
    assert 1 <= int(replaced) <= int(often) == 3
    assert sentence.startswith("3 data workers died 4 times, often for want of memory")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_generator_is_not_touched(root: Path, num_workers: int) -> None:
    before = torch.get_rng_state()
    listed(PhotoFolder(root, 16, DataConfig(), seed=0), num_workers=num_workers, num_steps=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_each_photograph_is_decoded_once_while_there_is_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counted(path: Path, max_pixels: int) -> Image.Image:
        decoded.append(path.name)
        return read_image(path, max_pixels)

    monkeypatch.setattr("softvq.data.sources.read_image", counted)
    listed(PhotoFolder(root, 16, DataConfig(), seed=0), batch_size=10, num_steps=3)
    assert len(decoded) == 10
    decoded.clear()
    listed(PhotoFolder(root, 16, DataConfig(cache_megabytes=0), seed=0), batch_size=10, num_steps=3)
    assert len(decoded) == 30


def test_the_cache_keeps_to_its_room(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.new("RGB", (300, 300))))  # 360 kB decoded
    folder = PhotoFolder(tmp_path, 256, DataConfig(cache_megabytes=1), seed=0)
    for position in range(8):
        folder.sample(position)
    assert len(folder._decoded) == 2


def test_the_fingerprint_follows_names_and_sizes(root: Path, tmp_path: Path) -> None:
    def fingerprint(seed: int = 0) -> str:
        return PhotoFolder(root, 16, DataConfig(), seed=seed).fingerprint

    first = fingerprint()
    assert len(first) == 64
    assert fingerprint(seed=9) == first
    root.rename(tmp_path / "moved")
    root = tmp_path / "moved"
    assert fingerprint() == first
    (root / "ant/0.png").rename(root / "ant/00.png")
    renamed = fingerprint()
    spoil(root, "ant/00.png")
    assert len({first, renamed, fingerprint()}) == 3


def test_folders_that_cannot_be_used_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        PhotoFolder(tmp_path / "nowhere", 16, DataConfig(), seed=0)
    with pytest.raises(InputError, match="is a file, expected a folder"):
        PhotoFolder(root / "ant/0.png", 16, DataConfig(), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        PhotoFolder(tmp_path / "empty", 16, DataConfig(), seed=0)
    with pytest.raises(InputError, match="image_size is 0"):
        PhotoFolder(root, 0, DataConfig(), seed=0)


@pytest.mark.parametrize(("batch_size", "world_size"), [(0, 1), (-4, 2), (5, 2)])
def test_a_batch_that_cannot_be_shared_out_is_refused(root: Path, batch_size: int, world_size: int) -> None:
    folder = PhotoFolder(root, 16, DataConfig(), seed=0)
    with pytest.raises(InputError, match=f"batch_size is {batch_size}, expected a positive multiple"):
        batches(folder, batch_size, 0, 1, 0, world_size=world_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_workers", -1),
        ("num_workers", 1000),
        ("max_bad_fraction", 1.0),
        ("max_bad_fraction", -0.1),
        ("max_pixels", 0),
        ("max_pixels", 10**9),
        ("cache_megabytes", -1),
        ("crop", "middle"),
    ],
)
def test_impossible_choices_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} is {value!r}"):
        from_dict(DataConfig, {field: value})


def test_the_config_survives_a_round_trip() -> None:
    config = DataConfig(path="photos", crop="center", flip=False, num_workers=2, cache_megabytes=0)
    assert from_dict(DataConfig, to_dict(config)) == config


def test_the_bundled_photographs_are_what_their_manifest_says() -> None:
    with (PHOTOS / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    files = {p.relative_to(PHOTOS).as_posix(): p for p in PHOTOS.rglob("*.jpg")}
    assert {row["file"] for row in rows} == set(files)
    for row in rows:
        assert sha256(files[row["file"]]) == row["sha256"]
        assert row["licence"] in {"CC0-1.0", "MIT"}
    assert {read_image(path).size for path in files.values()} == {(128, 128)}
    assert sum(path.stat().st_size for path in PHOTOS.rglob("*") if path.is_file()) <= 2_900_000
    assert len({row["sha256"] for row in rows}) == len(rows)


def test_the_bundled_photographs_are_attributed() -> None:
    text = (PHOTOS / "ATTRIBUTION.txt").read_text()
    assert "CC0 1.0 Universal" in text
    assert "Permission is hereby granted, free of charge" in text
    assert "flower" not in text.lower()


def test_a_link_to_nothing_is_passed_over_like_a_bad_file(root: Path) -> None:
    (root / "zzz.jpg").symlink_to(root / "gone.jpg")
    folder = PhotoFolder(root, 16, DataConfig(max_bad_fraction=0.5), seed=0)
    skipped = [name for batch in batches(folder, 4, 0, len(folder), 0) for name in batch.skipped]
    assert set(skipped) == {"zzz.jpg"}
