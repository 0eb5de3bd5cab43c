import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from softvq.data.images import (
    center_crop,
    find_images,
    halve,
    random_crop,
    read_image,
    to_image,
    to_tensor,
    upright_rgb,
)
from softvq.errors import InputError
from softvq.randomness import generator
from tests.image_zoo import BAD, ODD, encoded, grey16, photograph, png_header, turned

SIDES = st.integers(1, 90)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    make, reason = BAD[name]
    path = tmp_path / name
    path.write_bytes(make())
    with pytest.raises(InputError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message
    assert message.endswith(("remove it", "raise max_pixels"))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_decoded_right(name: str, tmp_path: Path) -> None:
    make, size, colour = ODD[name]
    path = tmp_path / name
    path.write_bytes(make())
    image = read_image(path)
    assert image.mode == "RGB"
    assert image.size == size
    difference = np.subtract(image.getpixel((0, 0)), colour)
    assert np.abs(difference).max() <= (3 if name.endswith(".jpg") else 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_every_cut_of_a_file_is_refused(kind: str) -> None:
    data = encoded(photograph(), kind)
    tail = 20 if kind == "PNG" else 2  # nothing of the picture lies in the end mark
    for length in range(0, len(data) - tail, max(1, len(data) // 60)):
        with pytest.raises(InputError):
            read_image(data[:length])


@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255))))
def test_mutated_bytes_give_an_image_or_an_input_error(kind: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(photograph(), kind))
    for place, value in changes:
        data[place % len(data)] = value
    with contextlib.suppress(InputError):  # and nothing else
        assert read_image(bytes(data)).mode == "RGB"


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    assert np.asarray(read_image(encoded(grey16())))[..., 0].tolist() == [[0, 40], [156, 255]]  # 40000 / 257 = 155.6


def test_half_transparency_is_mixed_with_white() -> None:
    image = read_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 255, 51))))
    assert image.getpixel((0, 0)) == (204, 204, 255)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_obeyed(orientation: int) -> None:
    data = turned(orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(read_image(data)), np.asarray(expected))


@pytest.mark.parametrize("name", ODD)
def test_a_picture_is_made_upright_once_and_stays_itself(name: str) -> None:
    data = ODD[name][0]()
    opened = Image.open(io.BytesIO(data))
    before = (opened.mode, opened.size, dict(opened.info))
    upright = upright_rgb(opened)
    assert np.array_equal(np.asarray(upright), np.asarray(read_image(data)))
    assert np.array_equal(np.asarray(upright_rgb(upright)), np.asarray(upright))
    assert (opened.mode, opened.size) == before[:2]
    assert opened.info.items() >= before[2].items()
    again = Image.open(io.BytesIO(encoded(upright)))
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(again)), np.asarray(upright))


