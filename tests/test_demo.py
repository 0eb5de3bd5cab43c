import shutil
from pathlib import Path

import pytest
import yaml

from softvq.cli import main
from softvq.commands import demo as command
from softvq.commands.demo import ASSETS
from softvq.data.images import read_image
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.program import SIZE, TOKENS, Program, contents, make_photos, write_recipe


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program with a demo of its own: four photographs and the smallest recipe."""
    assets = tmp_path / "assets"
    make_photos(assets / "photos/train", ("a.png", "b.png"))
    make_photos(assets / "photos/val", ("c.png", "d.jpg"))
    write_recipe(assets / "demo.yaml")
    monkeypatch.setattr(command, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    return Program(capsys)


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
    shutil.rmtree(command.ASSETS / "photos")
    program.refuses("demo", "--out", "out", names=("photographs are missing",))


def test_the_bundled_recipe_says_nothing_about_this_machine() -> None:
    recipe = yaml.safe_load((ASSETS / "demo.yaml").read_text())
    assert "path" not in recipe.get("data", {})
    assert "device" not in recipe.get("train", {})


def test_the_help_of_the_demo_needs_no_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    assert "--steps" in capsys.readouterr().out
