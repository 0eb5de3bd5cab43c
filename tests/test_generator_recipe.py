"""The recipe of a generator: its preset, what the latents decide, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from softvq.commands.train import read_generator_recipe
from softvq.config import from_dict, read_yaml, to_dict
from softvq.errors import InputError
from softvq.generators.generator import LatentGenerator
from softvq.generators.mar import MARConfig
from softvq.generators.presets import generator_preset
from softvq.generators.recipe import SamplingRecipe, resolved
from softvq.training.generator_recipe import GeneratorRunConfig, expand_generator
from tests.generators import KINDS, make_cache, model, run_config
from tests.program import DIM, TOKENS, make_model, make_photos

CONFIGS = sorted((Path(__file__).parents[1] / "configs/generators").glob("*.yaml"))
SHAPE = {"num_tokens": 64, "latent_dim": 32, "num_classes": 5}


def read(data: dict[str, Any], **shape: int) -> GeneratorRunConfig:
    return from_dict(GeneratorRunConfig, expand_generator(data, shape or SHAPE))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_whole(path: Path) -> None:
    settings = from_dict(GeneratorRunConfig, expand_generator(read_yaml(path), SHAPE), str(path))
    expected = generator_preset(path.stem, **SHAPE)  # a recipe is named like its preset
    if "predicts: epsilon" in path.read_text():  # as the papers do
        expected = dataclasses.replace(expected, process=dataclasses.replace(expected.process, predicts="epsilon"))
    if path.stem == "mar-s":  # for few photographs more tokens are shown than in the paper
        assert isinstance(expected.network, MARConfig)
        network = dataclasses.replace(expected.network, min_mask_ratio=0.2, mask_std=0.4)
        expected = dataclasses.replace(expected, network=network)
    assert settings.model == expected
    with torch.device("meta"):
        LatentGenerator(settings.model)
    assert from_dict(GeneratorRunConfig, to_dict(settings)) == settings
    header = path.read_text().split("\n\n")[0]
    assert all(word in header for word in ("softvq train generator", "Hardware:", "Expectation:", "Source:"))


def test_a_preset_is_written_out_and_can_be_overruled() -> None:
    data = {
        "model": {"preset": "dit-s", "label_dropout": 0.2, "network": {"depth": 3}, "process": {"predicts": "clean"}}
    }
    built, named = read(data).model, generator_preset("dit-s", **SHAPE)
    assert built.network == dataclasses.replace(named.network, depth=3)
    assert built.process == dataclasses.replace(named.process, predicts="clean")
    assert built.label_dropout == 0.2
    assert (built.num_tokens, built.latent_dim, built.num_classes) == (64, 32, 5)


def test_a_process_of_another_kind_replaces_the_presets() -> None:
    assert read({"model": {"preset": "mar-s", "process": {"kind": "flow"}}}).model.process.kind == "flow"


def test_without_a_preset_the_latents_still_decide() -> None:
    built = read({"model": {"network": model("sit")["network"]}}).model
    assert (built.num_tokens, built.latent_dim, built.num_classes, built.network.width) == (64, 32, 5, 16)


def test_latents_without_classes_make_a_generator_without_conditions() -> None:
    shape = {"num_tokens": 64, "latent_dim": 32}
    assert read({"model": {"preset": "sit-s"}}, **shape).model.condition == "none"
    assert read({"model": {"preset": "sit-s", "condition": "class"}}, **shape).model.condition == "class"
    assert read({"model": {"preset": "sit-s"}}).model.condition == "class"


def test_more_classes_than_the_latents_have_may_be_asked_for() -> None:
    assert read({"model": {"preset": "sit-s", "num_classes": 9}}).model.num_classes == 9


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"model": {"preset": "sit-s", "num_tokens": 65}},
            r"model.num_tokens is 65, but the latents have 64; leave",
        ),
        ({"model": {"preset": "sit-s", "latent_dim": 4}}, r"model.latent_dim is 4, but the latents have 32"),
        ({"model": {"preset": "sit-z"}}, r"there is no generator 'sit-z', expected one of sit-tiny"),
        ({"model": {"preset": 3}}, r"model.preset is 3, expected a name such as 'sit-s'"),
        ({"model": 3}, "model"),
        ({"model": {"preset": "sit-s", "network": {"widht": 3}}}, "did you mean 'width'"),
        ({"model": {"preset": "sit-s", "condition": "embedding"}}, "needs a loop of your own"),
        ({"model": {"preset": "sit-s", "condition": "none"}, "sampling": {"guidance": {"scale": 2.0}}}, "no condition"),
        (
            {"model": {"preset": "sit-s", "label_dropout": 0.0}, "sampling": {"guidance": {"scale": 2.0}}},
            "guidance is 2, but the generator was trained without label_dropout",
        ),
        ({"model": {"preset": "mar-s"}, "sampling": {"steps": 65}}, "steps is 65, expected at most 64"),
        ({"model": {"preset": "sit-s"}, "latents": "a", "data": {"path": "b"}}, "latents and data.path are both set"),
        ({"model": {"preset": "sit-s"}, "train": {"ema_lengths": [0.9]}}, "ema_lengths is 0.9"),
    ],
)
def test_a_recipe_that_cannot_be(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(data)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_the_sampler_of_the_kind(kind: str) -> None:
    config = run_config(kind).model
    recipe = SamplingRecipe(steps=2)
    assert resolved(recipe, config).sampler == {"sit": "heun", "dit": "ddim", "mar": "ddpm"}[kind]
    flowing = run_config(kind, model=model(kind, process={"kind": "flow"})).model
    assert resolved(recipe, flowing).sampler == ("euler" if kind == "mar" else "heun")
    named = dataclasses.replace(recipe, sampler="dpm++")
    assert resolved(named, config) == named


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps is 0, expected 1 to 10000"),
        ({"head_steps": 0}, "head_steps is 0, expected 1 to 10000"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"sampler": "leap"}, "sampler is 'leap'"),
        ({"guidance": {"interval": [0.5, 0.1]}}, r"interval is \[0.5, 0.1\]"),
    ],
)
def test_a_way_to_sample_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(SamplingRecipe, fields)


def test_a_recipe_file_takes_its_shape_from_the_cache_or_the_photographs(tmp_path: Path) -> None:
    make_cache(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: {preset: sit-tiny}\n")
    sources: list[dict[str, Any]] = [
        {"latents": str(tmp_path / "cache")},
        {"data.path": str(tmp_path / "photos"), "tokenizer": str(tmp_path / "model")},
    ]
    for changes in sources:
        built = read_generator_recipe(tmp_path / "recipe.yaml", ["seed=3"], changes)
        assert (built.model.num_tokens, built.model.latent_dim, built.model.num_classes) == (TOKENS, DIM, 3)
        assert (built.model.condition, built.seed) == ("class", 3)
    with pytest.raises(InputError, match="there is nothing to train on: give --latents, or --data and --tokenizer"):
        read_generator_recipe(tmp_path / "recipe.yaml", [], {"tokenizer": str(tmp_path / "model")})


def test_photographs_of_no_class_train_without_conditions(tmp_path: Path) -> None:
    make_photos(tmp_path / "photos", ("a.png", "b.png"))
    make_model(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("model: {preset: sit-tiny}\n")
    changes = {"data.path": str(tmp_path / "photos"), "tokenizer": str(tmp_path / "model")}
    assert read_generator_recipe(tmp_path / "recipe.yaml", [], changes).model.condition == "none"


def test_fields_left_out_are_those_of_dit() -> None:
    part = read({"model": {"preset": "sit-tiny"}, "optim": {"lr": 1e-3}, "data": {"num_workers": 1}})
    assert (part.optim.lr, part.optim.betas, part.optim.schedule) == (1e-3, (0.9, 0.999), "constant")
    assert (part.data.crop, part.data.num_workers) == ("center", 1)


def test_without_classes_nothing_is_guided() -> None:
    guided = {"model": {"preset": "sit-tiny"}, "sampling": {"steps": 7, "guidance": {"scale": 2.0}}}
    assert read(guided).sampling.guidance.scale == 2.0
    found = read(guided, num_tokens=64, latent_dim=32)
    assert (found.model.condition, found.sampling.guidance.scale, found.sampling.steps) == ("none", 1.0, 7)
