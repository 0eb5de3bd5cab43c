"""`softvq sample` from the command line."""

import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from softvq.arguments import sampling as sampling_arguments
from softvq.generators import sampling
from softvq.generators.recipe import SamplerName
from softvq.pipeline import GenerationPipeline
from tests.generators import CLASSES, make_generator
from tests.program import SIZE, Program, contents, make_model, work_beside


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_generator(folder / "sit")
    make_generator(folder / "blunt", label_dropout=0.0)
    make_generator(folder / "plain", condition="none")
    make_generator(folder / "told", condition="embedding")
    make_generator(folder / "dit", "dit")
    make_generator(folder / "mar", "mar")
    make_model(folder / "other", seed=1)
    return folder


@pytest.fixture
def program(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    work_beside(made, tmp_path, monkeypatch)
    return Program(capsys)


def pictures(folder: str) -> np.ndarray:
    """Return what is in `samples.npz`, and see that the PNG files hold the same."""
    with np.load(f"{folder}/samples.npz") as file:
        assert file.files == ["arr_0"]
        array = file["arr_0"]
    assert (array.dtype, array.shape[1:]) == (np.uint8, (SIZE, SIZE, 3))
    files = sorted(Path(folder).glob("0*.png"))
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), array)
    return array


@pytest.mark.parametrize("model", ["sit", "dit", "mar"])
def test_everything_is_written(program: Program, model: str) -> None:
    result = program("sample", model, "out", "--n", "5", "--seed", "3", "--device", "cpu")
    assert (result.code, result.err) == (0, "")
    assert result.out == "out: 5 images, grid.png, samples.npz, recipe.json\n"
    names = [f"{i:06d}-{CLASSES[i % 3]}.png" for i in range(5)]
    assert {path.name for path in Path("out").iterdir()} == {*names, "grid.png", "samples.npz", "recipe.json"}
    found, pipeline = pictures("out"), GenerationPipeline.from_pretrained(model)
    expected = pipeline([0, 1, 2, 0, 1], seed=3)
    assert np.abs(found - ((expected.permute(0, 2, 3, 1).numpy() + 1) * 127.5)).max() <= 0.51
    record = json.loads(Path("out/recipe.json").read_text())
    assert record["generator"] == pipeline.generator.fingerprint()
    assert record["tokenizer"] == pipeline.tokenizer.fingerprint()
    assert (record["n"], record["seed"], record["precision"], record["guide"]) == (5, 3, "float32", None)
    assert record["recipe"]["sampler"] == {"sit": "heun", "dit": "ddim", "mar": "ddpm"}[model]
    assert record["recipe"]["steps"] == pipeline.generator.sampling.steps
    assert {"softvq", "torch"} <= set(record["versions"])
    with Image.open("out/grid.png") as grid:
        assert grid.width > 3 * SIZE  # a column for each class
        assert grid.height > 2 * SIZE


def test_the_same_seed_makes_the_same_bytes(program: Program) -> None:
    for folder in ("one", "two"):
        assert program("sample", "sit", folder, "--n", "3").code == 0
    assert contents(Path("one")) == contents(Path("two"))
    assert program("sample", "sit", "three", "--n", "3", "--seed", "1").code == 0
    assert not (pictures("three") == pictures("one")).all()


def test_fewer_images_are_the_first_of_more_in_any_batch(program: Program) -> None:
    assert program("sample", "sit", "more", "--n", "8").code == 0
    more = pictures("more").astype(int)
    assert len(np.unique(more.reshape(8, -1), axis=0)) == 8
    for size in ("1", "3", "64"):
        assert program("sample", "sit", f"few-{size}", "--n", "5", "--batch-size", size).code == 0
        assert np.abs(pictures(f"few-{size}") - more[:5]).max() <= 1  # a last bit may fall on either side of a half


def test_classes_are_taken_in_turn(program: Program) -> None:
    assert program("sample", "sit", "out", "--n", "3", "--classes", "cat, 0").code == 0
    files = sorted(path.name for path in Path("out").glob("0*.png"))
    assert files == ["000000-cat.png", "000001-ant.png", "000002-cat.png"]
    assert json.loads(Path("out/recipe.json").read_text())["classes"] == "cat, 0"


def test_the_stored_recipe_is_the_default_and_overruled(program: Program) -> None:
    assert program("sample", "sit", "stored", "--n", "2").code == 0
    same = ("--sampler", "heun", "--guidance", "1", "--temperature", "1.0")  # heun is what auto stands for
    assert program("sample", "sit", "same", "--n", "2", *same).code == 0
    assert contents(Path("stored")) == contents(Path("same"))
    changes = {
        "steps": ("--steps", "4"),
        "guidance": ("--guidance", "3", "--guidance-interval", "0.1", "0.9", "--guidance-schedule", "linear"),
        "shift": ("--shift", "3"),
        "temperature": ("--temperature", "0.5"),
        "sampler": ("--sampler", "euler", "--steps", "3"),
        "guide": ("--guide", "blunt", "--guidance", "2"),
    }
    for name, options in changes.items():
        assert program("sample", "sit", name, "--n", "2", *options).code == 0
        if name != "guide":  # which has the same weights
            assert (pictures(name) != pictures("stored")).any(), name
    record = json.loads(Path("guidance/recipe.json").read_text())["recipe"]["guidance"]
    assert record == {"scale": 3.0, "interval": [0.1, 0.9], "schedule": "linear"}
    assert json.loads(Path("guide/recipe.json").read_text())["guide"] == "blunt"
    assert program("sample", "mar", "head", "--n", "1", "--head-steps", "2").code == 0
    assert json.loads(Path("head/recipe.json").read_text())["recipe"]["head_steps"] == 2


