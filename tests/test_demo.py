import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from softvq import hub, pretrained
from softvq.cli import main
from softvq.commands import demo as command
from softvq.commands import demo_photos
from softvq.commands.demo_photos import ASSETS
from softvq.config import from_dict
from softvq.data.images import read_image, to_tensor
from softvq.errors import InputError
from softvq.evaluation.attribution import token_attribution
from softvq.evaluation.demo_page import (
    DemoParts,
    FewerTokens,
    demo_page,
    demo_pictures,
    fewer_tokens,
    interpolated,
    token_pictures,
)
from softvq.evaluation.metrics import psnr
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import TokenizerReference
from softvq.losses.perceptual import PerceptualDistance
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.generators import CLASSES, build_with, make_generator, model, quick
from tests.program import DIM, MODEL, SIZE, TOKENS, Program, Result, contents, make_photos, photograph, write_recipe

PATHS = ("demo.html", "reconstructions.png", "interpolation.png", "tokens.png")


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with a demo of its own: four photographs, the smallest recipe, and no bundled model."""
    assets = tmp_path / "assets"
    make_photos(assets / "photos/train", ("a.png", "b.png"))
    make_photos(assets / "photos/val", ("c.png", "d.jpg"))
    write_recipe(assets / "demo.yaml")
    monkeypatch.setattr(demo_photos, "ASSETS", assets)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    return Program(capsys)


def nested(**changes: Any) -> ImageTokenizer:
    """Return a tokenizer with random weights that decodes any number of its first tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTokenizer(dataclasses.replace(MODEL, **{"min_latent_tokens": 1, **changes})).eval()


def bundle(tokenizer: ImageTokenizer, name: str = "photos-64") -> Path:
    """Save a model where bundled ones are."""
    tokenizer.save_pretrained(pretrained.FOLDER / name)
    return pretrained.FOLDER / name


def shown(program: Program, *more: str) -> tuple[Result, list[str], str]:
    """Run the demo of bundled models; return the result, the names it printed and the page."""
    result = program("demo", "--out", "out", "--device", "cpu", *more)
    assert result.code == 0, result.err
    printed = [line for line in result.out.splitlines() if line.startswith("/")]
    assert all(Path(path).is_file() for path in printed)
    return result, [Path(path).name for path in printed], Path("out/demo.html").read_text()


def examples(tokenizer: ImageTokenizer, distance: PerceptualDistance | None) -> tuple[Any, Any, list[FewerTokens]]:
    """Return two photographs, their latents, and what comes back of them."""
    images = torch.stack([to_tensor(photograph(SIZE, SIZE, seed)) for seed in (1, 2)])
    with torch.inference_mode():
        latents = tokenizer.encode(images)
    return images, latents, fewer_tokens(tokenizer, images, latents, ["a<b", "c"], ["by & by", ""], distance)


def test_a_demo_of_a_given_number_of_steps(program: Program) -> None:
    result = program("demo", "--out", "out", "--steps", "3", "--device", "cpu")
    assert result.code == 0, result.err
    assert "training 3 steps" in result.err
    assert "2 held-out photographs" in result.out
    assert all(word in result.out for word in ("mean PSNR", "mean colours", "gain"))
    printed = [line for line in result.out.splitlines() if line.startswith("/")]
    assert printed == [str(Path("out", name).resolve()) for name in ("demo.html", "demo.png", "tokenizer")]
    page = Path("out/demo.html").read_text()
    assert all(word in page for word in ("c.png", "d.jpg", "softvq demo --steps 3 --seed 0"))
    assert read_image(Path("out/demo.png")).width > 2 * SIZE
    assert ImageTokenizer.from_pretrained("out/tokenizer").config.num_latent_tokens == TOKENS


def test_the_same_seed_gives_the_same_demo(program: Program) -> None:
    for out, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert program("demo", "--out", out, "--steps", "2", "--seed", seed, "--device", "cpu").code == 0
    one, two, three = (contents(Path(out, "tokenizer")) for out in ("one", "two", "three"))
    assert one == two
    assert one["model.safetensors"] != three["model.safetensors"]
    assert Path("one/demo.png").read_bytes() == Path("two/demo.png").read_bytes()


