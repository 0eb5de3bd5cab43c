"""Sets of images: the same pixels from whatever holds them, however the work is shared."""

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.images import center_crop, read_image, to_image
from softvq.data.latent_cache import CachePlan
from softvq.data.latent_writer import write_cache
from softvq.data.latents import LatentFile, write_latents
from softvq.errors import InputError, RunError
from softvq.evaluation import image_sets
from softvq.evaluation.image_sets import ImageBatch, ImageSet, in_memory, open_images, pixel_fingerprint
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.program import DIM, SIZE, TOKENS, make_model, photograph

COUNT, HEIGHT, WIDTH = 7, 24, 16
PICTURES = np.stack([np.asarray(photograph(HEIGHT, WIDTH, seed=seed)) for seed in range(COUNT)])


def read(images: ImageSet, batch_size: int = 3, **options: Any) -> ImageBatch:
    batches = list(images.batches(batch_size, **options))
    assert all(1 <= len(batch.places) <= batch_size for batch in batches)
    assert all(batch.pixels.is_contiguous() for batch in batches)
    return joined(batches)


def joined(batches: list[ImageBatch]) -> ImageBatch:
    return ImageBatch(
        pixels=torch.cat([batch.pixels for batch in batches]),
        places=torch.cat([batch.places for batch in batches]),
        names=tuple(name for batch in batches for name in batch.names),
        digests=tuple(digest for batch in batches for digest in batch.digests),
    )


def same(a: ImageBatch, b: ImageBatch) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.places, b.places) and a.digests == b.digests


def make_folder(folder: Path, pictures: np.ndarray = PICTURES) -> Path:
    folder.mkdir()
    for place, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{place:02}.png")
    return folder


@pytest.fixture(params=["folder", "stored.npz", "deflated.npz", "memory"])
def images(request: pytest.FixtureRequest, tmp_path: Path) -> ImageSet:
    if request.param == "memory":
        return in_memory(torch.from_numpy(PICTURES).permute(0, 3, 1, 2), "memory")
    path = tmp_path / request.param
    if request.param == "folder":
        return open_images(make_folder(path))
    (np.savez if "stored" in request.param else np.savez_compressed)(path, arr_0=PICTURES)
    return open_images(str(path))


def test_every_container_gives_the_same_pixels_and_digests(images: ImageSet, tmp_path: Path) -> None:
    assert images.count == COUNT
    assert images.size == (HEIGHT, WIDTH)
    assert images.crop == "none"
    assert images.source == ("memory" if images.kind == "memory" else str(next(tmp_path.iterdir())))
    found = read(images)
    np.testing.assert_array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), PICTURES)
    assert found.pixels.dtype == torch.uint8
    assert found.places.tolist() == list(range(COUNT))
    start = f"{HEIGHT}x{WIDTH}:".encode()
    digests = [hashlib.blake2b(start + picture.tobytes(), digest_size=16).digest() for picture in PICTURES]
    assert list(found.digests) == digests
    assert pixel_fingerprint(found.digests) == hashlib.sha256(b"".join(sorted(digests))).hexdigest()
    number = "{:02}.png" if images.kind == "folder" else "{:06}"
    assert found.names == tuple(number.format(place) for place in range(COUNT))