def test_a_generator_without_conditions(program: Program) -> None:
    assert program("sample", "plain", "out", "--n", "2").code == 0
    assert len(pictures("out")) == 2


def test_what_is_there_is_refused_and_left_as_it_is(program: Program) -> None:
    Path("mine").mkdir()
    Path("mine/diary.txt").write_text("mine")
    Path("file").write_text("mine")
    before = contents(Path("mine"))
    program.refuses("sample", "sit", "mine", names=("mine", "already there", "--overwrite"))
    assert contents(Path("mine")) == before
    program.refuses("sample", "sit", "file", names=("file", "folder of pictures"))
    program.refuses("sample", "sit", "file/out", names=("file is a file",))
    program.refuses("sample", "sit", "out.png", names=("out.png", "folder of pictures"))
    assert program("sample", "sit", "mine", "--n", "1", "--overwrite").code == 0
    assert Path("mine/diary.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("sit", "--steps", "0"), ("steps is 0", "1 to 10000")),
        (("sit", "--n", "0"), ("--n", "'0'")),
        (("sit", "--n", "9999999"), ("--n is 9999999", "at most")),
        (("sit", "--batch-size", "0"), ("--batch-size",)),
        (("sit", "--classes", "bea"), ("'bea' is no class", "did you mean 'bee'")),
        (("sit", "--classes", "3"), ("class 3 is out of range", "0 to 2")),
        (("sit", "--classes", ","), ("--classes is empty",)),
        (("plain", "--classes", "0"), ("--classes is given", "no classes")),
        (("told",), ("embeddings", "GenerationPipeline")),
        (("blunt", "--guidance", "2"), ("guidance is 2", "without label_dropout")),
        (("plain", "--guidance", "2"), ("guidance is 2", "has no condition")),
        (("sit", "--guidance", "-1"), ("scale is -1", "0 to 1000")),
        (("sit", "--guidance-interval", "0.9", "0.1"), ("interval is [0.9, 0.1]",)),
        (("sit", "--guidance-schedule", "sudden"), ("--guidance-schedule", "'sudden'")),
        (("sit", "--tokenizer", "other"), ("the tokenizer is", "the generator was trained on")),
        (("sit", "--tokenizer", "nowhere"), ("the tokenizer of sit cannot be loaded", "nowhere")),
        (("sit", "--sampler", "euler"), ("--sampler is euler", "needs --steps", "heun")),
        (("dit", "--sampler", "heun", "--steps", "4"), ("heun",)),
        (("dit", "--sampler", "ddpm", "--steps", "1001"), ("steps is 1001",)),
        (("sit", "--sampler", "leap"), ("--sampler", "'leap'")),
        (("mar", "--steps", "5"), ("steps is 5", "at most 4")),
        (("sit", "--shift", "0"), ("shift is 0",)),
        (("sit", "--temperature", "-1"), ("temperature is -1",)),
        (("sit", "--guide", "dit"), ("the guide makes other latents",)),
        (("sit", "--device", "abacus"), ("'abacus'",)),
        (("nowhere",), ("nowhere", "no such folder")),
        (("other",), ("format is 'softvq-tokenizer'", "'softvq-generator'")),
    ],
)
def test_what_cannot_be_is_one_sentence(program: Program, arguments: tuple[str, ...], names: tuple[str, ...]) -> None:
    model, *options = arguments
    program.refuses("sample", model, "out", *options, names=names)
    assert not Path("out").exists()


def test_a_tokenizer_may_be_named(program: Program) -> None:
    Path("apart").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"sit/{name}", "apart")
    program.refuses("sample", "apart", "out", names=("the tokenizer of apart", "tokenizer"))
    assert program("sample", "apart", "out", "--n", "1", "--tokenizer", "sit/tokenizer").code == 0


def test_what_an_earlier_call_made_is_not_taken_for_this_ones(program: Program) -> None:
    assert program("sample", "sit", "out", "--n", "5").code == 0
    Path("out/notes.txt").write_text("kept")
    Path("out/photo.png").write_bytes(b"kept")
    Path("out/.000001-bee.png.0123abcd.tmp.png").write_bytes(b"left by a call that was killed")
    assert program("sample", "sit", "out", "--n", "2", "--overwrite").code == 0
    assert not list(Path("out").glob(".*"))
    assert len(pictures("out")) == 2
    assert {"notes.txt", "photo.png"} <= {path.name for path in Path("out").iterdir()}


def test_pictures_of_an_interrupted_call_say_how_they_were_made(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    painted: list[int] = []

    def paint(self: GenerationPipeline, latents: Tensor) -> Tensor:
        painted.append(len(latents))
        if len(painted) > 1:
            raise KeyboardInterrupt
        return torch.zeros(len(latents), 3, SIZE, SIZE)

    monkeypatch.setattr(GenerationPipeline, "paint", paint)
    assert program("sample", "sit", "out", "--n", "4", "--batch-size", "2").code == 130
    assert json.loads(Path("out/recipe.json").read_text())["n"] == 4
    assert len(list(Path("out").glob("0*.png"))) == 2


def test_the_command_knows_every_sampler() -> None:
    assert set(sampling_arguments.SAMPLERS) == set(sampling.SAMPLERS)
    assert {"auto", *sampling_arguments.SAMPLERS} == set(get_args(SamplerName))
