"""Generated images as a set to be scored, by one process and by two, and what is looked for in it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from softvq.cli import main
from softvq.commands import evaluate_generation
from softvq.data.images import to_image
from softvq.errors import InputError
from softvq.evaluation.generation import (
    FirstPictures,
    best_of,
    generated,
    nearest_references,
    ratios,
    recipe_beside,
    sweep,
    sweep_charts,
)
from softvq.evaluation.image_sets import in_memory, open_images, picked
from softvq.evaluation.set_features import set_features
from softvq.pipeline import GenerationPipeline
from tests.caches import one_sentence
from tests.generators import make_generator
from tests.looking import network, pictures, save_folder, save_npz
from tests.program import SIZE
from tests.ranks import run_as_ranks


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> GenerationPipeline:
    folder = tmp_path_factory.mktemp("generator")
    make_generator(folder)
    return GenerationPipeline.from_pretrained(folder)


def test_images_are_made_one_batch_at_a_time(pipeline: GenerationPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, make = [], GenerationPipeline.latents

    def latents(self: GenerationPipeline, condition: Tensor, keys: Tensor, recipe: Any = None) -> Tensor:
        asked.append(len(condition))
        return make(self, condition, keys, recipe)

    monkeypatch.setattr(GenerationPipeline, "latents", latents)
    images = generated(pipeline, pipeline.generator.checked(), 1000, seed=0, batch_size=8, source="sit")
    first = next(iter(images.batches(8)))
    assert asked == [8]
    assert first.names[:4] == ("000000-ant", "000001-bee", "000002-cat", "000003-ant")
    assert list(images.batches(8, rank=0, ranks=1001)) == []  # that rank has no image
    assert asked == [8]


def test_images_are_those_of_the_pipeline_whichever_rank_makes_them(pipeline: GenerationPipeline) -> None:
    recipe = sweep(pipeline.generator, [2.0], [2])[0]
    images = generated(pipeline, recipe, 11, seed=3, batch_size=4, source="sit")
    painted = pipeline([i % 3 for i in range(11)], seed=3, steps=2, guidance=2.0, batch_size=4)
    expected = [torch.from_numpy(np.array(to_image(image))).permute(2, 0, 1) for image in painted]
    for ranks in (1, 2, 3):
        shares = [batch for rank in range(ranks) for batch in images.batches(3, rank=rank, ranks=ranks)]
        assert torch.equal(torch.cat([batch.places for batch in shares]), torch.arange(11))
        assert torch.equal(torch.cat([batch.pixels for batch in shares]), torch.stack(expected))


def evaluate_as_rank(arguments: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_generation, "networks_of", lambda *_: [network(side=SIZE)])
        assert main(arguments) == 0


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    make_generator(tmp_path / "sit")
    for name, count, seed in (("real", 40, 1), ("val", 60, 2)):
        save_folder(tmp_path / name, pictures(count, seed=seed, side=SIZE))
    given = ["evaluate", "generation", str(tmp_path / "sit"), str(tmp_path / "real"), "--n", "23", "--batch-size", "5"]
    given += ["--steps", "1", "--validation", str(tmp_path / "val"), "--device", "cpu"]
    run_as_ranks(evaluate_as_rank, [*given, "--out", str(tmp_path / "two")])
    evaluate_as_rank([*given, "--out", str(tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "generation.json").read_text()) for name in ("one", "two"))
    for ours, theirs in zip(one["provenance"]["samples"], two["provenance"]["samples"], strict=True):
        assert ours["pixels"] == theirs["pixels"]
    for ours, theirs in zip([*one["rows"], *one["validation"]], [*two["rows"], *two["validation"]], strict=True):
        assert theirs["figures"] == pytest.approx(ours["figures"], rel=1e-6)
    for name in ("samples.png", "nearest.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert two["provenance"]["command"]["ranks"] == 2


@pytest.mark.parametrize("container", ["folder", "npz", "memory"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_picked_images_are_those_at_the_places(tmp_path: Path, container: str, ranks: int) -> None:
    pixels, places = pictures(20), [0, 3, 4, 11, 19]
    if container == "folder":
        images = open_images(save_folder(tmp_path / "set", pixels))
    else:
        images = open_images(save_npz(tmp_path / "set.npz", pixels)) if container == "npz" else in_memory(pixels, "set")
    few = picked(images, places)
    assert few.count == 5
    batches = [batch for rank in range(ranks) for batch in few.batches(2, rank=rank, ranks=ranks)]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), pixels[places])
    assert torch.equal(torch.cat([batch.places for batch in batches]), torch.arange(5))
    whole = [name for batch in images.batches(7) for name in batch.names]
    if container == "folder":
        assert [name for batch in batches for name in batch.names] == [whole[place] for place in places]


def test_the_first_pictures_are_kept(tmp_path: Path) -> None:
    pixels = pictures(20)
    first = FirstPictures(in_memory(pixels, "set"), 7)
    for batch in in_memory(pixels, "set").batches(3):
        first(batch)
    assert torch.equal(first.over_ranks(), pixels[:7])
    assert len(FirstPictures(in_memory(pixels, "set")).over_ranks()) == 20


def test_copies_and_neighbours_are_found() -> None:
    real, fake = pictures(30, seed=1), pictures(12, seed=2)
    fake[4], fake[7] = real[9], real[2]
    seen = [set_features(in_memory(pixels, "set"), [network()])[0] for pixels in (fake, real)]
    found = nearest_references(*seen)
    assert found is not None
    assert found.copies == 2
    assert (found.places[4, 0], found.places[7, 0]) == (9, 2)
    units = [torch.nn.functional.normalize(each.features.double(), dim=1) for each in seen]
    distances = 1 - units[0] @ units[1].T
    assert found.median == pytest.approx(float(distances.amin(1).median()), rel=1e-5)
    assert torch.equal(found.places, distances[:10].topk(4, largest=False).indices)
    assert nearest_references(seen[0], dataclasses.replace(seen[1], features=None)) is None


def test_ratios_are_of_distances_that_are_above_0() -> None:
    figures = {"frechet_distance": 6.0, "kernel_distance": 1.0, "cmmd": 2.0, "precision": 0.5}
    own = {"frechet_distance": 3.0, "kernel_distance": -0.1, "precision": 0.7}
    assert ratios(figures, own) == {"frechet_distance": 2.0}


def test_a_sweep_has_every_combination_once(pipeline: GenerationPipeline) -> None:
    recipes = sweep(pipeline.generator, [1.0, 3.0], [2, 5])
    assert [(recipe.steps, recipe.guidance.scale) for recipe in recipes] == [(2, 1), (2, 3), (5, 1), (5, 3)]
    assert sweep(pipeline.generator, None, None) == [pipeline.generator.checked()]
    both = sweep(pipeline.generator, None, [2, 5], ["heun", "euler"])
    assert [(recipe.sampler, recipe.steps) for recipe in both] == [
        ("heun", 2), ("heun", 5), ("euler", 2), ("euler", 5),
    ]  # fmt: skip
    with pytest.raises(InputError) as error:
        sweep(pipeline.generator, None, [3, 4, 3])
    one_sentence(error, "--steps has 3 twice")


def row(scale: float, steps: int, distance: float, network: str = "net") -> dict[str, Any]:
    figures = {"frechet_distance": distance, "precision": 0.5, "recall": 0.5}
    return {"network": network, "settings": {"guidance": scale, "steps": steps}, "figures": figures, "labels": {}}


def test_charts_have_a_line_for_each_number_of_steps() -> None:
    assert sweep_charts([row(1, 2, 3.0)]) is None
    assert sweep_charts([row(1, 2, 3.0), row(1, 2, 4.0, "other")]) is None
    one, two = [row(1, 2, 3.0), row(2, 2, 4.0)], [row(1, 5, 2.0), row(2, 5, 5.0)]
    charts = [sweep_charts(rows) for rows in (one, [*one, *two], [one[0], two[0]])]
    assert all(isinstance(chart, Image.Image) for chart in charts)
    blue, orange = [[colour in {pixel for _, pixel in chart.getcolors(1 << 24)} for chart in charts]
                    for colour in ((0, 114, 178), (213, 94, 0))]  # fmt: skip
    assert blue == [True, True, True]
    assert orange == [False, True, False]  # the last is a line over the steps


def test_samplers_are_drawn_against_evaluations_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[dict[str, list[tuple[float, float]]], str]] = []
    monkeypatch.setattr(
        "softvq.evaluation.generation.line_chart",
        lambda lines, across, **_: drawn.append((lines, across)) or Image.new("RGB", (8, 8)),
    )
    rows = [row(2, steps, distance) for steps, distance in ((4, 5.0), (2, 9.0), (3, 6.0))]
    for each, sampler in zip(rows, ("heun", "euler", "euler"), strict=True):
        each["settings"]["sampler"] = sampler
    assert sweep_charts(rows) is not None
    assert drawn[0] == ({"heun": [(7.0, 5.0)], "euler": [(2.0, 9.0), (3.0, 6.0)]}, "evaluations of the network")


def test_the_best_row_is_that_of_the_smallest_distance_of_the_first_network() -> None:
    rows = [row(1, 2, 3.0), row(1, 2, 0.1, "other"), row(2, 2, 2.0), row(3, 2, 2.0)]
    assert best_of(rows) is rows[2]


def test_a_recipe_is_read_where_sample_writes_it(tmp_path: Path) -> None:
    (tmp_path / "samples.npz").touch()
    (tmp_path / "other.npz").touch()
    assert recipe_beside(tmp_path, 3) == (None, [])
    (tmp_path / "recipe.json").write_text('{"n": 3}')
    assert recipe_beside(tmp_path, 3) == recipe_beside(tmp_path / "samples.npz", 3) == ({"n": 3}, [])
    assert recipe_beside(tmp_path / "other.npz", 3) == (None, [])
    assert "holds 2 images" in recipe_beside(tmp_path, 2)[1][0]
    for text in ("[]", "{", "\0"):
        (tmp_path / "recipe.json").write_text(text)
        with pytest.raises(InputError) as error:
            recipe_beside(tmp_path, 3)
        one_sentence(error, "recipe.json", "remove it")
