"""Every kind of bad recipe and data set through the program: exit code, one sentence, and nothing trained."""

from pathlib import Path

import pytest

from tests.program import TOKENS, Program, make_photos, write_recipe


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"))
    return Program(capsys)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.stpes=3", ("unknown field 'train.stpes'", "did you mean 'steps'")),
        ("colour=red", ("unknown field 'colour'",)),
        ("train.steps=many", ("train.steps is 'many'", "a whole number")),
        ("train.steps=true", ("train.steps is True", "a whole number")),
        ("train.steps=0", ("train", "steps is 0", "at least 1")),
        ("train=3", ("train", "3")),
        ("loss.reconstruction=l3", ("loss.reconstruction is 'l3'", "'l2'", "'l1'")),
        ("model.quantizer.kind=soft", ("model.quantizer.kind is 'soft'", "'softvq'")),
        ("model.image_size=33", ("image_size is 33", "multiple of patch_size (8)")),
        ("model.quantizer.num_codebooks=3", ("num_codebooks is 3", f"divisor of num_latent_tokens ({TOKENS})")),
        ("train.accumulate=5", ("accumulate is 5", "divisor of batch_size (2)")),
        ("optim.lr=.nan", ("optim.lr", "a finite number")),
        ("model.quantizer.temperature=-1.0", ("temperature",)),
        ("train.device=abacus", ("'abacus'",)),
        ("data.path=nowhere", ("nowhere",)),
        ("data.path=null", ("data.path",)),
        ("data.path=photos/a.png", ("photos/a.png", "folder")),
        ("nonsense=[", ("nonsense=[", "not a YAML value")),
    ],
)
def test_a_recipe_that_cannot_be(program: Program, override: str, names: tuple[str, ...]) -> None:
    write_recipe(Path("recipe.yaml"), data__path="photos")
    program.refuses("train", "tokenizer", "--config", "recipe.yaml", "--run", "run", override, names=names)
    assert not list(Path("run").glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not plain YAML"),
        ("model: !!python/object/apply:os.system ['true']", "tag"),
        ("a: &x 1\nb: *x", "anchors"),
        ("train: {}\ntrain: {}", "'train' stands twice"),
        ("- 1", "expected named fields"),
        ("", "'model' is missing"),
        ("a: " + "[" * 3000, "not plain YAML"),
        ("\xff", "not UTF-8"),
    ],
)
def test_a_recipe_that_is_no_plain_yaml(program: Program, text: str, message: str) -> None:
    Path("recipe.yaml").write_text(text, encoding="latin-1")
    program.refuses("train", "tokenizer", "--config", "recipe.yaml", "--dry-run", names=("recipe.yaml", message))


def test_a_recipe_that_is_not_there(program: Program) -> None:
    program.refuses("train", "tokenizer", "--config", "no.yaml", names=("no.yaml", "cannot be read"))


def test_bad_photographs_in_a_data_set_are_skipped_until_they_are_too_many(program: Program) -> None:
    Path("photos/zero.jpg").write_bytes(b"")
    write_recipe(Path("recipe.yaml"), data__path="photos", data__max_bad_fraction=0.5)
    command = ("train", "tokenizer", "--config", "recipe.yaml")
    result = program(*command, "--run", "patient")
    assert result.code == 0
    assert "zero.jpg" in result.err
    assert "zero.jpg" in Path("patient/log.jsonl").read_text()
    result = program(*command, "--run", "strict", "data.max_bad_fraction=0.1")
    assert result.code == 3
    assert "zero.jpg" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
