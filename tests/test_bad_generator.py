"""Every kind of bad cache, tokenizer and recipe through `softvq train generator`: one sentence, and nothing trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softvq.files import sha256
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.generators import MAR, STEPS, TRANSFORMER, make_cache
from tests.program import Program, contents, make_model, make_photos

TRAIN = ("train", "generator", "--config", "recipe.yaml", "--run", "run")
CACHED = (*TRAIN, "--latents", "cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    make_cache(root, tokenizer="model")
    make_model(root / "other", seed=1)
    make_photos(root / "loose", ("a.png", "b.png"))
    return root


@pytest.fixture
def program(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    write_recipe()
    return Program(capsys)


def write_recipe(network: dict[str, Any] = TRANSFORMER) -> None:
    train = {"batch_size": 2, "steps": STEPS, "log_every": 1, "sample_every": 0, "device": "cpu"}
    sampling = {"steps": 2, "head_steps": 2}
    data = {"model": {"network": network}, "optim": {"lr": 1e-3}, "train": train, "sampling": sampling}
    Path("recipe.yaml").write_text(json.dumps(data))  # which is YAML too


def nothing_was_trained() -> None:
    assert not list(Path().glob("run/checkpoints/*"))
    assert not Path("run/generator").exists()


@pytest.mark.parametrize("network", [TRANSFORMER, MAR], ids=["transformer", "mar"])
def test_a_cache_is_trained_on_and_sampled_from(program: Program, network: dict[str, Any]) -> None:
    write_recipe(network)
    result = program(*CACHED)
    assert (result.code, result.out) == (0, "run/generator\n")
    program.refuses(*CACHED, names=("run: is not empty", "--resume"))
    assert program(*CACHED, "--resume").code == 0
    shutil.move("run/generator", "moved")
    for path in ("model", "cache", "run"):
        shutil.rmtree(path)
    assert program("sample", "moved", "out", "--n", "2").code == 0  # its tokenizer went with it


def test_photographs_are_trained_on_without_a_cache(program: Program) -> None:
    assert program(*TRAIN, "--data", "photos", "--tokenizer", "model").code == 0
    assert program("sample", "run/generator", "out", "--n", "1", "--classes", "bee").code == 0


def test_photographs_without_classes(program: Program) -> None:
    assert program(*TRAIN, "--data", "loose", "--tokenizer", "model").code == 0
    program.refuses("sample", "run/generator", "out", "--classes", "0", names=("no classes",))
    assert program("sample", "run/generator", "out", "--n", "1").code == 0


def test_a_dry_run_writes_nothing(program: Program) -> None:
    before = contents(Path())
    result = program(*CACHED, "--dry-run", "seed=5")
    assert result.code == 0
    assert "seed: 5" in result.out
    assert f"{STEPS} steps of 2 images: {2 * STEPS} images" in result.out
    assert "s/step" in result.out
    assert contents(Path()) == before


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((*TRAIN,), ("nothing to train on", "--latents", "--data and --tokenizer")),
        ((*TRAIN, "--tokenizer", "model"), ("nothing to train on",)),
        ((*TRAIN, "--data", "photos"), ("nothing to train on", "--tokenizer")),
        ((*TRAIN, "--latents", "nowhere"), ("nowhere", "no latent cache", "softvq cache-latents")),
        ((*TRAIN, "--latents", "model"), ("model", "no latent cache")),
        ((*CACHED, "--data", "photos"), ("latents and data.path are both set",)),
        ((*TRAIN, "--data", "nowhere", "--tokenizer", "model"), ("nowhere",)),
        ((*TRAIN, "--data", "photos", "--tokenizer", "nowhere"), ("nowhere", "no such folder")),
        ((*CACHED, "--tokenizer", "other"), ("other", "is not the tokenizer that made the latents")),
        ((*CACHED, "--tokenizer", "nowhere"), ("nowhere",)),
        ((*CACHED, "--resume"), ("run: no such run to resume",)),
        ((*CACHED, "--device", "abacus"), ("'abacus'",)),
        ((*CACHED, "model.num_tokens=5"), ("model.num_tokens is 5", "the latents have 4")),
        ((*CACHED, "model.num_classes=2"), ("num_classes 2", "3 classes")),
        ((*CACHED, "model.preset=sit-z"), ("no generator 'sit-z'",)),
        ((*CACHED, "model.network.widht=8"), ("did you mean 'width'",)),
        ((*CACHED, "model.network.width=18"), ("width is 18",)),
        ((*CACHED, "model.process.kind=magic"), ("model.process.kind is 'magic'",)),
        ((*CACHED, "model.condition=embedding"), ("model.condition is 'embedding'", "docs/generators.md")),
        ((*CACHED, "model.label_dropout=0.0", "sampling.guidance.scale=2.0"), ("without label_dropout",)),
        ((*CACHED, "sampling.steps=0"), ("steps is 0",)),
        ((*CACHED, "sampling.sampler=leap"), ("sampling.sampler is 'leap'",)),
        ((*CACHED, "train.steps=0"), ("steps is 0",)),
        ((*CACHED, "train.batch_size=3", "train.accumulate=2"), ("accumulate is 2",)),
        ((*CACHED, "model=3"), ("model",)),
        ((*TRAIN, "--latents", "cache", "--data", "loose", "latents=null"), ("both",)),
        ((*TRAIN, "--data", "loose", "--tokenizer", "model", "model.condition=class"), ("0 classes", "to none")),
    ],
)
def test_what_cannot_be_is_one_sentence(program: Program, arguments: tuple[str, ...], names: tuple[str, ...]) -> None:
    program.refuses(*arguments, names=names)
    nothing_was_trained()


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        (("sampling.sampler=heun",), ("sampler is heun", "needs a flow")),
        (("sampling.steps=1001",), ("steps is 1001", "1000 timesteps")),
        (("sampling.shift=2.0",), ("shift is 2.0",)),
    ],
)
def test_a_sampler_that_does_not_fit_is_told_before_training(
    program: Program, fields: tuple[str, ...], names: tuple[str, ...]
) -> None:
    program.refuses(*CACHED, "model.process.kind=diffusion", *fields, names=names)
    nothing_was_trained()


def test_a_cache_that_is_not_finished(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, calls = ImageTokenizer.encode, iter([True])

    def interrupted(self: ImageTokenizer, images: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTokenizer, "encode", interrupted)
        assert program("cache-latents", "model", "photos", "half", "--shard-size", "6", "--batch-size", "6").code == 130
    command = (*TRAIN, "--latents", "half")
    program.refuses(*command, names=("half: is not finished (1 of 2 shards", "softvq cache-latents again"))
    nothing_was_trained()
    assert program("cache-latents", "model", "photos", "half", "--shard-size", "6", "--batch-size", "6").code == 0
    assert program(*command).code == 0


def rewrite(path: Path, **changes: Any) -> None:
    """Change tensors of a shard, and the header so that it vouches for them."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **changes}, path, metadata)
    header = json.loads((path.parent / "cache.json").read_text())
    next(shard for shard in header["shards"] if shard["file"] == path.name)["sha256"] = sha256(path)
    (path.parent / "cache.json").write_text(json.dumps(header))


