"""`softvq evaluate generation` from the command line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from softvq.commands import evaluate_generation
from softvq.errors import InputError, RunError
from softvq.evaluation.image_sets import in_memory, open_images, pixel_fingerprint
from softvq.evaluation.kept_features import kept_features
from softvq.evaluation.scores import precision_recall
from softvq.pipeline import GenerationPipeline
from tests.generators import make_generator
from tests.looking import DIM, PLACES, inception, network, pictures, save_folder, save_npz
from tests.program import SIZE, Program, contents, make_model, work_beside

N = 24
FIGURES = {
    "frechet_distance", "spatial_frechet_distance", "inception_score", "inception_score_std", "precision", "recall",
    "density", "coverage", "kernel_distance", "kernel_distance_std", "cmmd", "nearest_distance",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_generator(folder / "sit")
    make_generator(folder / "blunt", label_dropout=0.0)
    make_generator(folder / "told", condition="embedding")
    make_model(folder / "other", seed=1)
    real = pictures(40, seed=1, side=SIZE)
    save_folder(folder / "real", real)
    save_folder(folder / "val", pictures(60, seed=2, side=SIZE))
    save_folder(folder / "fake", pictures(N, seed=3, side=SIZE))
    save_folder(folder / "large", pictures(5, seed=4, side=40))
    moved = real.clone()
    moved[:, 0, 0, 0] ^= 1
    save_npz(folder / "alike.npz", moved)
    save_npz(folder / "real.npz", real)
    looked = network(side=SIZE).look_pixels(real)
    arrays = {"arr_0": real.permute(0, 2, 3, 1).numpy()}
    for end, values in (("", looked.features), ("_s", looked.spatial)):
        exact = values.double().numpy()
        arrays |= {f"mu{end}": exact.mean(0), f"sigma{end}": np.cov(exact, rowvar=False)}
    np.savez(folder / "adm.npz", **arrays)
    np.savez(folder / "numbers.npz", **{name: value for name, value in arrays.items() if name != "arr_0"})
    return folder


@pytest.fixture
def program(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    work_beside(made, tmp_path, monkeypatch)
    Path("run").mkdir()
    Path("run/generator").symlink_to(made / "sit")
    monkeypatch.setattr(evaluate_generation, "networks_of", networks)
    return Program(capsys)


def networks(features: list[str], device: torch.device, protocol: str) -> list[Any]:
    if protocol != "folder":
        return [inception(network=network(side=SIZE).network)]
    return [network(side=SIZE, name=name) for name in features]


def evaluate(program: Program, *arguments: object, out: str = "report") -> dict[str, Any]:
    result = program("evaluate", "generation", *arguments, "--features", "net", "--out", out, "--device", "cpu")
    assert result.code == 0, result.err
    assert f"{out}: report.html, generation.json, samples.png" in result.out
    return json.loads(Path(out, "generation.json").read_text())


def features_of(source: str) -> np.ndarray:
    parts = [network(side=SIZE).look_pixels(batch.pixels).features for batch in open_images(source).batches(16)]
    return torch.cat(parts).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Take the eigenvalues of the product of covariances itself, which needs no square root of a matrix."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + cov_a.trace() + cov_b.trace() - 2 * roots)


def test_sets_that_are_alike_and_sets_that_are_not(program: Program) -> None:
    row = evaluate(program, "alike.npz", "real")["rows"][0]
    assert set(row["figures"]) == FIGURES - {"kernel_distance_std"}  # as many of both are one subset
    assert row["figures"]["frechet_distance"] < 1e-3
    assert row["figures"]["precision"] == row["figures"]["recall"] == row["figures"]["coverage"] == 1
    assert row["figures"]["nearest_distance"] < 1e-3
    figures = evaluate(program, "fake", "real", out="other-report")["rows"][0]["figures"]
    assert set(figures) == FIGURES - {"kernel_distance_std"}
    real, fake = features_of("real"), features_of("fake")
    assert figures["frechet_distance"] == pytest.approx(frechet(real, fake), rel=1e-6)
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(fake))
    assert (figures["precision"], figures["recall"]) == found
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (fake, real)]
    closest = (1 - units[0] @ units[1].T).min(1)
    assert figures["nearest_distance"] == pytest.approx(np.sort(closest)[(N - 1) // 2], rel=1e-5)


def test_images_of_the_reference_among_the_samples_are_told(program: Program) -> None:
    fake, real = (torch.cat([batch.pixels for batch in open_images(name).batches(64)]) for name in ("fake", "real"))
    save_npz(Path("mixed.npz"), torch.cat([fake, real[:3]]))
    warnings = evaluate(program, "mixed.npz", "real")["rows"][0]["warnings"]
    assert any("mixed.npz: to net 3 of its 27 images are in the reference too" in warning for warning in warnings)


def test_a_folder_and_the_same_images_in_an_npz_file_are_equal(program: Program) -> None:
    results = [
        evaluate(program, "fake", reference, out=f"report-{len(reference)}") for reference in ("real", "real.npz")
    ]
    assert results[0]["rows"] == results[1]["rows"]
    about = [result["provenance"]["reference"]["pixels"] for result in results]
    assert about[0] == about[1]
    batches = open_images("real").batches(7)
    assert about[0] == pixel_fingerprint(digest for batch in batches for digest in batch.digests)


def test_a_generator_is_swept_and_its_images_are_those_of_softvq_sample(program: Program) -> None:
    options = ("--n", N, "--seed", 5, "--batch-size", 10)
    result = evaluate(program, "sit", "real", *options, "--guidance", 1, 3, "--steps", 2, 4, "--validation", "val")
    assert {path.name for path in Path("report").iterdir()} == {
        "generation.json", "report.html", "samples.png", "sweep.png", "nearest.png",
    }  # fmt: skip
    assert (result["kind"], result["protocol"]) == ("generation", "folder")
    settings = [{"guidance": scale, "steps": steps} for steps in (2, 4) for scale in (1, 3)]
    assert [row["settings"] for row in result["rows"]] == settings
    origin, sampled = result["provenance"], result["provenance"]["samples"]
    for place, (setting, row) in enumerate(zip(settings, result["rows"], strict=True)):
        assert set(row["figures"]) == set(row["labels"]) == FIGURES - {"kernel_distance_std"}
        assert row["labels"]["frechet_distance"] == "Fréchet distance on net"
        assert row["name"] == f"guidance {setting['guidance']}, steps {setting['steps']}"
        if place == 3:
            chosen = [item for name, value in setting.items() for item in (f"--{name}", value)]
            assert program("sample", "sit", f"made-{place}", *options, *chosen).code == 0
            alone = evaluate(program, f"made-{place}", "real", "--validation", "val", out=f"report-{place}")
            assert alone["provenance"]["samples"][0]["pixels"] == sampled[place]["pixels"]
            assert alone["rows"][0]["figures"] == row["figures"]
            assert alone["rows"][0]["ratios"] == row["ratios"]
            recipe = json.loads(Path(f"made-{place}/recipe.json").read_text())
            assert alone["provenance"]["recipe"] == recipe
            assert recipe["recipe"] == origin["recipe"]["recipes"][place]
            assert alone["provenance"]["model"]["fingerprint"] == origin["model"]["fingerprint"]
    pipeline = GenerationPipeline.from_pretrained("sit")
    assert origin["model"] == {
        "name": "sit", "fingerprint": pipeline.generator.fingerprint(), "tokenizer": pipeline.tokenizer.fingerprint(),
    }  # fmt: skip
    assert (origin["recipe"]["n"], origin["recipe"]["seed"]) == (N, 5)
    assert {"softvq", "torch", "timm", "numpy", "pillow"} <= set(origin["versions"])
    assert len({about["pixels"] for about in sampled}) == 4
    page = Path("report/report.html").read_text()
    assert page.count("<img ") == 3
    assert "softvq" in page
    assert pipeline.generator.fingerprint() in page
    with Image.open("report/samples.png") as grid, Image.open("report/sweep.png") as charts:
        assert grid.width > 4 * SIZE
        assert charts.height > 2 * charts.width / 2  # distance, precision and recall


def test_the_stored_recipe_is_the_default(program: Program) -> None:
    result = evaluate(program, "sit", "real", "--n", N)
    stored = GenerationPipeline.from_pretrained("sit").generator.checked()
    assert result["rows"][0]["settings"] == {"guidance": stored.guidance.scale, "steps": stored.steps}
    assert result["provenance"]["recipe"]["recipes"][0]["sampler"] == stored.sampler == "heun"
    assert not Path("report/sweep.png").exists()


def test_validation_photographs_are_the_one_of_the_scale(program: Program) -> None:
    result = evaluate(program, "fake", "real", "--validation", "val")
    places = [(2 * i + 1) * 60 // (2 * N) for i in range(N)]
    own = result["validation"][0]["figures"]
    expected = frechet(features_of("real"), features_of("val")[places])
    assert own["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    row = result["rows"][0]
    assert row["ratios"]["frechet_distance"] == row["figures"]["frechet_distance"] / own["frechet_distance"]
    assert {"frechet_distance", "spatial_frechet_distance"} <= set(row["ratios"])
    assert not {"precision", "inception_score"} & set(row["ratios"])
    assert any("24 of its 60 photographs, evenly spread" in warning for warning in row["warnings"])
    assert result["provenance"]["validation"]["count"] == N
    fewer = evaluate(program, "val", "real", "--validation", "fake", out="fewer")
    warnings = fewer["rows"][0]["warnings"]
    assert any("holds 24 photographs for 60 samples" in warning for warning in warnings)
    as_many = frechet(features_of("real"), features_of("val")[places])  # 24 of the 60 samples
    expected = as_many / fewer["validation"][0]["figures"]["frechet_distance"]
    assert fewer["rows"][0]["ratios"]["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert "even" not in fewer["rows"][0]


def test_what_must_be_known_stands_with_every_row(program: Program) -> None:
    result = evaluate(
        program, "sit", "real", "--n", 9, "--sampler", "euler", "heun", "--steps", 2, "--validation", "fake"
    )
    remarks = [warning for warning in result["rows"][0]["warnings"] if "evenly spread" in warning]
    assert len(remarks) == 1
    assert all(remarks[0] in row["warnings"] for row in result["rows"])
    same = evaluate(program, "fake", "real", "--validation", "fake", out="same")
    assert any("holds the same images as the samples" in warning for warning in same["rows"][0]["warnings"])


def test_figures_are_kept_where_pictures_cannot_be_made(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RunError("no picture")

    monkeypatch.setattr(evaluate_generation, "picture_grid", fails)
    assert program("evaluate", "generation", "fake", "real", "--features", "net", "--out", "report").code != 0
    assert set(contents(Path("report"))) == {"generation.json"}
    assert json.loads(Path("report/generation.json").read_text())["rows"][0]["figures"]["frechet_distance"] > 0


def test_a_recipe_that_is_no_json_is_told_before_anything_is_done(program: Program) -> None:
    Path("odd").mkdir()
    for path in Path("fake").iterdir():
        shutil.copy(path, Path("odd") / path.name)
    Path("odd/recipe.json").write_text('{"n": 24, "model": "m", "loss": NaN}')
    program.refuses("evaluate", "generation", "odd", "real", "--features", "net", names=("no whole JSON", "remove it"))


def test_adms_statistics_stand_for_the_images_they_are_of(program: Program) -> None:
    expected = evaluate(program, "fake", "real")["rows"][0]["figures"]
    result = evaluate(program, "fake", "adm.npz", out="adm")
    assert result["rows"][0]["figures"] == pytest.approx(expected, rel=1e-6)
    assert len(result["provenance"]["reference"]["statistics"]) == 64
    assert Path("adm/nearest.png").is_file()
    figures = evaluate(program, "fake", "numbers.npz", out="numbers")["rows"][0]["figures"]
    assert set(figures) == {"frechet_distance", "spatial_frechet_distance", "inception_score", "inception_score_std"}
    assert not Path("numbers/nearest.png").exists()
    assert (DIM, PLACES) == (6, 4)  # of what the statistics are


def test_what_is_seen_in_the_reference_is_kept(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, look = list[str](), evaluate_generation._seen

    def watched(arguments: Any, images: Any, label: str, *rest: Any) -> Any:
        seen.append(label)
        return look(arguments, images, label, *rest)

    monkeypatch.setattr(evaluate_generation, "_seen", watched)
    real = shutil.copytree("real", "own", symlinks=False)
    plain = evaluate(program, "fake", real)
    keep = ("--keep-features", "kept")
    made, again = (evaluate(program, "fake", real, *keep, out=out) for out in ("made", "again"))
    assert seen == ["reference", "samples", "reference", "samples", "samples"]
    assert plain == made == again  # to the last digit
    seen.clear()
    assert evaluate(program, "alike.npz", real, *keep, out="alike")["rows"][0]["figures"]["frechet_distance"] < 1e-3
    photograph = next(Path(real).rglob("*.png"))
    os.utime(photograph, ns=(1, 1))
    evaluate(program, "fake", real, *keep, out="touched")
    evaluate(program, "fake", real, *keep, "--crop", out="cropped")
    assert seen == ["samples", "reference", "samples", "reference", "samples"]
    with pytest.raises(InputError, match="leave --keep-features out"):
        kept_features(in_memory(pictures(3), "those"), [network()], Path("kept"), list)


def test_photographs_are_cropped_where_asked(program: Program) -> None:
    program.refuses(
        "evaluate", "generation", "fake", "large", "--features", "net", names=("large", "40x40", "32x32", "--crop")
    )
    about = evaluate(program, "fake", "large", "--crop")["provenance"]["reference"]
    assert (about["size"], about["crop"]) == ([SIZE, SIZE], "centre 32 (ADM)")


def test_latents_are_decoded(program: Program) -> None:
    assert program("encode", "other", "real", "real.safetensors").code == 0
    result = evaluate(program, "real.safetensors", "real", "--tokenizer", "other")
    assert result["provenance"]["samples"][0]["count"] == 40
    assert result["rows"][0]["figures"]["frechet_distance"] > 0
    program.refuses("evaluate", "generation", "real.safetensors", "real", "--features", "net", names=("--tokenizer",))


def test_an_interrupted_folder_is_told(program: Program) -> None:
    assert program("sample", "sit", "out", "--n", "12").code == 0
    next(iter(Path("out").glob("0*.png"))).unlink()
    warnings = evaluate(program, "out", "real")["rows"][0]["warnings"]
    assert any("holds 11 images, but its recipe.json speaks of 12" in warning for warning in warnings)
    Path("out/recipe.json").write_text("{")
    program.refuses("evaluate", "generation", "out", "real", "--features", "net", names=("out/recipe.json", "remove"))


def test_several_networks_have_a_row_each(program: Program) -> None:
    result = program("evaluate", "generation", "sit", "real", "--n", N, "--features", "a", "b", "--guidance", 1, 2)
    assert result.code == 0
    rows = json.loads(Path("generation-report/generation.json").read_text())["rows"]
    assert [row["network"] for row in rows] == ["a", "b", "a", "b"]
    assert rows[1]["name"] == "guidance 1, steps 3, b"
    program.refuses(
        "evaluate", "generation", "fake", "adm.npz", "--features", "a", "b", "--out", "x", names=("one network",)
    )


def test_what_is_there_is_left_as_it_is(program: Program) -> None:
    Path("report").mkdir()
    Path("report/sweep.png").write_text("mine")
    before = contents(Path("report"))
    arguments = ("evaluate", "generation", "fake", "real", "--features", "net", "--out", "report")
    program.refuses(*arguments, names=("report", "already there", "--overwrite"))
    assert contents(Path("report")) == before
    assert program(*arguments, "--overwrite").code == 0
    assert not Path("report/sweep.png").exists()  # there was no sweep


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("nowhere", "real"), ("nowhere", "no such folder")),
        (("nowhere.npz", "real"), ("nowhere.npz", "no such file")),
        (("fake", "nowhere"), ("nowhere", "no such file or folder")),
        (("other", "real"), ("format is 'softvq-tokenizer'", "'softvq-generator'")),
        (("told", "real"), ("embeddings",)),
        (("fake", "fake"), ("compared with itself",)),
        (("real.npz", "real"), ("exactly the images of real",)),
        (("fake", "real", "--validation", "real"), ("real: to net every image is one of real",)),
        (("fake", "real", "--guidance", "2"), ("--guidance is for a generator", "fake")),
        (("fake", "real", "--steps", "2"), ("--steps is for a generator", "fake")),
        (("fake", "real", "--sampler", "heun"), ("--sampler is for a generator", "fake")),
        (("fake", "real", "--compile"), ("--compile is for a generator",)),
        (("fake", "real", "--n", "9"), ("--n is for a generator",)),
        (("fake", "real", "--seed", "0"), ("--seed is for a generator",)),
        (("fake", "real", "--tokenizer", "other"), ("--tokenizer", "fake holds images")),
        (("fake", "real", "--size", "16"), ("32x32", "16x16")),
        (("sit", "real", "--size", "16"), ("--size is 16", "32 px")),
        (("sit", "real", "--tokenizer", "other"), ("the generator was trained on",)),
        (("sit", "real", "--steps", "0"), ("steps is 0", "1 to 10000")),
        (("sit", "real", "--guidance", "-1"), ("scale is -1",)),
        (("sit", "real", "--guidance", "nan"), ("scale is nan",)),
        (("sit", "real", "--guidance", "2", "2.0"), ("--guidance has 2 twice",)),
        (("sit", "real", "--n", "1"), ("1 image", "at least 2")),
        (("blunt", "real", "--guidance", "1", "2"), ("guidance is 2", "without label_dropout")),
        (("sit", "adm.npz", "--protocol", "adm-256-train50k", "--n", "9"), ("sit", "9 images", "50000")),
        (("fake", "real", "--protocol", "val50k-center256"), ("fake", "24 images", "50000")),
        (("fake", "real", "--out", "real"), ("real: lies in real",)),
        (("fake", "real", "--out", "real/report"), ("real/report: lies in real",)),
        (("fake", "real", "--out", "fake/report"), ("fake/report: lies in fake",)),
        (("fake", "real", "--validation", "val", "--out", "val/report"), ("lies in val",)),
        (("run", "real"), ("run: is the folder of a run", "run/generator")),
        (("fake", "real", "--out", "x.png"), ("x.png", "folder of results")),
    ],
)
def test_what_cannot_be_is_one_sentence(
    program: Program, arguments: tuple[str, ...], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def latents(*arguments: object, **options: object) -> Tensor:
        raise AssertionError("images were made")

    monkeypatch.setattr(GenerationPipeline, "latents", latents)
    out = () if "--out" in arguments else ("--out", "out")
    given = ("evaluate", "generation", *arguments, "--features", "net", *out, "--device", "cpu")
    program.refuses(*given, names=names)
    assert not Path("out").exists()


def test_a_network_is_needed(program: Program) -> None:
    program.refuses("evaluate", "generation", "fake", "real", names=("--features", "lite0"))


def test_a_cache_of_latents_is_no_generator(program: Program, tmp_path: Path) -> None:
    shutil.copytree("fake", "mixed")
    Path("mixed/cache.json").write_text("{}")
    program.refuses("evaluate", "generation", "mixed", "real", "--features", "net", names=("mixed", "--tokenizer"))
