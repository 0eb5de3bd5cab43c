"""The generator as a whole: its losses, its folder, its samples, and that it learns."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.guidance import Guidance
from softvq.generators.presets import generator_preset
from softvq.generators.recipe import SamplingRecipe
from softvq.randomness import fold_in, keys_of, normal
from tests.generators import CLASSES, KINDS, TRANSFORMER, build, build_with, make_generator, quick
from tests.program import DIM, TOKENS

SAMPLERS = [("sit", "heun"), ("sit", "euler_maruyama"), ("dit", "ddpm"), ("dit", "ddim"), ("dit", "dpm++_sde")]
SAMPLERS += [("mar", "ddpm")]


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    keys = keys_of(seed, "test", torch.arange(count))
    return normal(fold_in(keys, 99), TOKENS, DIM), torch.arange(count) % len(CLASSES), keys


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the largest number: untrained diffusions give large latents."""
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    assert expected.abs().max() > 0.1
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_losses_of_an_image_do_not_depend_on_its_batch(kind: str) -> None:
    generator, (latents, labels, keys) = build(kind), batch(8)
    whole = generator.losses(latents, labels, keys)
    assert len(whole) == (1 if kind == "sit" else 2)  # the others learn a variance too
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    permuted = generator.losses(latents[order], labels[order], keys[order])
    alone = [generator.losses(latents[i : i + 1], labels[i : i + 1], keys[i : i + 1]) for i in range(8)]
    for name, values in whole.items():
        assert values.shape == (8,)
        assert len(values.unique()) == 8
        torch.testing.assert_close(permuted[name], values[order], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([one[name] for one in alone]), values, atol=1e-5, rtol=1e-5)
    other = generator.losses(latents, labels, keys_of(1, "test", torch.arange(8)))
    assert all(not torch.equal(other[name], values) for name, values in whole.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 0, 0), (0.5, 20, 44), (0.999, 63, 64)])
