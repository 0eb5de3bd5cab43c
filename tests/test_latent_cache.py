"""A cache is what an uninterrupted run would have made."""

import dataclasses
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from softvq.data.folder import PhotoFolder
from softvq.data.images import center_crop, read_image, to_tensor
from softvq.data.latent_cache import cache_info, read_cache
from softvq.data.latent_writer import write_cache
from softvq.errors import InputError, RunError
from softvq.files import sha256
from tests.caches import DIM, FULL, NAMES, PLAN, SIDE, TOKENS, encode, failing_after, make, one_sentence, open_folder
from tests.program import contents, full_disk, make_photos, photograph


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> PhotoFolder:
    root = tmp_path_factory.mktemp("data") / "photos"
    make_photos(root, NAMES)
    return open_folder(root)


def test_a_cache_holds_both_views_of_every_photograph(tmp_path: Path, photos: PhotoFolder) -> None:
    header, count = make(tmp_path / "out", photos, FULL)
    assert (count, header.images, header.views, len(header.shards)) == (22, 22, 2, 4)
    assert cache_info(tmp_path / "out") == header
    cache = read_cache(tmp_path / "out", PLAN.fingerprint)
    assert cache.names == tuple(photos.names)
    assert sorted(cache.names) == sorted(NAMES)
    assert cache.classes == ("ab", "ab-ant")
    assert [cache.classes[label] for label in cache.labels.tolist()] == [name.split("/")[0] for name in cache.names]
    assert (cache.image_size, cache.data_fingerprint) == (SIDE, photos.fingerprint)
    assert (cache.tokenizer, cache.fingerprint) == ("model", PLAN.fingerprint)
    for name, views in zip(cache.names, cache.latents, strict=True):
        square = center_crop(read_image(Path(photos.root, name)), SIDE)
        for view, picture in zip(views, (square, square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)), strict=True):
            torch.testing.assert_close(view, encode(to_tensor(picture)[None])[0])
    assert not torch.equal(cache.latents[:, 0], cache.latents[:, 1])


def test_files_are_as_documented(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path, photos)
    assert set(contents(tmp_path)) == {"cache.json", *(f"latents-0000{i}.safetensors" for i in range(4))}
    header = json.loads((tmp_path / "cache.json").read_text())
    assert (header["format"], header["version"], header["complete"]) == ("softvq-latent-cache", 1, True)
    assert [shard["count"] for shard in header["shards"]] == [6, 6, 6, 4]
    assert header["shards"][3]["sha256"] == sha256(tmp_path / "latents-00003.safetensors")
    with safe_open(tmp_path / "latents-00003.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["softvq-latent-shard"])["names"] == photos.names[18:]
        assert file.get_tensor("latents").shape == (4, 2, TOKENS, DIM)
        assert file.get_tensor("latents").dtype == torch.float16


def test_one_view_float16_and_no_classes(tmp_path: Path) -> None:
    make_photos(tmp_path / "flat", ("b.png", "a.png"))
    plan = dataclasses.replace(PLAN, flip=False)
    make(tmp_path / "out", open_folder(tmp_path / "flat"), plan)
    cache = read_cache(tmp_path / "out")
    assert cache.names == ("a.png", "b.png")
    assert (tuple(cache.latents.shape), cache.latents.dtype) == ((2, 1, TOKENS, DIM), torch.float16)
    assert (cache.labels.tolist(), cache.classes) == ([-1, -1], ())


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5, 6])
def test_whoever_goes_on_ends_where_the_uninterrupted_end(tmp_path: Path, photos: PhotoFolder, calls: int) -> None:
    make(tmp_path / "whole", photos)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", photos, encode=failing_after(calls))
    begun = cache_info(tmp_path / "out")
    assert not begun.complete
    assert len(begun.shards) == calls // 2  # two batches each
    with pytest.raises(InputError) as error:
        read_cache(tmp_path / "out")
    one_sentence(error, "is not finished", f"{calls // 2} of 4 shards", "run softvq cache-latents again to go on")
    seen = []
    _, count = make(tmp_path / "out", photos, encode=lambda images: (seen.append(len(images)), encode(images))[1])
    assert count == 22 - 6 * (calls // 2)
    assert sum(seen) == 2 * count  # nothing that was there is encoded again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_complete_cache_is_checked_and_not_touched(tmp_path: Path, photos: PhotoFolder) -> None:
    first, _ = make(tmp_path, photos)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again, count = make(tmp_path, photos, encode=failing_after(0))
    assert (again, count) == (first, 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    read = [read_cache(tmp_path).digest for _ in range(2)]
    assert read == [first.digest] * 2


def killed(out: Path, root: Path) -> None:
    def kill(images: Tensor) -> Tensor:
        (out / ".latents-00001.safetensors.0123abcd.tmp.safetensors").write_bytes(b"half")
        (out / ".tmpAb12Cd").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        return images

    calls = iter([encode, encode, kill])
    torch.set_num_threads(1)
    make(out, open_folder(root), encode=lambda images: next(calls)(images))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_kill_loses_one_shard_and_leaves_nothing_behind(tmp_path: Path, photos: PhotoFolder) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "out", photos.root))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(contents(tmp_path / "out")) == 5  # the lock, which ended with its process, too
    assert make(tmp_path / "out", photos)[1] == 16
    make(tmp_path / "whole", photos)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_change_nothing(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path / "none", photos)
    before = torch.get_rng_state()
    make(tmp_path / "two", photos, num_workers=2)
    assert contents(tmp_path / "none") == contents(tmp_path / "two")
    assert torch.equal(torch.get_rng_state(), before)


