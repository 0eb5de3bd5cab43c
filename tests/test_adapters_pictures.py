"""Pictures of torchvision and `datasets` get the latents that the program gives to the same files."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from softvq.adapters import ToTokens, tokenize_images
from softvq.cli import main
from softvq.data.images import center_crop, to_tensor
from softvq.data.latents import read_latents
from softvq.errors import InputError
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.image_zoo import BAD, encoded
from tests.program import DIM, SIZE, TOKENS, make_model, photograph


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph(40, 48), "JPEG", exif=exif)


def see_through(mode: str) -> bytes:
    image = photograph(40, 48).convert("RGBA")
    image.putalpha(photograph(40, 48, 3).convert("L"))
    return encoded(image.convert(mode))


def deep_grey() -> bytes:
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 1 << 16, (40, 48), dtype=np.uint16)))


FILES: dict[str, Callable[[], bytes]] = {
    "plain.png": lambda: encoded(photograph(40, 48)),
    "turned3.jpg": lambda: turned(3),
    "turned5.jpg": lambda: turned(5),
    "turned6.jpg": lambda: turned(6),
    "rgba.png": lambda: see_through("RGBA"),
    "la.png": lambda: see_through("LA"),
    "palette.png": lambda: encoded(photograph(40, 48).quantize(8), transparency=1),
    "grey16.png": deep_grey,
    "cmyk.jpg": lambda: encoded(photograph(40, 48).convert("CMYK"), "JPEG"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where `model`, `photos` and `latents.safetensors` lie, which the program made."""
    folder = tmp_path_factory.mktemp("adapters")
    make_model(folder / "model")
    (folder / "photos").mkdir()
    for name, make in FILES.items():
        (folder / "photos" / name).write_bytes(make())
    names = [str(folder / name) for name in ("model", "photos", "latents.safetensors")]
    assert main(["encode", *names, "--dtype", "float32"]) == 0
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> ImageTokenizer:
    return ImageTokenizer.from_pretrained(folder / "model")


@pytest.fixture
def latents(folder: Path) -> dict[str, Tensor]:
    content = read_latents(folder / "latents.safetensors")
    return dict(zip(content.names, content.latents, strict=True))


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user has, without the checks of signatures that run in tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", FILES)
def test_a_picture_has_the_latents_of_its_file(name, folder, tokenizer, latents):
    with Image.open(folder / "photos" / name) as picture:
        found = ToTokens(tokenizer)(picture)
    torch.testing.assert_close(found, latents[name], atol=1e-5, rtol=1e-5)
    others = [each for other, each in latents.items() if other != name]
    assert min(float((each - found).abs().max()) for each in others) > 1e-3  # so that a wrong one would show
    assert not found.is_inference()


@pytest.mark.parametrize("decoded", [True, False])
def test_rows_of_a_data_set_have_the_latents_of_their_files(decoded, folder, tokenizer, latents):
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    cells = [{"bytes": (folder / "photos" / name).read_bytes(), "path": None} for name in FILES]
    rows = datasets.Dataset.from_dict({"photo": cells}).cast_column("photo", datasets.Image(decode=decoded))
    mapped = rows.map(tokenize_images(tokenizer, "photo"), batched=True, batch_size=4).with_format("torch")
    assert [tuple(latent.shape) for latent in mapped["latents"]] == [(TOKENS, DIM)] * len(FILES)
    for name, found in zip(FILES, mapped["latents"], strict=True):
        torch.testing.assert_close(found.float(), latents[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(32, 32), (40, 48), (100, 33), (20, 12)])
def test_whole_numbers_are_cut_as_pictures_are(size, tokenizer):
    picture = photograph(*size)
    numbers = v2.functional.pil_to_tensor(picture)
    expected = ToTokens(tokenizer)(picture)
    assert torch.equal(expected, tokenizer.encode(to_tensor(center_crop(picture, SIZE))[None]).detach()[0])
    assert torch.equal(ToTokens(tokenizer)(numbers), expected)
    torch.testing.assert_close(ToTokens(tokenizer)(numbers.expand(2, -1, -1, -1))[1], expected)


def test_floats_are_taken_as_they_are(tokenizer):
    cut = to_tensor(center_crop(photograph(40, 48), SIZE))
    expected = ToTokens(tokenizer)(photograph(40, 48))
    assert torch.equal(ToTokens(tokenizer)(cut), expected)
    torch.testing.assert_close(ToTokens(tokenizer)(cut.expand(2, -1, -1, -1))[1], expected)
    scaled = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])])
    whole = v2.Compose([v2.Lambda(lambda picture: center_crop(picture, SIZE)), *scaled.transforms, ToTokens(tokenizer)])
    torch.testing.assert_close(whole(photograph(40, 48)), expected)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(32, 32), r"picture: is a tensor \[32, 32\], expected a PIL image"),
        (torch.zeros(1, 32, 32), r"a tensor \[1, 32, 32\]"),
        (torch.zeros(0, 3, 32, 32), r"a tensor \[0, 3, 32, 32\]"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "int64, expected uint8 from 0 to 255"),
        (torch.zeros(3, 40, 32), "floats are 40x32, expected 32x32; only PIL images and uint8"),
        (torch.full((3, 32, 32), 255.0), "floats reach 255, expected -1 to 1"),
        (torch.full((3, 32, 32), torch.nan), "floats reach nan"),
        (np.zeros((32, 32, 3)), "of type ndarray"),
        (None, "holds no picture"),
        (Image.new("F", (40, 40)), "picture: is of mode F"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_picture_is_one_sentence(wrong, said, tokenizer):
    with pytest.raises(InputError, match=said):
        ToTokens(tokenizer)(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (None, "holds no picture; leave such rows out"),
        ({"bytes": None, "path": "photo.jpg"}, "holds no picture"),
        ({"bytes": BAD["cut.jpg"][0](), "path": None}, "is damaged or cut short"),
        ({"bytes": b"", "path": None}, "is empty"),
        (Image.open(io.BytesIO(BAD["cut.jpg"][0]())), "is damaged or cut short"),
        ("photo.jpg", "is of type str, expected a PIL image"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_row_without_a_picture_is_named(wrong, said, tokenizer):
    with pytest.raises(InputError, match=f"column 'photo', row 1 of a batch: {said}"):
        tokenize_images(tokenizer, "photo")({"photo": [photograph(40, 48), wrong]})


@pytest.mark.usefixtures("unchecked")
def test_columns_that_are_not_there_and_single_rows_are_refused(tokenizer):
    rows = {"image": [photograph(40, 48)], "label": [0]}
    with pytest.raises(InputError, match="no column 'photo', only image, label"):
        tokenize_images(tokenizer, "photo")(rows)
    with pytest.raises(InputError, match="call map with batched=True"):
        tokenize_images(tokenizer)({"image": photograph(40, 48)})
