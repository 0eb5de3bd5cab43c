"""From labels to images in Python."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

import softvq
from softvq import hub
from softvq.errors import InputError, RunError
from softvq.generators.generator import LatentGenerator, TokenizerReference
from softvq.generators.guidance import Guidance
from softvq.pipeline import GenerationPipeline, class_numbers, keys_of_images
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.generators import CLASSES, KINDS, build, make_generator, quick
from tests.program import SIZE, Program, make_model


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leave the checks of types out, which users do not have either."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "generator"
    make_generator(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> GenerationPipeline:
    return GenerationPipeline.from_pretrained(folder)


def test_three_lines_make_images(folder: Path) -> None:
    pipeline = softvq.GenerationPipeline.from_pretrained(folder)
    images = pipeline(["bee", 0, "2"], seed=3)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert (images.dtype, images.device.type, images.requires_grad) == (torch.float32, "cpu", False)
    assert images.min() >= -1
    assert images.max() <= 1
    assert images.flatten(1).std(dim=1).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_the_decoded_latents(kind: str, tmp_path: Path) -> None:
    generator = make_generator(tmp_path, kind)
    labels = torch.tensor([0, 1, 2])
    latents = generator.sample(labels, keys_of_images(5, 3))
    with torch.no_grad():
        expected = ImageTokenizer.from_pretrained(tmp_path / "tokenizer").decode(latents).clamp(-1, 1)
    assert torch.equal(GenerationPipeline.from_pretrained(tmp_path)(labels, seed=5), expected)


def test_classes_have_names_and_numbers(pipeline: GenerationPipeline) -> None:
    expected = pipeline([0, 1, 2])
    for labels in (CLASSES, ["0", "1", "2"], torch.tensor([0, 1, 2]), ["ant", 1, "2"]):
        assert torch.equal(pipeline(labels), expected)
    assert not torch.equal(pipeline([1, 1, 2])[0], expected[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["bea"], "'bea' is no class of this generator; did you mean 'bee'?"),
        (["zeppelin"], "'zeppelin' is no class of this generator; it knows ant, bee, cat"),
        ([3], "class 3 is out of range, expected 0 to 2"),
        ([-1], "class -1 is out of range, expected 0 to 2"),
        (["3"], "class 3 is out of range, expected 0 to 2"),
        (torch.tensor([7]), "class 7 is out of range"),
        ([], "expected one label for each image"),
        ([""], "'' is no class"),
    ],
)
def test_a_class_that_is_not_there(pipeline: GenerationPipeline, labels: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        pipeline(labels)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_without_names_have_numbers_only() -> None:
    generator = build("sit")
    assert class_numbers([0, "2"], generator).tolist() == [0, 2]
    with pytest.raises(InputError, match=r"'ant' is no class: this generator's have numbers only, 0 to 2"):
        class_numbers(["ant"], generator)


def test_a_name_made_of_digits_is_a_name_first() -> None:
    named = LatentGenerator(build("sit").config, classes=("2", "1", "0"))
    assert class_numbers(["2", 2], named).tolist() == [0, 2]


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"the tokenizer is [0-9a-f]{12}, the generator was trained on [0-9a-f]{12}"):
        GenerationPipeline.from_pretrained(folder, tokenizer=tmp_path / "other")
    generator = build("sit", num_tokens=5)
    with pytest.raises(InputError, match="the tokenizer has 4 tokens of 8, the generator makes 5 of 8"):
        GenerationPipeline(generator, other)


def test_cards_say_what_is_known_and_what_is_not(folder: Path, tmp_path: Path) -> None:
    pipeline = GenerationPipeline.from_pretrained(folder)
    pipeline.save_pretrained(tmp_path / "both", facts={"Data": "Ants.", "Recipe": "One step:\n\n```yaml\na: 1\n```"})
    for where in ("both", "both/tokenizer"):
        text = (tmp_path / where / "README.md").read_text()
        assert text.startswith("---\nlibrary_name: softvq\ntags: [softvq, image-")
        for name in ("Data", "Recipe", "Figures", "Limits", "Licence"):
            assert len(re.findall(rf"^- \*\*{name}\*\*: \w", text, re.MULTILINE)) == 1
        snippet = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
        softvq.save_image(torch.zeros(3, SIZE, SIZE), tmp_path / "photo.jpg")
        exec(
            snippet.replace("this-folder-or-repository", str(tmp_path / where)).replace(
                "photo.jpg", f"{tmp_path}/photo.jpg"
            )
        )
    text = (tmp_path / "both/README.md").read_text()
    assert "**Data**: Ants.\n" in text
    assert "**Recipe**: One step:\n" in text
    assert text.endswith("\n\n```yaml\na: 1\n```\n")
    assert "**Classes**: ant, bee, cat." in text
    assert f"`tokenizer`, whose latents are `{pipeline.tokenizer.latent_fingerprint()[:12]}`" in text


def test_a_generator_that_names_no_tokenizer_needs_one(tmp_path: Path) -> None:
    build("sit").save_pretrained(tmp_path / "generator")
    make_model(tmp_path / "model")
    with pytest.raises(InputError, match="does not say which tokenizer"):
        GenerationPipeline.from_pretrained(tmp_path / "generator")
    assert (
        GenerationPipeline.from_pretrained(tmp_path / "generator", tokenizer=tmp_path / "model")([0]).isfinite().all()
    )


def test_a_tokenizer_that_is_gone_is_named(tmp_path: Path) -> None:
    make_generator(tmp_path / "generator")
    shutil.rmtree(tmp_path / "generator/tokenizer")
    with pytest.raises(InputError, match=r"the tokenizer of .*generator cannot be loaded: .*tokenizer"):
        GenerationPipeline.from_pretrained(tmp_path / "generator")


def test_a_folder_may_be_moved(folder: Path, pipeline: GenerationPipeline, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert torch.equal(GenerationPipeline.from_pretrained(moved)([0]), pipeline([0]))
    assert torch.equal(GenerationPipeline.from_pretrained(str(moved))([0]), pipeline([0]))


def test_a_seed_for_all_or_for_each(pipeline: GenerationPipeline) -> None:
    labels = [0, 0, 0]
    images = pipeline(labels, seed=4)
    assert len(images.flatten(1).unique(dim=0)) == 3
    assert torch.equal(pipeline(labels, seed=4), images)
    assert not torch.equal(pipeline(labels, seed=5), images)
    each = pipeline(labels, seed=[4, 9, 4])
    torch.testing.assert_close(each[0], images[0], atol=1e-5, rtol=0)  # the image that stands first under seed 4
    torch.testing.assert_close(each[2], each[0], atol=1e-5, rtol=0)
    assert not torch.allclose(each[1], images[1], atol=1e-3)
    with pytest.raises(InputError, match="there are 2 seeds for 3 images"):
        pipeline(labels, seed=[1, 2])


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_size_changes_nothing(pipeline: GenerationPipeline, batch_size: int) -> None:
    labels, done = [0, 1, 2, 0, 1], []
    images = pipeline(labels, seed=1, batch_size=batch_size, progress=done.append)
    torch.testing.assert_close(images, pipeline(labels, seed=1, batch_size=5), atol=1e-5, rtol=0)
    assert sum(done) == 5
    assert max(done) <= batch_size


def test_a_batch_size_of_nothing(pipeline: GenerationPipeline) -> None:
    with pytest.raises(InputError, match="batch_size is 0, expected at least 1"):
        pipeline([0], batch_size=0)


def test_embeddings_are_a_condition(tmp_path: Path) -> None:
    make_generator(tmp_path, condition="embedding", condition_dim=5)
    pipeline = GenerationPipeline.from_pretrained(tmp_path)
    vectors = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    images = pipeline(vectors, recipe=quick("sit", guidance={"scale": 2.0}))
    torch.testing.assert_close(pipeline(vectors.double(), recipe=quick("sit", guidance={"scale": 2.0})), images)
    assert not torch.allclose(pipeline(-vectors, recipe=quick("sit", guidance={"scale": 2.0})), images, atol=1e-3)
    wrong: list[Any] = [[0, 1], vectors[:, :4], vectors[0]]
    for labels in wrong:
        with pytest.raises(InputError, match=r"asked by embeddings: give a tensor \[batch, 5\]"):
            pipeline(labels)


def test_a_generator_without_conditions_makes_as_many_as_asked_for(tmp_path: Path) -> None:
    make_generator(tmp_path, condition="none")
    images = GenerationPipeline.from_pretrained(tmp_path)(["whatever", 3])
    assert len(images.flatten(1).unique(dim=0)) == 2


def test_a_recipe_overrules_the_stored_one(pipeline: GenerationPipeline) -> None:
    stored = pipeline([0, 1])
    assert torch.equal(pipeline([0, 1], recipe=pipeline.generator.sampling), stored)
    assert not torch.equal(pipeline([0, 1], recipe=quick("sit", steps=5)), stored)
    assert not torch.equal(pipeline([0, 1], recipe=quick("sit", guidance={"scale": 3.0})), stored)
    assert not torch.equal(pipeline([0, 1], recipe=quick("sit", temperature=0.5)), stored)


def test_a_guide_leads_away_from_itself(folder: Path, tmp_path: Path) -> None:
    make_generator(tmp_path / "worse", seed=1)
    pipeline = GenerationPipeline.from_pretrained(folder, guide=tmp_path / "worse")
    plain, guided = (pipeline([0, 1], recipe=quick("sit", guidance={"scale": scale})) for scale in (1.0, 3.0))
    assert not torch.allclose(plain, guided, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_near_float32(kind: str, tmp_path: Path) -> None:
    make_generator(tmp_path, kind, process={"kind": "flow"})
    pipeline = GenerationPipeline.from_pretrained(tmp_path)
    full = pipeline([0, 1])
    low = pipeline.to("cpu", "bf16")([0, 1])
    assert low.dtype == torch.float32
    assert 0 < (low - full).abs().max() < 0.1


def test_images_that_are_not_finite_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = GenerationPipeline.from_pretrained(folder)

    def broken(latents: Tensor) -> Tensor:
        return torch.full((len(latents), 3, SIZE, SIZE), torch.nan)

    monkeypatch.setattr(pipeline.tokenizer, "decode", broken)
    with pytest.raises(RunError, match="the images are not finite"):
        pipeline([0])


def test_class_names_must_be_as_many_as_the_classes() -> None:
    with pytest.raises(InputError, match=r"there are 2 class names, expected num_classes \(3\)"):
        LatentGenerator(build("sit").config, classes=("a", "b"), tokenizer=TokenizerReference())


def test_a_pipeline_is_saved_and_found_in_a_repository(
    pipeline: GenerationPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[list[str]] = []

    def push(save: Any, repo_id: str, **options: Any) -> str:
        save(tmp_path / "uploaded")
        uploaded.append(sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")))
        return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(hub, "push", push)
    assert pipeline.push_to_hub("me/flowers") == "https://hub.example/me/flowers"
    assert uploaded == [["uploaded/model.safetensors", "uploaded/tokenizer/model.safetensors"]]
    monkeypatch.setattr(hub, "_download", lambda name, revision: tmp_path / "uploaded")
    assert torch.equal(GenerationPipeline.from_pretrained("me/flowers")([0, 1]), pipeline([0, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_can_be_inspected(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, generator = Program(capsys), make_generator(tmp_path, kind)
    report = json.loads(program("inspect", tmp_path, "--json").out)
    assert report["fingerprint"] == generator.fingerprint()
    assert report["parameters"]["total"] == sum(p.numel() for p in generator.parameters())
    assert sum(report["parameters"].values()) == 2 * report["parameters"]["total"]
    assert report["sampling"]["sampler"] != "auto"
    assert CLASSES[0] in program("inspect", tmp_path).out


@pytest.mark.parametrize(
    ("labels", "seed", "message"),
    [
        ("bee", 0, "labels is 'bee', expected one label for each image"),
        (0, 0, "labels is 0, expected one label"),
        ([None], 0, "None is no class"),
        ([0.5], 0, "0.5 is no class"),
        ([True], 0, "True is no class"),
        (["9" * 5000], 0, "is out of range"),
        (torch.tensor([0.9]), 0, "expected whole numbers"),
        (torch.tensor([[0]]), 0, "expected whole numbers"),
        ([0], "a", "seed is 'a'"),
        ([0], 1.5, "seed is 1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_nonsense_is_refused(pipeline: GenerationPipeline, labels: Any, seed: Any, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        pipeline(labels, seed=seed)


@pytest.mark.usefixtures("unchecked")
def test_seeds_may_be_of_any_whole_kind(pipeline: GenerationPipeline) -> None:
    expected = pipeline([0, 1], seed=[3, 4])
    assert torch.equal(pipeline([0, 1], seed=torch.tensor([3, 4])), expected)
    assert torch.equal(keys_of_images(np.int64(3), 2), keys_of_images(3, 2))


def test_steps_and_guidance_overrule_the_recipe(pipeline: GenerationPipeline) -> None:
    recipe = dataclasses.replace(pipeline.generator.sampling, steps=2, guidance=Guidance(scale=3.0))
    assert torch.equal(pipeline([0, 1], steps=2, guidance=3.0), pipeline([0, 1], recipe=recipe))


@pytest.mark.parametrize("condition", ["class", "embedding"])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_works_and_is_for_good(kind: str, condition: str, tmp_path: Path) -> None:
    make_generator(tmp_path, kind, condition=condition)
    pipeline = GenerationPipeline.from_pretrained(tmp_path)
    wanted = [0, 1] if condition == "class" else torch.randn(2, pipeline.generator.config.condition_dim)
    exact = pipeline(wanted)
    rounded = pipeline.to("cpu", "bf16")(wanted)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1
    with pytest.raises(InputError, match="cannot be undone"):
        pipeline.to("cpu", "fp32")
    with pytest.raises(InputError, match="rounded to bf16"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_guide_of_other_classes_is_refused_at_once(tmp_path: Path) -> None:
    make_generator(tmp_path / "one")
    other = LatentGenerator.from_pretrained(tmp_path / "one")
    other.classes = tuple(reversed(other.classes))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="the guide makes other latents, has other classes"):
        GenerationPipeline.from_pretrained(tmp_path / "one", guide=tmp_path / "other")