def test_latents_that_are_not_finite(program: Program) -> None:
    path = Path("cache/latents-00001.safetensors")
    latents = load_file(path)["latents"]
    latents[2, 1, 0, 0] = torch.nan
    rewrite(path, latents=latents)
    program.refuses(*CACHED, names=("latents-00001", "not all finite", "softvq cache-latents again"))
    nothing_was_trained()


def test_a_shard_that_was_changed(program: Program) -> None:
    path = Path("cache/latents-00000.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    program.refuses(*CACHED, names=("latents-00000", "SHA-256 differs"))
    path.unlink()
    program.refuses(*CACHED, names=("latents-00000", "is missing"))
    nothing_was_trained()


def test_a_tokenizer_that_is_gone_or_changed(program: Program) -> None:
    shutil.rmtree("model")
    program.refuses(*CACHED, names=("model",))
    make_model(Path("model"), seed=1)
    program.refuses(*CACHED, names=("model: is not the tokenizer that made the latents",))
    nothing_was_trained()


def test_a_folder_of_something_else_is_left_alone(program: Program) -> None:
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("years of work")
    program.refuses(*CACHED, names=("run: is not empty",))
    program.refuses(*CACHED, "--resume", names=("run: is no run to resume", "thesis.txt"))
    assert {path.name for path in Path("run").iterdir()} - {".lock"} == {"thesis.txt"}


def test_a_generator_is_no_tokenizer_and_the_other_way_round(program: Program) -> None:
    assert program(*CACHED).code == 0
    program.refuses(*TRAIN[:4], "--data", "photos", "--tokenizer", "run/generator", names=("softvq-generator",))
    program.refuses("sample", "model", "out", names=("softvq-tokenizer", "softvq-generator"))