@pytest.mark.parametrize("workers", [0, 3])
def test_the_pixels_depend_on_neither_batches_workers_nor_ranks(images: ImageSet, workers: int) -> None:
    expected = read(images, COUNT)
    for batch_size in (1, 2, 5, 64):
        assert same(read(images, batch_size, workers=workers), expected)
    for ranks in (2, 3, COUNT, COUNT + 4):
        shares = [list(images.batches(2, workers=workers, rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert same(joined([batch for share in shares for batch in share]), expected)
        counts = [sum(len(batch.places) for batch in share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_a_fingerprint_is_of_pictures_and_not_of_their_order() -> None:
    def fingerprint(pictures: np.ndarray) -> str:
        return pixel_fingerprint(read(in_memory(torch.from_numpy(pictures).permute(0, 3, 1, 2), "x")).digests)

    one = fingerprint(PICTURES)
    assert fingerprint(PICTURES[::-1].copy()) == one
    changed = PICTURES.copy()
    changed[3, 2, 1, 0] ^= 1
    lying = PICTURES.reshape(COUNT, WIDTH, HEIGHT, 3)  # the same bytes, but other pictures
    twice = np.concatenate([PICTURES, PICTURES[:1]])
    assert len({one, *map(fingerprint, (changed, lying, twice, PICTURES[1:]))}) == 5


@pytest.mark.parametrize("shape", [(24, 16), (16, 16), (40, 70), (9, 9), (9, 300)])
def test_the_crop_is_that_of_adm(shape: tuple[int, int], tmp_path: Path) -> None:
    square = np.asarray(center_crop(Image.fromarray(np.asarray(photograph(*shape))), 16))
    assert shape != (16, 16) or np.array_equal(square, np.asarray(photograph(*shape)))
    whole = np.asarray(photograph(*shape))[None]
    np.savez(tmp_path / "x.npz", whole)
    for source in (make_folder(tmp_path / "folder", whole), tmp_path / "x.npz"):
        images = open_images(source, size=16, crop=True)
        assert (images.size, images.crop) == ((16, 16), "centre 16 (ADM)")
        np.testing.assert_array_equal(read(images).pixels[0].permute(1, 2, 0).numpy(), square)


def test_a_crop_brings_different_sizes_together(tmp_path: Path) -> None:
    for side in (20, 30, 50):
        photograph(side, side + 7).save(tmp_path / f"{side}.jpg", quality=95)
    found = read(open_images(tmp_path, size=16, crop=True), workers=2)
    assert found.names == ("20.jpg", "30.jpg", "50.jpg")
    for name, pixels in zip(found.names, found.pixels, strict=True):
        expected = center_crop(read_image(tmp_path / name), 16)
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_the_grid_of_samples_is_none_of_them(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "samples")
    photograph(90, 90).save(folder / "grid.png")
    with pytest.raises(InputError, match=r"grid\.png: is 90x90 .* expected 24x16"):
        read(open_images(folder))
    (folder / "recipe.json").write_text("{}")
    np.savez(folder / "samples.npz", arr_0=PICTURES, arr_1=np.arange(COUNT))
    images = open_images(folder)
    assert images.count == COUNT
    assert same(read(images), read(open_images(folder / "samples.npz")))
    for path in folder.glob("0*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"samples: holds no image but grid\.png"):
        open_images(folder)


def test_a_single_image_is_a_set_of_one(tmp_path: Path) -> None:
    photograph(8, 9).save(tmp_path / "a.png")
    images = open_images(tmp_path / "a.png")
    assert (images.count, images.size, read(images).names) == (1, (8, 9), ("a.png",))


def test_workers_decode_in_threads_of_their_own_that_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()

    def noted(path: Path) -> Image.Image:
        names.add(threading.current_thread().name)
        return read_image(path)

    images = open_images(make_folder(tmp_path / "x"))
    monkeypatch.setattr(image_sets, "read_image", noted)
    batches = images.batches(2, workers=2)
    next(batches)
    del batches  # given up in the middle
    assert names
    assert all(name.startswith("softvq-decoder") for name in names)
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("softvq-reader", "softvq-decoder"))
    ]


@pytest.mark.parametrize("workers", [0, 3])
def test_a_bad_folder_is_refused_in_one_sentence(workers: int, tmp_path: Path) -> None:
    def refuse(message: str, path: Path, **options: Any) -> None:
        with pytest.raises(InputError, match=message) as error:
            read(open_images(path, **options), workers=workers)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    for name in ("missing", "missing.npz", "missing.safetensors"):
        refuse("no such file or folder", tmp_path / name)
    (tmp_path / "void").mkdir()
    refuse("holds no image", tmp_path / "void")
    (tmp_path / "x.npy").write_bytes(b"x")
    refuse("expected a folder of images, an .npz file, or latents", tmp_path / "x.npy")
    folder = make_folder(tmp_path / "folder")
    refuse(r"to be cropped, but to no size", folder, crop=True)
    refuse(r"00\.png: is 24x16 \(height x width\), expected 16x16; .*--crop", folder, size=16)
    photograph(16, 24).save(folder / "03.png")
    refuse(r"03\.png: is 16x24 \(height x width\), expected 24x16 like the first .*--crop", folder)
    (folder / "03.png").write_bytes((folder / "04.png").read_bytes()[:-60])
    batches = open_images(folder).batches(3, workers=workers)
    assert next(batches).names == ("00.png", "01.png", "02.png")
    with pytest.raises(InputError, match=r"03\.png: is damaged or cut short"):
        next(batches)
    (folder / "00.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"00\.png: is empty"):
        open_images(folder)


def test_numbers_that_cannot_be_are_refused(tmp_path: Path) -> None:
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images = in_memory(pixels, "x", ["a", "b"])
    assert read(images).names == ("a", "b")
    for options, message in (({"batch_size": 0}, "batch_size is 0"), ({"batch_size": 1, "workers": -1}, "workers")):
        with pytest.raises(InputError, match=message):
            images.batches(**options)
    with pytest.raises(InputError, match="x: 1 names are given for 2 images"):
        in_memory(pixels, "x", ["a"])
    with pytest.raises(InputError, match="x: pixels are"):
        in_memory(pixels[:0], "x")
    with pytest.raises(InputError, match="size is 0"):
        open_images(tmp_path, size=0)


def latent_file(path: Path, tokenizer: ImageTokenizer, count: int = 40, tokens: int = TOKENS) -> LatentFile:
    content = LatentFile(
        latents=torch.randn(count, tokens, DIM, generator=torch.Generator().manual_seed(0)),
        names=tuple(f"cats/{place}.jpg" for place in range(count)),
        sizes=torch.tensor([[SIZE, 2 * SIZE]] * count),
        fingerprint=tokenizer.latent_fingerprint(),
        softvq_version="0",
    )
    write_latents(path, content)
    return content


def test_latents_are_decoded_alike_in_any_batches(tmp_path: Path) -> None:
    tokenizer = make_model(tmp_path / "model")
    content = latent_file(tmp_path / "x.safetensors", tokenizer)
    images = open_images(tmp_path / "x.safetensors", tokenizer=tokenizer)
    assert (images.kind, images.count, images.size) == ("latents", 40, (SIZE, 2 * SIZE))
    found = read(images)
    assert found.names == content.names
    with torch.no_grad():
        decoded = [tokenizer.decode(part, (SIZE, 2 * SIZE)) for part in content.latents.split(32)]
    for pixels, image in zip(found.pixels, torch.cat(decoded), strict=True):
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(to_image(image)))
    with torch.autocast("cpu", torch.bfloat16):  # which is for the networks that look at the pictures
        assert same(read(images, 40), found)
    assert same(read(images, 7, workers=3), found)
    shares = [list(images.batches(4, workers=rank, rank=rank, ranks=3)) for rank in range(3)]
    assert same(joined([batch for share in shares for batch in share]), found)
    squares = read(open_images(tmp_path / "x.safetensors", tokenizer=tokenizer, size=16, crop=True))
    expected = center_crop(to_image(torch.cat(decoded)[39]), 16)
    np.testing.assert_array_equal(squares.pixels[39].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_latents_are_decoded_in_the_same_groups_on_any_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_model(tmp_path / "model")
    latent_file(tmp_path / "x.safetensors", tokenizer, count=70)

    def decode(self: ImageTokenizer, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        grey = torch.linspace(-1, 1, len(latents))  # as if an image depended on those beside it
        return grey[:, None, None, None].expand(-1, 3, *size)

    monkeypatch.setattr(ImageTokenizer, "decode", decode)
    images = open_images(tmp_path / "x.safetensors", tokenizer=tokenizer)
    found = read(images, 70)
    for ranks in (2, 3, 7):
        shares = [list(images.batches(5, workers=rank, rank=rank, ranks=ranks)) for rank in range(ranks)]
        assert same(joined([batch for share in shares for batch in share]), found)


def stripes(images: torch.Tensor) -> torch.Tensor:
    """Encode as the mean colours of stripes, from left to right: what mirroring changes."""
    means = images.unflatten(-1, (TOKENS, -1)).mean((2, 4)).mT
    return torch.nn.functional.pad(means, (0, DIM - 3))


def painted(self: ImageTokenizer, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return latents[..., :3].mT[:, :, None].repeat_interleave(size[1] // TOKENS, 3).expand(-1, -1, size[0], -1)


def test_of_a_cache_the_first_views_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_model(tmp_path / "model")
    monkeypatch.setattr(ImageTokenizer, "decode", painted)
    photos = np.stack([np.asarray(photograph(SIZE, SIZE, seed)) for seed in range(5)])
    folder = PhotoFolder(make_folder(tmp_path / "x", photos), SIZE, DataConfig(crop="center", flip=False), seed=0)
    own = tokenizer.latent_fingerprint()
    plan = CachePlan(tokenizer="m", fingerprint=own, tokens=TOKENS, dim=DIM, dtype="float32", softvq_version="0")
    write_cache(tmp_path / "cache", folder, plan, stripes, batch_size=2)
    images = open_images(tmp_path / "cache", tokenizer=tokenizer)
    assert (images.kind, images.count, images.size) == ("latents", 5, (SIZE, SIZE))
    found = read(images)
    assert found.names == tuple(f"{place:02}.png" for place in range(5))
    straight = torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1
    expected = ((painted(tokenizer, stripes(straight), (SIZE, SIZE)) + 1) * 127.5).double()
    assert (found.pixels - expected).abs().max() < 0.51  # rounded to 8 bits
    assert (found.pixels - expected.flip(3)).abs().max() > 5
    with pytest.raises(InputError, match=r"cache: holds latents; give the tokenizer"):
        open_images(tmp_path / "cache")
    with pytest.raises(InputError, match=r"cache: these latents belong to tokenizer"):
        open_images(tmp_path / "cache", tokenizer=make_model(tmp_path / "other", seed=1))


def test_bad_latents_are_refused_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = tmp_path / "x.safetensors", make_model(tmp_path / "model")
    content = latent_file(path, tokenizer, count=2)

    def refuse(message: str, kind: type[Exception] = InputError, model: ImageTokenizer | None = tokenizer) -> None:
        with pytest.raises(kind, match=rf"^{path}: {message}"):
            read(open_images(path, tokenizer=model))

    refuse("holds latents; give the tokenizer that made them with --tokenizer", model=None)
    refuse("these latents belong to tokenizer", model=make_model(tmp_path / "other", seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(ImageTokenizer, "decode", lambda self, latents, size: torch.full((2, 3, *size), torch.nan))
        refuse("the tokenizer decodes to values that are not finite", RunError)
    latent_file(path, tokenizer, tokens=TOKENS + 1)
    refuse(r"an image is 5 tokens of 8, the tokenizer decodes 4 tokens of 8")
    for sizes, message in (
        ([[32, 32], [32, 40]], r"the image 'cats/1\.jpg' is 32x40"),
        ([[9, 9]] * 2, "images are 9x9"),
    ):
        fields = {name: getattr(content, name) for name in ("latents", "names", "fingerprint", "softvq_version")}
        write_latents(path, LatentFile(sizes=torch.tensor(sizes), **fields))
        refuse(message)
    path.write_bytes(path.read_bytes()[:-9])
    refuse("not a whole safetensors file")


@pytest.mark.parametrize("kind", ["memory", "latents"])
def test_what_is_made_is_made_in_the_thread_that_asks(kind: Any) -> None:
    threads: set[threading.Thread] = set()

    def items(start: int, stop: int) -> Iterator[np.ndarray]:
        threads.add(threading.current_thread())
        yield from np.zeros((stop - start, 8, 8, 3), dtype=np.uint8)

    black = in_memory(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), "made")
    made = dataclasses.replace(black, items=items, kind=kind)
    assert sum(len(batch.places) for batch in made.batches(2, workers=3)) == 5
    assert threads == {threading.current_thread()}


def test_huge_images_come_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sets, "BATCH_BYTES", 2 * 3 * 8 * 8)
    batches = list(in_memory(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), "set").batches(4))
    assert [len(batch.places) for batch in batches] == [2, 2, 1]
    larger = in_memory(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "set").batches(4)
    assert [len(batch.places) for batch in larger] == [1, 1]