@torch.no_grad()
def test_hidden_labels_are_as_many_as_asked_for_and_without_effect(
    kind: str, dropout: float, low: int, high: int
) -> None:
    generator, (latents, labels, keys) = build(kind, label_dropout=dropout), batch(64)
    one = torch.stack([*generator.losses(latents, labels, keys).values()])
    other = torch.stack([*generator.losses(latents, (labels + 1) % len(CLASSES), keys).values()])
    ignored = (one == other).all(dim=0)
    assert low <= int(ignored.sum()) <= high
    assert torch.equal(ignored, generator._hidden(keys))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_losses_by_noise(kind: str) -> None:
    generator, found = build(kind), build(kind).losses_by_noise(*batch(4))
    if kind == "mar":
        assert found == {}
        return
    assert list(found) == [f"loss_at_{i}_8" for i in (1, 3, 5, 7)]
    assert all(value.isfinite() for value in found.values())
    assert len({float(value) for value in found.values()}) == 4
    latents, labels, keys = batch(4)
    changed = generator.losses_by_noise(latents, (labels + 1) % 3, keys)  # no label is hidden
    assert all(not torch.equal(changed[name], value) for name, value in found.items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_generator_is_saved_and_loaded_bit_for_bit(kind: str, tmp_path: Path) -> None:
    generator = make_generator(tmp_path, kind)
    loaded = LatentGenerator.from_pretrained(tmp_path)
    assert (loaded.config, loaded.classes, loaded.tokenizer, loaded.sampling) == (
        generator.config,
        CLASSES,
        generator.tokenizer,
        generator.sampling,
    )
    assert not loaded.training
    state = generator.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert loaded.fingerprint() == generator.fingerprint()
    _, labels, keys = batch(3)
    assert torch.equal(loaded.sample(labels, keys), generator.sample(labels, keys))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_a_fingerprint_is_of_weights_and_config() -> None:
    generator = build("sit")
    before = generator.fingerprint()
    assert before == build("sit").fingerprint()
    assert before != build("sit", label_dropout=0.2).fingerprint()
    next(generator.parameters()).data.view(-1)[0] += 1e-3
    assert before != generator.fingerprint()


def edit(folder: Path, change: Any = None, tensors: Any = None) -> None:
    """Change a saved generator's files; its weights then no longer say which config they belong to."""
    weights = load_file(folder / "model.safetensors")
    if tensors:
        tensors(weights)
    save_file(weights, folder / "model.safetensors")
    if change:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "tensors", "message"),
    [
        (None, lambda w: w.pop("network.to_output.bias"), r"1 tensors missing \(network.to_output.bias\)"),
        (None, lambda w: w.update(foreign=torch.zeros(1)), r"1 tensors unexpected \(foreign\)"),
        (None, lambda w: w["network.to_output.bias"].fill_(torch.nan), "not finite"),
        (lambda c: c["model"].update(colour=1), None, "unknown field 'model.colour'"),
        (lambda c: c.update(colour=1), None, "unknown field 'colour'"),
        (lambda c: c.update(classes=["a"]), None, r"there are 1 class names, expected num_classes \(3\)"),
        (
            lambda c: (c["model"].update(num_classes=5), c.update(classes=[])),
            None,
            r"table.weight is \[4, 16\], expected \[6, 16\]",
        ),
        (lambda c: c["model"]["network"].update(kind="unet"), None, "model.network.kind is 'unet'"),
        (lambda c: c["sampling"].update(steps=0), None, "steps is 0"),
        (lambda c: c.update(format="softvq-tokenizer"), None, "expected 'softvq-generator'"),
        (lambda c: c.update(version=2), None, "version is 2, this softvq reads 1"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, change: Any, tensors: Any, message: str) -> None:
    make_generator(tmp_path)
    edit(tmp_path, change, tensors)
    with pytest.raises(InputError, match=message):
        LatentGenerator.from_pretrained(tmp_path)


def test_a_config_of_other_weights_is_refused(tmp_path: Path) -> None:
    make_generator(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "classes": ["bee", "ant", "cat"]}))
    with pytest.raises(InputError, match=r"config\.json is not the one model\.safetensors was saved with"):
        LatentGenerator.from_pretrained(tmp_path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    make_generator(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle, which can run code"):
        LatentGenerator.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_dropout": 0.0}, "guidance is 2, but the generator was trained without label_dropout"),
        ({"condition": "none"}, "guidance is 2, but the generator has no condition"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_needs_hidden_labels(kind: str, fields: dict[str, Any], message: str) -> None:
    _, labels, keys = batch(2)
    generator = build(kind, **fields)
    with pytest.raises(InputError, match=message):
        generator.sample(labels, keys, quick(kind, guidance={"scale": 2.0}))
    assert generator.sample(labels, keys).shape == (2, TOKENS, DIM)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_changes_samples_and_zero_ignores_the_label(kind: str) -> None:
    generator, (_, labels, keys) = build(kind), batch(3)
    plain, guided = (generator.sample(labels, keys, quick(kind, guidance={"scale": scale})) for scale in (1.0, 3.0))
    assert relative(guided, plain) > 1e-3
    other = generator.sample((labels + 1) % 3, keys, quick(kind))
    assert relative(other, plain) > 1e-3
    free = [generator.sample(each, keys, quick(kind, guidance={"scale": 0.0})) for each in (labels, labels.flip(0))]
    assert torch.equal(*free)


@pytest.mark.parametrize("kind", ["sit", "dit"])
def test_autoguidance_with_itself_changes_nothing(kind: str) -> None:
    generator, (_, labels, keys) = build(kind, label_dropout=0.0), batch(3)
    plain, recipe = generator.sample(labels, keys), quick(kind, guidance={"scale": 3.0})
    assert relative(generator.sample(labels, keys, recipe, guide=build(kind, label_dropout=0.0)), plain) < 1e-5
    assert relative(generator.sample(labels, keys, recipe, guide=build(kind, seed=1)), plain) > 1e-3


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("sit", lambda: build("sit", latent_dim=DIM + 1)),
        ("sit", lambda: build("sit", num_tokens=TOKENS + 1)),
        ("sit", lambda: build("dit")),
        ("mar", lambda: build("mar")),
    ],
)
def test_a_guide_of_something_else_is_refused(kind: str, other: Any) -> None:
    _, labels, keys = batch(2)
    with pytest.raises(InputError, match="the guide makes other latents, has other classes, or is of another kind"):
        build(kind).sample(labels, keys, guide=other())


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("dit", {"sampler": "heun"}, "heun"),
        ("mar", {"steps": TOKENS + 1}, f"steps is {TOKENS + 1}, expected at most {TOKENS}, the tokens MAR reveals"),
        ("dit", {"sampler": "ddpm", "steps": 1001}, "steps is 1001"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    _, labels, keys = batch(2)
    with pytest.raises(InputError, match=message):
        build(kind).sample(labels, keys, quick(kind, **fields))


@pytest.mark.parametrize(("kind", "sampler"), SAMPLERS)
def test_fifty_samples_are_the_same_at_batch_1_7_and_50(kind: str, sampler: str) -> None:
    """Must show: an image is a function of its label, seed and recipe, whatever it is made together with."""
    generator, (_, labels, keys) = build(kind), batch(50)
    recipe = quick(kind, sampler=sampler, guidance={"scale": 1.5})
    whole = generator.sample(labels, keys, recipe)
    assert len(whole.flatten(1).unique(dim=0)) == 50
    for size in (7, 1):
        parts = zip(labels.split(size), keys.split(size), strict=True)
        found = torch.cat([generator.sample(label, key, recipe) for label, key in parts])
        assert relative(found, whole) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_colder_recipe_has_less_variety(kind: str) -> None:
    generator, (_, _, keys) = build(kind), batch(32)
    labels = torch.zeros(32, dtype=torch.int64)
    sampler = "ddpm" if kind == "dit" else "auto"
    spreads = []
    for temperature in (1.0, 0.0):
        recipe = quick(kind, sampler=sampler, temperature=temperature)
        if kind == "mar":  # the order of its tokens stays a matter of the seed
            recipe = dataclasses.replace(recipe, steps=1)
        latents = generator.sample(labels, keys, recipe)
        spreads.append(float(latents.std(dim=0).mean() / latents.abs().max()))
    assert spreads[0] > 0.05
    assert spreads[1] < 1e-5


def test_what_a_config_cannot_be() -> None:
    for name, value in (("num_tokens", 0), ("latent_dim", 0), ("num_classes", 0), ("condition_dim", 0)):
        with pytest.raises(InputError, match=f"{name} is 0, expected 1 to"):
            build("sit", **{name: value})
    with pytest.raises(InputError, match=r"label_dropout is 1.0, expected at least 0 and below 1"):
        build("sit", label_dropout=1.0)


TRAINED = 200
TOY = {"sit": {"steps": 10}, "dit": {"steps": 20}, "mar": {"steps": 2, "head_steps": 20}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_is_learned(kind: str) -> None:
    """Two classes, two clusters far apart: samples of a class lie in its cluster, which an untrained one's do not."""
    process = to_dict(generator_preset(f"{kind}-tiny", num_tokens=2, latent_dim=2).process)
    network: dict[str, Any] = {**TRANSFORMER, "width": 32}
    if kind == "mar":
        network = {
            "kind": "mar", "width": 32, "encoder_depth": 1, "decoder_depth": 1, "num_heads": 2, "head_width": 64,
            "head_depth": 2, "condition_tokens": 2,
        }  # fmt: skip
    shape = {"num_tokens": 2, "latent_dim": 2, "num_classes": 2}
    config = from_dict(GeneratorConfig, {**shape, "network": network, "process": process})
    generator = build_with(config, sampling=from_dict(SamplingRecipe, TOY[kind]))
    centres = torch.tensor([[[1.0, -1.0], [1.0, 1.0]], [[-1.0, 1.0], [-1.0, -1.0]]])
    labels, keys = torch.arange(32) % 2, keys_of(7, "sampled", torch.arange(32))

    def distances() -> Tensor:
        return (generator.sample(labels, keys) - centres[labels]).square().mean((1, 2)).sqrt()

    assert distances().median() > 0.5
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=TRAINED)
    for step in range(TRAINED):
        positions = torch.arange(64) + 64 * step
        trained, given = keys_of(0, "toy", positions), positions % 2
        latents = centres[given] + 0.1 * normal(fold_in(trained, 5), 2, 2)
        optimizer.zero_grad()
        torch.stack([*generator.losses(latents, given, trained).values()]).sum(0).mean().backward()
        optimizer.step()
        rates.step()
    found = distances()
    assert (found < 0.6).float().mean() >= 0.9
    assert found.median() < 0.3
    guided = dataclasses.replace(generator.sampling, guidance=Guidance(scale=2.0))
    assert (generator.sample(labels, keys, guided) - centres[labels]).abs().mean() < 0.4