def test_wide_numbers_are_clipped_to_16_bits() -> None:
    wide = Image.fromarray(np.array([[-5, 257 * 40, 70_000]], dtype=np.int32))
    assert np.asarray(upright_rgb(wide))[0, :, 0].tolist() == [0, 40, 255]


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (lambda: Image.new("F", (4, 4)), "photo: is of mode F"),
        (lambda: Image.new("RGB", (0, 4)), "photo: is 0 x 4 pixels"),
        (lambda: Image.open(io.BytesIO(encoded(photograph(), "JPEG")[:-200])), "photo: is damaged or cut short"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_one_sentence(picture: Callable[[], Image.Image], said: str) -> None:
    with pytest.raises(InputError, match=said):
        upright_rgb(picture(), "photo")


def test_a_broken_note_about_orientation_is_ignored() -> None:
    data = encoded(photograph(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f broken")
    assert read_image(data).size == (48, 32)


def test_pixels_are_counted_before_they_are_decoded() -> None:
    with pytest.raises(InputError, match="21 x 10 pixels, the limit is 200"):
        read_image(png_header(21, 10), max_pixels=200)
    with pytest.raises(InputError, match="cut short"):
        read_image(png_header(20, 10), max_pixels=200)


def test_no_warning_of_pillow_escapes() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(InputError):
            read_image(png_header(10_000, 10_000))  # where Pillow itself warns of a bomb
        for make, *_ in ODD.values():
            read_image(make())
    assert caught == []


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in (("nothing.png", "no such file"), (".", "is a folder"), ("pipe.png", "no such file")):
        with pytest.raises(InputError, match=reason):
            read_image(tmp_path / name)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
def test_tensor_and_image_are_inverse(height: int, width: int, seed: int) -> None:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    tensor = to_tensor(image)
    assert tensor.shape == (3, height, width)
    assert tensor.dtype == torch.float32
    assert torch.equal(tensor, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
    assert np.array_equal(np.asarray(to_image(tensor)), np.asarray(image))


def test_to_image_clamps_and_rounds() -> None:
    values = torch.tensor([-9.0, -1.0, 0.001, 1.0, 9.0]).expand(3, 1, 5)
    assert np.asarray(to_image(values))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@given(SIDES, SIDES, st.integers(1, 40))
def test_center_crop_takes_the_middle_of_an_image_of_any_size(width: int, height: int, size: int) -> None:
    image = photograph(width, height)
    square = center_crop(image, size)
    assert square.size == (size, size)
    if max(width, height) > 16 * min(width, height):
        return  # strips take a shorter way, below
    # ADM's description, step by step: average 2 x 2, resize the shorter side, cut out the middle
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    assert np.array_equal(np.asarray(square), pixels[top : top + size, left : left + size])


def test_a_strip_keeps_its_content() -> None:
    rows = np.linspace(0, 255, 2000).round().astype(np.uint8)
    strip = Image.fromarray(np.repeat(rows[:, None, None], 3, axis=2).repeat(20, axis=1))
    square = np.asarray(center_crop(strip, 20)).astype(int)[..., 0]
    assert np.abs(square - rows[990:1010, None].astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (1, 1)])
def test_extreme_shapes_can_be_cropped(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 200, 30))
    for square in (center_crop(image, 128), random_crop(image, 128, generator(0, "augment", 0))):
        assert square.size == (128, 128)
        assert square.getextrema() == ((10, 10), (200, 200), (30, 30))


@given(SIDES, SIDES, st.integers(1, 40), st.integers(0, 2**40))
def test_random_crop_is_a_square_keyed_by_its_generator(width: int, height: int, size: int, seed: int) -> None:
    image = photograph(width, height)
    first, again = (random_crop(image, size, generator(seed, "augment", 0)) for _ in range(2))
    assert first.size == (size, size)
    assert np.array_equal(np.asarray(first), np.asarray(again))


def test_random_crop_reaches_every_corner_and_length() -> None:
    # red grows to the right and green downwards, so that a crop's pixels say where they come from
    ramp = np.zeros((128, 128, 3), dtype=np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(128), np.arange(128)[:, None]
    starts, spans = [], []
    for draw in range(300):
        pixels = np.asarray(random_crop(Image.fromarray(ramp), 64, generator(0, "augment", draw)).convert("RGB"))
        starts.append(pixels[0, 0, :2])
        spans.append(int(pixels[0, -1, 0]) - int(pixels[0, 0, 0]))
    assert min(spans) <= 103  # 0.8 of 128, less a pixel
    assert min(spans) >= 99
    assert max(spans) >= 125
    assert np.min(starts) <= 1
    assert np.min(np.max(starts, axis=0)) >= 20


@given(SIDES, SIDES, st.integers(1, 30), st.integers(0, 1000))
def test_halving_first_changes_no_crop(width: int, height: int, size: int, seed: int) -> None:
    image = photograph(width, height)
    early = halve(image, math.ceil(size / 0.8))
    expected = random_crop(image, size, generator(seed, "augment", 0))
    assert np.array_equal(np.asarray(random_crop(early, size, generator(seed, "augment", 0))), np.asarray(expected))


def test_find_images_is_sorted_recursive_and_picks_by_suffix(tmp_path: Path) -> None:
    names = ["b/2.JPG", "b/10.webp", "a/x.jpeg", "c.PNG"]
    for name in [*names, "notes.txt", ".hidden/x.jpg", "a/._x.jpg", "d.gif"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert find_images(str(tmp_path / "notes.txt")) == [tmp_path / "notes.txt"]


def test_find_images_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "root")
    assert find_images(tmp_path / "root") == [tmp_path / "root/linked/x.png"]


def test_find_images_refuses_what_holds_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no image"):
        find_images(tmp_path)