def test_unreadable_photographs_are_skipped_and_listed(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", NAMES)
    (tmp_path / "photos/ab/03.png").write_bytes(b"spoilt")
    folder, told = open_folder(tmp_path / "photos"), []
    header, count = make(tmp_path / "out", folder, tell=told.append)
    assert (count, header.images, header.skipped) == (21, 21, ("ab/03.png",))
    assert len(told) == 1
    assert "ab/03.png: is not a JPEG, PNG or WebP image" in told[0]
    cache = read_cache(tmp_path / "out")
    assert cache.names == tuple(name for name in folder.names if name != "ab/03.png")
    assert make(tmp_path / "out", folder) == (header, 0)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "again", folder, encode=failing_after(4))
    assert make(tmp_path / "again", folder)[0] == header  # what was skipped before the break is known after it
    (tmp_path / "photos/ab/00.png").write_bytes(b"spoilt")
    with pytest.raises(RunError) as error:
        make(tmp_path / "other", open_folder(tmp_path / "photos"))
    one_sentence(error, "2 of 22 photographs cannot be read (ab/00.png, ab/03.png), more than 5%")


def test_a_shard_of_unreadable_photographs(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", NAMES)
    (tmp_path / "photos/ab/03.png").write_bytes(b"spoilt")
    plan = dataclasses.replace(PLAN, shard_size=1)
    header, _ = make(tmp_path / "out", open_folder(tmp_path / "photos"), plan)
    assert [shard.count for shard in header.shards] == [1, 0] + [1] * 20
    assert len(read_cache(tmp_path / "out").names) == 21


def test_a_cache_may_move_and_its_model_be_called_otherwise(tmp_path: Path, photos: PhotoFolder) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", photos, encode=failing_after(3))
    (tmp_path / "out").rename(tmp_path / "moved")
    make(tmp_path / "moved", photos, dataclasses.replace(PLAN, tokenizer="./model/"))
    assert read_cache(tmp_path / "moved").tokenizer == "model"


def test_latents_of_another_tokenizer(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path, photos)
    with pytest.raises(InputError) as error:
        read_cache(tmp_path, "0" * 64)
    one_sentence(error, tmp_path, "belong to tokenizer ffffffffffff (model), not to 000000000000")


def test_digests_tell_contents_apart(tmp_path: Path, photos: PhotoFolder) -> None:
    plans = [PLAN, FULL, dataclasses.replace(PLAN, flip=False), dataclasses.replace(PLAN, fingerprint="e" * 64)]
    digests = [make(tmp_path / str(i), photos, plan)[0].digest for i, plan in enumerate(plans)]
    assert len(set(digests)) == len(plans)
    assert make(tmp_path / "again", photos)[0].digest == digests[0]


def test_a_full_disk(tmp_path: Path, photos: PhotoFolder) -> None:
    make(tmp_path / "whole", photos)
    with full_disk(700), pytest.raises(RunError, match="cannot be written"):
        make(tmp_path / "out", photos)
    assert set(contents(tmp_path / "out")) == {"cache.json"}
    make(tmp_path / "out", photos)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_progress_is_told(tmp_path: Path, photos: PhotoFolder) -> None:
    seen = []

    def watch(parts: Sequence[object]) -> Iterator[object]:
        seen.append(len(parts))
        yield from parts

    make(tmp_path, photos, watch=watch)
    assert seen == [7]


@pytest.mark.parametrize("changes", [{"shard_size": 0}, {"tokens": 0}, {"dim": 1 << 17}])
def test_a_plan_that_cannot_be(changes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(changes))} is .*, expected 1 to 65536"):
        dataclasses.replace(PLAN, **changes)
    with pytest.raises(InputError, match="batch_size is 0"):
        write_cache("nowhere", open_folder(Path(__file__).parent.parent / "softvq/assets"), PLAN, encode, batch_size=0)


def test_a_photograph_of_one_colour_is_no_special_case(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 20), "black").save(tmp_path / "photos/a.png")
    photograph().save(tmp_path / "photos/b.png")
    make(tmp_path / "out", open_folder(tmp_path / "photos"), FULL)
    assert torch.equal(read_cache(tmp_path / "out").latents[0], torch.full((2, TOKENS, DIM), -1.0))
