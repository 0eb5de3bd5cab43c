"""What the app computes, against the library called by hand."""

import base64
import dataclasses
import io
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.app.photographs import Photographs
from softvq.app.pictures import difference_picture, error_picture, picture_address
from softvq.app.studio import Stopped, Studio
from softvq.app.tokens import DIRECTIONS, TokenDesk
from softvq.data.images import center_crop, to_tensor
from softvq.errors import InputError
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.quantizers import NoneConfig, ResidualConfig, SoftVQConfig
from tests.app import bundled_in, studio_in, tokenizer_of
from tests.program import DIM, MODEL, SIZE, TOKENS, photograph, png

NESTED = dataclasses.replace(MODEL, min_latent_tokens=1)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return studio_in(tmp_path_factory.mktemp("studio"), NESTED)


@pytest.fixture(scope="module")
def desk(studio: Studio) -> TokenDesk:
    return TokenDesk(studio)


def opened(address: str) -> Image.Image:
    assert address.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def pixels(address: str) -> np.ndarray:
    return np.asarray(opened(address).convert("RGB")).astype(int)


def painted(latents: torch.Tensor) -> np.ndarray:
    """Decode by hand, and round as pictures are."""
    with torch.inference_mode():
        images = tokenizer_of(NESTED).decode(latents)[0].clamp(-1, 1)
    return ((images + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(int)


def test_a_reconstruction_is_that_of_the_tokenizer_with_its_figures(studio: Studio) -> None:
    found = studio.reconstruct("bundled-1", 2)
    photo = studio.photographs["bundled-1"]
    copy, original = pixels(found["copy"]), pixels(found["original"])
    assert np.array_equal(copy, painted(photo.latents[:, :2]))
    assert np.array_equal(original, ((photo.image[0] + 1) * 127.5).round().permute(1, 2, 0).numpy())
    assert found["psnr"] == pytest.approx(10 * math.log10(255**2 / ((copy - original) ** 2).mean()), abs=0.05)
    assert found["bytes"] == 2 * 2 * DIM
    assert found["ratio"] == 3 * SIZE * SIZE / (2 * 2 * DIM)
    assert pixels(found["difference"]) == pytest.approx(np.clip(127.5 + copy - original, 0, 255), abs=1.5)
    with pytest.raises(InputError, match="latents are"):
        studio.reconstruct("bundled-1", 0)


def test_pictures_of_errors_are_dark_where_there_are_none_and_the_same_for_the_same_error() -> None:
    target = torch.zeros(3, 4, 4)
    image = target.clone()
    image[:, 0, 0], image[:, 0, 1], image[:, 0, 2] = 0.25, 0.5, 2.0
    errors = np.asarray(error_picture(image, target)).astype(int)
    assert errors[1, 1].tolist() == [11, 13, 32]  # of no error
    assert errors[0, 1].tolist() == errors[0, 2].tolist() == [252, 246, 196]  # from a quarter of black to white
    assert errors[1, 1].sum() < errors[0, 0].sum() < errors[0, 1].sum()
    assert difference_picture(image, target).abs().max() == 1
    assert opened(picture_address(image)).format == "PNG"


def test_between_two_photographs_both_ends_are_reconstructions(studio: Studio) -> None:
    first, last = (studio.photographs[f"bundled-{i}"].latents for i in (0, 3))
    for share in (0.0, 0.25, 1.0):
        found = pixels(studio.between("bundled-0", "bundled-3", share)["picture"])
        assert np.array_equal(found, painted(first + share * (last - first)))


def test_a_dropped_photograph_is_cropped_and_kept_until_others_came(tmp_path: Path) -> None:
    photographs = Photographs(tokenizer_of(NESTED), bundled_in(tmp_path, 1))
    picture = photograph(60, 90, seed=5)
    first = photographs.add(png(picture), "a\x1b[31m.png")
    assert first.name == "a[31m.png"
    assert torch.equal(first.image[0], to_tensor(center_crop(picture, SIZE)))
    assert photographs.add(png(picture), "again.png").key == first.key
    for seed in range(32):
        photographs.add(png(photograph(40, 40, seed=seed)), "b.png")
    with pytest.raises(InputError, match="no longer kept here; drop it"):
        photographs[first.key]
    assert len(photographs._dropped) == 32
    with pytest.raises(InputError, match=r"c\.png: is not a JPEG, PNG or WebP"):
        photographs.add(b"<svg>", "c.png")


def edited(desk: TokenDesk, *edits: dict[str, Any]) -> np.ndarray:
    return pixels(desk.edit("bundled-0", edits)["picture"])


def test_edits_are_those_of_the_latents(studio: Studio, desk: TokenDesk) -> None:
    latents = studio.photographs["bundled-0"].latents
    all_latents = studio.photographs.latents()
    assert np.array_equal(edited(desk), painted(latents))

    def changed(**tokens: torch.Tensor) -> np.ndarray:
        copy = latents.clone()
        for name, value in tokens.items():
            copy[0, int(name[1:])] = value
        return painted(copy)

    assert np.array_equal(edited(desk, {"token": 1, "kind": "zero"}), changed(_1=torch.zeros(DIM)))
    assert np.array_equal(edited(desk, {"token": 1, "kind": "mean"}), changed(_1=all_latents[:, 1].mean(0)))
    other = studio.photographs["bundled-4"].latents
    of_other = edited(desk, {"token": 2, "kind": "photograph", "other": "bundled-4"})
    assert np.array_equal(of_other, changed(_2=other[0, 2]))
    swapped = edited(desk, {"token": 0, "kind": "swap", "other": 3})
    assert np.array_equal(swapped, changed(_0=latents[0, 3], _3=latents[0, 0]))
    two = edited(desk, {"token": 0, "kind": "zero"}, {"token": 3, "kind": "mean"})
    assert np.array_equal(two, changed(_0=torch.zeros(DIM), _3=all_latents[:, 3].mean(0)))
    whole = desk.edit("bundled-0", [])
    assert whole["change"] == 0
    assert (pixels(whole["difference"]) == 128).all()


def test_directions_are_those_of_the_covariance_and_a_step_is_a_deviation(studio: Studio, desk: TokenDesk) -> None:
    of_token = studio.photographs.latents()[:, 2].double()
    values, vectors = np.linalg.eigh(np.cov(of_token.numpy().T))
    _, directions = desk._directions(2)
    for place in range(DIRECTIONS):
        vector = vectors[:, -1 - place] * math.sqrt(values[-1 - place])
        vector *= np.sign(vector @ directions[place].double().numpy())
        assert directions[place].numpy() == pytest.approx(vector, abs=1e-4)
    latents = studio.photographs["bundled-0"].latents.clone()
    latents[0, 2] += 2 * directions[0] - directions[3]
    assert np.array_equal(edited(desk, {"token": 2, "moves": [2, 0, 0, -1.0]}), painted(latents))
    coordinates = torch.tensor([desk.token(f"bundled-{i}", 2)["coordinates"] for i in range(6)])
    assert coordinates.std(0).tolist() == pytest.approx([1.0] * DIRECTIONS, abs=1e-3)
    assert coordinates.mean(0).abs().max() < 1e-3


@pytest.mark.parametrize(
    "edit",
    [{"token": TOKENS}, {"token": -1}, {"token": "1"}, {"token": True}, {}, {"token": 0, "kind": "eval"},
     {"token": 0, "kind": "swap", "other": 99}, {"token": 0, "kind": "photograph", "other": "../x"},
     {"token": 0, "moves": [1] * 5}, {"token": 0, "moves": [1e9]}, {"token": 0, "moves": "1"},
     {"token": 0, "moves": [float("nan")]}],
)  # fmt: skip
def test_edits_that_are_none_are_refused(desk: TokenDesk, edit: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        desk.edit("bundled-0", [edit])


def test_maps_are_those_of_the_attribution(studio: Studio, desk: TokenDesk) -> None:
    found = desk.maps("bundled-2", threading.Event())
    assert len(found["maps"]) == len(found["shares"]) == len(found["colours"]) == TOKENS
    assert sum(found["shares"]) == pytest.approx(1)
    owners = pixels(found["owners"])
    for row in (3, 17):
        token = found["owner"][row][row + 2]
        assert owners[row, row + 2].tolist() == found["colours"][token]
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        desk.maps("bundled-3", stop)
    assert desk.maps("bundled-2", stop) is found


def test_codewords_and_entropy_are_those_of_the_posterior(studio: Studio, desk: TokenDesk) -> None:
    found = desk.token("bundled-1", 3)
    tokenizer = studio.tokenizer
    with torch.inference_mode():
        pre = tokenizer.encode_pre(studio.photographs["bundled-1"].image)
        posterior = tokenizer.quantizer.posterior(pre)[0, 3].double().numpy()
    order = np.argsort(-posterior)
    assert [each["index"] for each in found["codewords"][0]] == order[:8].tolist()
    assert [each["weight"] for each in found["codewords"][0]] == pytest.approx(posterior[order[:8]])
    assert found["entropy"] == pytest.approx(-(posterior * np.log2(posterior)).sum(), abs=1e-6)
    assert found["codebook"] == 16


@pytest.mark.parametrize(
    ("quantizer", "stages"),
    [(ResidualConfig(depth=3, inner=SoftVQConfig(codebook_size=4, num_codebooks=1)), 3), (NoneConfig(), 0)],
)
def test_other_quantizers_tell_what_they_have(quantizer: Any, stages: int, tmp_path: Path) -> None:
    config = dataclasses.replace(NESTED, quantizer=quantizer)
    desk = TokenDesk(Studio(tokenizer_of(config), None, bundled_in(tmp_path, 2)))
    found = desk.token("bundled-0", 0)
    assert len(found["codewords"]) == stages
    assert found["entropy"] is None
    assert all(len(stage) == 4 for stage in found["codewords"])


def test_without_photographs_tokens_have_no_directions() -> None:
    studio = Studio(tokenizer_of(NESTED), None, [])
    key = studio.add(png(photograph()), "a.png")["key"]
    desk = TokenDesk(studio)
    assert desk.token(key, 0)["coordinates"] == []
    assert desk.edit(key, [{"token": 0, "kind": "mean", "moves": [0, 0, 0, 0]}])["psnr"] > 0
    assert studio.about()["generator"] is None
    assert studio.about()["photographs"] == []


@pytest.mark.parametrize("kind", ["sit", "dit", "mar"])
def test_a_picture_is_drawn_step_by_step_and_ends_as_the_pipeline_draws_it(kind: str, tmp_path: Path) -> None:
    studio = studio_in(tmp_path, NESTED, kind)
    pipeline = studio.pipeline
    assert isinstance(pipeline, GenerationPipeline)
    events: list[dict[str, Any]] = []
    studio.generate("bee", 7, 2.0, 3, events.append, threading.Event())
    *previews, last = events
    assert [event["step"] for event in previews] == [1, 2, 3]
    expected = pipeline(["bee"], seed=7, steps=3, guidance=2.0)[0]
    assert np.array_equal(pixels(last["picture"]), ((expected + 1) * 127.5).round().permute(1, 2, 0).numpy())
    if kind != "dit":  # whose first guess is so far off that all of it is clamped
        assert not np.array_equal(pixels(previews[0]["picture"]), pixels(last["picture"]))
    with pytest.raises(InputError, match="did you mean 'bee'"):
        studio.generate("bees", 7, 2.0, 3, events.append, threading.Event())


def test_a_picture_nobody_waits_for_is_not_finished(studio: Studio) -> None:
    stop, shown = threading.Event(), []

    def show(event: dict[str, Any]) -> None:
        shown.append(event)
        if len(shown) == 2:
            stop.set()

    with pytest.raises(Stopped):
        studio.generate("ant", 0, 1.0, 50, show, stop)
    assert len(shown) == 2


def test_the_page_is_told_what_the_models_take(studio: Studio) -> None:
    found = studio.about()
    assert found["tokenizer"] == {"name": "tiny", "tokens": TOKENS, "fewest": 1, "size": SIZE}
    assert found["generator"]["classes"] == ["ant", "bee", "cat"]
    assert found["generator"]["steps"] == 3
    assert [photo["name"] for photo in found["photographs"]] == [f"photo {i}" for i in range(6)]