def test_a_second_demo_replaces_the_first(program: Program) -> None:
    for seed in (1, 2):
        assert program("demo", "--out", "out", "--steps", "1", "--seed", seed, "--device", "cpu").code == 0
    assert "--seed 2" in Path("out/demo.html").read_text()


def test_a_demo_that_cannot_be(program: Program) -> None:
    Path("taken").write_text("a file")
    program.refuses("demo", "--out", "taken/out", "--steps", "1", names=("taken/out", "is a file"))
    program.refuses("demo", "--out", "out", "--steps", "1", "--device", "abacus", names=("'abacus'",))
    shutil.rmtree(demo_photos.ASSETS / "photos")
    program.refuses("demo", "--out", "out", names=("photographs are missing",))


def test_the_bundled_recipe_says_nothing_about_this_machine() -> None:
    recipe = yaml.safe_load((ASSETS / "demo.yaml").read_text())
    assert "path" not in recipe.get("data", {})
    assert "device" not in recipe.get("train", {})


def test_the_help_of_the_demo_needs_no_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    assert "--steps" in capsys.readouterr().out


def test_a_demo_of_a_bundled_tokenizer_trains_nothing(program: Program) -> None:
    bundle(nested())
    result, names, page = shown(program)
    assert names == list(PATHS)
    assert "training" not in result.err
    parts = ("loading", "reconstructions", "interpolation", "what each token paints", "drawing", "total")
    assert all(re.search(rf"{part} +\S +\d+\.\d", result.out) for part in parts), result.out
    assert "samples" not in result.out
    assert page.count("<img") == 2 * (1 + 3) + 7 + 3 + TOKENS
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img")
    assert not re.search(r"https?:", page)
    words = ("1 tokens, 192 : 1", "2 tokens, 96 : 1", "4 tokens, 48 : 1", "ST-LPIPS", "from c to d", "2 of 2 bundled")
    assert all(word in page for word in words), page[-2000:]
    assert "softvq demo --seed 0 --device cpu" in page
    assert not Path("out/tokenizer").exists()


def test_training_on_request_where_a_model_is_bundled(program: Program) -> None:
    bundle(nested())
    for flags, steps in ((("--train",), 2), (("--train", "--steps", "3"), 3), (("--steps", "1"), 1)):
        result = program("demo", "--out", "out", "--device", "cpu", *flags)
        assert result.code == 0, result.err
        assert f"training {steps} steps" in result.err
        assert Path("out/tokenizer/config.json").is_file()


def own_tokenizer() -> None:
    make_generator(pretrained.FOLDER / "flowers-dit", "dit")


def shared_tokenizer() -> None:
    reference = TokenizerReference(name="elsewhere/tokenizer", fingerprint=nested().latent_fingerprint())
    config = from_dict(GeneratorConfig, model("dit"))
    generator = build_with(config, classes=CLASSES, tokenizer=reference, sampling=quick("dit"))
    generator.save_pretrained(pretrained.FOLDER / "flowers-dit")


@pytest.mark.parametrize("make", [own_tokenizer, shared_tokenizer])
def test_a_bundled_generator_shows_a_row_for_each_class(program: Program, make: Callable[[], None]) -> None:
    bundle(nested())
    make()
    result, names, page = shown(program)
    assert names == [*PATHS, "samples.png"]
    assert re.search(r"samples +\S +\d+\.\d", result.out)
    headings = re.findall(r"<h2>(\w+)</h2>", page.partition("<h2>New images</h2>")[2])
    assert headings == list(CLASSES)
    assert page.partition("<h2>New images</h2>")[2].count("<img") == 4 * len(CLASSES)
    first = Path("out/samples.png").read_bytes()
    shown(program, "--seed", "1")
    assert Path("out/samples.png").read_bytes() != first
    shown(program)
    assert Path("out/samples.png").read_bytes() == first
    shutil.rmtree(pretrained.FOLDER / "flowers-dit")
    assert "New images" not in shown(program)[2]
    assert not Path("out/samples.png").exists()


def test_without_its_package_the_perceptual_distance_is_left_out(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> PerceptualDistance:
        raise InputError("the package is not installed")

    monkeypatch.setattr(command, "load_perceptual", missing)
    bundle(nested())
    result, _, page = shown(program)
    assert "ST-LPIPS is left out: the package is not installed" in result.err.splitlines()
    assert "PSNR" in page
    assert "LPIPS" not in page


def test_a_tokenizer_that_needs_all_its_tokens(program: Program) -> None:
    bundle(nested(min_latent_tokens=None))
    page = shown(program)[2]
    assert f"The same photograph from {TOKENS} tokens" in page
    assert "first tokens" not in page


def test_a_demo_of_a_broken_tokenizer(program: Program) -> None:
    folder = bundle(nested())
    (folder / "model.safetensors").write_bytes(b"torn")
    assert "model.safetensors" in program("demo", "--out", "out", "--device", "cpu").err
    assert not Path("out").exists()


def test_bundled_models_load_by_name(program: Program, tmp_path: Path) -> None:
    assert pretrained.bundled("photos-64") is None
    program.refuses("inspect", "photos-64", names=("photos-64", "no such folder"))
    folder = bundle(nested())
    assert pretrained.bundled("photos-64") == folder == hub.locate("photos-64")
    assert ImageTokenizer.from_pretrained("photos-64").fingerprint() == nested().fingerprint()
    (pretrained.FOLDER / "config.json").write_text("{}")
    for name in ("", ".", "..", "../pretrained", "photos-64/", "a/photos-64", str(folder), "photos-64\n", "a" * 5000):
        assert pretrained.bundled(name) is None, name
    Path("photos-64").mkdir()  # a folder of that name goes first
    assert hub.locate("photos-64") == Path("photos-64")


def test_figures_are_those_of_the_first_tokens() -> None:
    tokenizer, distance = nested(), PerceptualDistance((4, 8), (1, 1))
    images, latents, items = examples(tokenizer, distance)
    assert [list(item.copies) for item in items] == [[1, 2, 4]] * 2
    for place, item in enumerate(items):
        for n in (1, 2, 4):
            with torch.inference_mode():
                copy = tokenizer.decode(latents[place : place + 1, :n]).clamp(-1, 1)
                target = images[place : place + 1]
                assert item.psnr[n] == pytest.approx(psnr(copy, target).item(), rel=1e-5)
                assert item.distance[n] == pytest.approx(distance(copy, target).item(), rel=1e-3)
            assert item.compression[n] == 3 * SIZE * SIZE / (n * DIM * 2)
            assert np.abs(np.asarray(item.copies[n]) - (copy[0].permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 1


def test_interpolation_is_straight_and_has_both_ends() -> None:
    tokenizer = nested()
    first, last = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    between = interpolated(tokenizer, first, last)
    with torch.inference_mode():
        wanted = tokenizer.decode(torch.stack([first, (2 * first + last) / 3, (first + last) / 2, last])).clamp(-1, 1)
    assert between.shape == (7, 3, SIZE, SIZE)
    torch.testing.assert_close(between[[0, 2, 3, 6]], wanted)


def test_tokens_are_compared_with_their_mean() -> None:
    tokenizer = nested()
    _, latents, items = examples(tokenizer, None)
    found = token_pictures(tokenizer, items[1], latents, 1)
    owners = token_attribution(tokenizer, latents[1:], latents.mean(0))[0].argmax(0)
    assert found.shares == pytest.approx([(owners == token).double().mean().item() for token in range(TOKENS)])
    assert sum(found.shares) == pytest.approx(1)
    assert len(found.maps) == TOKENS
    assert found.name == "c"


def test_what_strangers_wrote_is_escaped_on_the_page() -> None:
    tokenizer = nested()
    _, latents, items = examples(tokenizer, None)
    between = interpolated(tokenizer, latents[0], latents[1])
    tokens = token_pictures(tokenizer, items[0], latents, 0)
    parts = DemoParts(photographs=items, ends=("a<b", "c"), between=between, tokens=tokens)
    page = demo_page("One & all", parts, {"Model": "<script>"})
    assert all(text in page for text in ("a&lt;b", "by &amp; by", "One &amp; all", "&lt;script&gt;"))
    assert "a<b" not in page
    assert "<script" not in page
    assert list(demo_pictures(parts)) == list(PATHS[1:])
