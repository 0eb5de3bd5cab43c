"""`softvq evaluate reconstruction` from the command line."""

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from softvq.backbones import load_backbone
from softvq.cli import main
from softvq.commands.common import round_trip
from softvq.data.images import center_crop, read_image, to_image, to_tensor
from softvq.evaluation.extractors import extractor
from softvq.evaluation.image_sets import open_images, pixel_fingerprint
from softvq.evaluation.metrics import psnr
from softvq.evaluation.set_features import set_features
from softvq.evaluation.set_figures import set_figures
from softvq.files import write_tensors
from softvq.losses.perceptual import PerceptualDistance
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.program import MODEL, SIZE, Program, contents, make_model, photograph, work_beside
from tests.ranks import run_as_ranks
from tests.test_page import Page

COUNT = 9
NAMES = [f"{'sub/' if number % 2 else ''}{number:02}.{'jpg' if number % 3 else 'png'}" for number in range(COUNT)]
NETWORK = "test_resnet"
COMMAND = ("evaluate", "reconstruction", "model", "photos", "--device", "cpu")
GIVEN = ("evaluate", "reconstruction", "-", "photos", "--device", "cpu", "--perceptual", "none")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tokenizer = make_model(folder / "model")
    (folder / "back" / "sub").mkdir(parents=True)
    (folder / "photos" / "sub").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        photograph(40 + number, 48, seed=number).save(folder / "photos" / name)
        image = to_tensor(center_crop(read_image(folder / "photos" / name), SIZE))
        (back,) = round_trip(tokenizer, image[None], "float32")
        to_image(back).save((folder / "back" / name).with_suffix(".png"))
    pictures = [read_image(path) for path in sorted((folder / "back").rglob("*.png"))]
    np.savez(folder / "back.npz", arr_0=np.stack([np.asarray(picture) for picture in pictures]))
    network = load_backbone(NETWORK, image_size=32, pretrained=False).network
    write_tensors(folder / "network.safetensors", network.state_dict())
    write_tensors(folder / "distance.safetensors", PerceptualDistance(seed=3).state_dict())
    return folder


@pytest.fixture
def program(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    work_beside(made, tmp_path, monkeypatch)
    return Program(capsys)


def result_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "reconstruction.json").read_text())


def figures_of(folder: str, name: str = "images") -> dict[str, float]:
    return next(row["figures"] for row in result_of(folder)["rows"] if row["name"] == name)


def known(made: Path) -> dict[str, dict[str, float]]:
    """Compare the pictures by scikit-image."""
    found = {}
    for name in NAMES:
        a = np.asarray(center_crop(read_image(made / "photos" / name), SIZE))
        b = np.asarray(read_image((made / "back" / name).with_suffix(".png")))
        gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        found[name] = {
            "psnr": peak_signal_noise_ratio(a, b, data_range=255),
            "ssim": structural_similarity(a, b, data_range=255, **gaussian),
        }
    return found


def test_figures_and_files(program: Program, made: Path) -> None:
    result = program(*COMMAND, "--perceptual", "st-lpips=distance.safetensors", "--out", "out", "--worst", "4")
    assert result.code == 0
    assert "9 images are too few for intervals" in result.err
    assert "mean colour of each photograph is nearer" in result.err  # the model has learned nothing
    files = ["images.csv", "reconstruction.json", "report.html", "worst-st-lpips.png", "worst.png"]
    assert sorted(path.name for path in Path("out").iterdir()) == files
    assert "out: report.html" in result.out
    expected = known(made)
    with Path("out/images.csv").open() as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert sorted(table) == sorted(NAMES)
    for name, figures in expected.items():
        for key, value in figures.items():
            assert float(table[name][key]) == pytest.approx(value, abs=1e-3)
    found = result_of("out")
    assert (found["kind"], found["protocol"], found["validation"]) == ("reconstruction", "folder", None)
    assert program(*COMMAND, "--perceptual", "none", "--out", "out").code == 2
    images, latents = found["rows"]
    assert images["network"] is latents["network"] is None
    for key in ("psnr", "ssim"):
        mean = np.mean([each[key] for each in expected.values()])
        assert images["figures"][key] == pytest.approx(mean, abs=1e-3)
    assert {"st_lpips", "legacy_ssim", "mean_colour_psnr", "psnr_of_mean_error"} <= set(images["figures"])
    assert "ms_ssim" not in images["figures"]
    for row in found["rows"]:
        assert set(row["labels"]) == set(row["figures"])
    assert latents["figures"]["compression_ratio"] == 3 * 32 * 32 / (4 * 8 * 2)
    assert {"codebook_usage", "codebook_perplexity", "dead_codewords"} <= set(latents["figures"])
    worst = sorted(expected, key=lambda name: expected[name]["psnr"])[:4]
    assert [row["name"] for row in found["worst"]] == worst
    far = sorted(table, key=lambda name: -float(table[name]["st_lpips"]))[:4]
    assert [row["name"] for row in found["worst_perceptual"]] == far
    page = Page(Path("out/report.html").read_text())
    assert len(page.pictures) == 5  # two spreads, two of the worst, one of the middle
    assert "PSNR in dB" in page.words()
    assert program(*COMMAND, "--perceptual", "none", "--out", "out", "--overwrite").code == 0
    assert sorted(path.name for path in Path("out").iterdir()) == [name for name in files if "lpips" not in name]


def test_where_it_comes_from_is_told(program: Program, made: Path) -> None:
    assert program(*COMMAND, "--perceptual", "none", "--out", "out", "--images", "5").code == 0
    origin = result_of("out")["provenance"]
    assert origin["model"] == {"name": "model", "fingerprint": ImageTokenizer.from_pretrained("model").fingerprint()}
    assert origin["precision"] == "float32"
    assert origin["perceptual"] is None
    (samples,), reference = origin["samples"], origin["reference"]
    assert (samples["source"], samples["count"], samples["size"]) == ("model", 5, [SIZE, SIZE])
    assert (reference["source"], reference["count"], reference["crop"]) == ("photos", 5, f"centre {SIZE} (ADM)")
    names = list(csv.DictReader(io.StringIO(Path("out/images.csv").read_text())))
    chosen = [name for i, name in enumerate(sorted(NAMES)) if i in (0, 2, 4, 6, 8)]
    assert [row["name"] for row in names] == chosen  # spread evenly
    digests = {
        name: digest
        for batch in open_images("photos", size=SIZE, crop=True).batches(4)
        for name, digest in zip(batch.names, batch.digests, strict=True)
    }
    assert reference["pixels"] == pixel_fingerprint(digests[name] for name in chosen)


def test_pictures_of_the_worst_are_those(program: Program, made: Path) -> None:
    assert program(*COMMAND, "--perceptual", "none", "--out", "out", "--worst", "1").code == 0
    name = result_of("out")["worst"][0]["name"]
    sheet = np.asarray(Image.open("out/worst.png"))
    for picture in (
        center_crop(read_image(f"photos/{name}"), SIZE),
        read_image(Path("back", name).with_suffix(".png")),
    ):
        large = np.asarray(picture).repeat(3, 0).repeat(3, 1)  # small ones are shown enlarged
        corners = np.argwhere((sheet[: -len(large) + 1, : -len(large) + 1] == large[0, 0]).all(-1))
        assert any(np.array_equal(sheet[y : y + len(large), x : x + len(large)], large) for y, x in corners)


def test_sets_are_compared_through_networks(program: Program) -> None:
    features = ("--features", f"timm:{NETWORK}=network.safetensors")
    result = program(*COMMAND, "--perceptual", "none", "--out", "out", *features)
    assert result.code == 0, result.err
    assert "warning: " in result.err  # so few images make no covariance of full rank
    network = extractor(f"timm:{NETWORK}", weights="network.safetensors")
    photos = open_images("photos", size=SIZE, crop=True)
    (ours,), (theirs,) = (set_features(images, [network]) for images in (photos, open_images("back")))
    expected = set_figures(ours, theirs, network)
    row = result_of("out")["rows"][-1]
    assert row["name"] == row["network"] == network.name
    assert row["figures"] == pytest.approx(expected.values, rel=1e-3, abs=1e-6)
    assert row["labels"]["frechet_distance"] == f"rFD on {NETWORK}"
    assert row["labels"]["spatial_frechet_distance"] == f"rsFD on {NETWORK}"
    assert row["warnings"] == [each.replace("back", "model") for each in expected.warnings]
    assert result_of("out")["provenance"]["extractors"][0]["sha256"] == network.sha256
    assert f"rFD on {NETWORK}" in result.out


def test_nothing_depends_on_batches_threads_or_who_decodes(program: Program) -> None:
    features = ("--features", f"timm:{NETWORK}=network.safetensors", "--perceptual", "none")
    assert program(*COMMAND, *features, "--out", "a").code == 0
    assert program(*COMMAND, *features, "--out", "b", "--batch-size", "2", "--workers", "3").code == 0
    finished = (*GIVEN, *features[:2], "--batch-size", "4")
    assert program(*finished, "--reconstructions", "back", "--out", "c").code == 0
    assert program(*finished, "--reconstructions", "back.npz", "--out", "d").code == 0
    for out in ("b", "c", "d"):
        for name in ("images", NETWORK):
            assert figures_of(out, name) == pytest.approx(figures_of("a", name), rel=2e-3, abs=1e-6)
    rows = [result_of(out)["rows"] for out in ("c", "d")]
    warnings = [row[0].pop("warnings") for row in rows]
    (warning,) = set(warnings[1]) - set(warnings[0])
    assert "no names of images: pairs are made in the order in which they lie" in warning
    assert rows[0][0] == rows[1][0]  # the same pixels from another container
    assert [row["name"] for row in rows[0]] == ["images", NETWORK]  # of finished ones no latents are known
    assert result_of("c")["provenance"]["model"] is None
    prints = {json.dumps(result_of(out)["provenance"]["reference"]["pixels"]) for out in "abcd"}
    assert len(prints) == 1


def test_equal_pictures_have_the_psnr_of_nearly_equal_ones(program: Program) -> None:
    result = program(*GIVEN[:3], "back", *GIVEN[4:], "--reconstructions", "back.npz", "--out", "out")
    assert result.code == 0
    assert f"{COUNT} of {COUNT} reconstructions equal their photographs" in result.err
    figures = figures_of("out")
    assert figures["ssim"] == pytest.approx(1)
    highest = 10 * math.log10(255**2 * 3 * SIZE**2)
    assert figures["psnr"] == pytest.approx(highest)
    assert [row["psnr"] for row in result_of("out")["worst"]] == pytest.approx([highest] * COUNT)


def test_the_photographs_themselves_in_another_order_are_refused(program: Program) -> None:
    pixels = np.load("back.npz")["arr_0"]
    np.savez("turned.npz", arr_0=pixels[::-1])
    given = (*GIVEN[:3], "back.npz", *GIVEN[4:], "--reconstructions", "turned.npz", "--perceptual", "none")
    program.refuses(*given, "--out", "out", names=("turned.npz", "in another order"))


def test_without_the_perceptual_weights(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from softvq.losses import perceptual

    monkeypatch.setattr(perceptual, "DISTRIBUTION", "no-such-package")
    result = program(*COMMAND, "--out", "out", "--precision", "bf16")
    assert result.code == 0
    assert result.err.startswith("no perceptual distance: the perceptual loss needs the package no-such-package")
    assert result_of("out")["worst_perceptual"] is None
    assert result_of("out")["provenance"]["precision"] == "bf16"


def test_fewer_tokens_are_judged_as_such(program: Program) -> None:
    tokenizer = ImageTokenizer(dataclasses.replace(MODEL, min_latent_tokens=1)).eval()
    tokenizer.save_pretrained("nested")
    given = ("evaluate", "reconstruction", "nested", "photos", "--device", "cpu", "--perceptual", "none")
    assert program(*given, "--tokens", "2", "--out", "two").code == 0
    images, latents = result_of("two")["rows"]
    assert images["settings"] == latents["settings"] == {"tokens": 2}
    pixels = torch.stack([to_tensor(center_crop(read_image(Path("photos", name)), SIZE)) for name in NAMES])
    with torch.inference_mode():
        back = tokenizer.decode(tokenizer.encode(pixels)[:, :2]).clamp(-1, 1)
    assert images["figures"]["psnr"] == pytest.approx(float(psnr(back, pixels).mean()), abs=0.02)
    assert latents["figures"]["compression_ratio"] == 3 * SIZE * SIZE / (2 * MODEL.latent_dim * 2)
    program.refuses(*given, "--tokens", "9", "--out", "nine", names=("--tokens is 9", "1 to 4"))
    program.refuses(*COMMAND, "--tokens", "2", "--out", "other", names=("--tokens is 2", "no fewer"))
    program.refuses(*GIVEN, "--reconstructions", "back", "--tokens", "2", "--out", "x", names=("--tokens",))


def test_bad_input_is_one_sentence(program: Program) -> None:
    before = contents(Path())
    Path("few").mkdir()
    Path("few/00.png").symlink_to("../photos/00.png")
    few = (*COMMAND[:3], "few", *COMMAND[4:])
    for arguments, names in (
        ((*COMMAND, "--reconstructions", "back"), ("- in its place",)),
        (GIVEN, ("--reconstructions SET",)),
        ((*COMMAND, "--size", "33"), ("--size is '33'", "patch size 8")),
        ((*GIVEN, "--reconstructions", "nowhere"), ("nowhere", "no such file")),
        ((*GIVEN, "--reconstructions", "few"), ("few", "holds 1 image, but photos has 9")),
        ((*GIVEN, "--reconstructions", "back", "--size", "64"), ("back/00.png", "expected 64x64")),
        ((*GIVEN, "--reconstructions", "network.safetensors"), ("network.safetensors", "holds latents")),
        ((*COMMAND[:3], "nowhere", *COMMAND[4:]), ("nowhere", "no such file")),
        ((*COMMAND[:2], "nomodel", *COMMAND[3:]), ("nomodel",)),
        ((*COMMAND, "--perceptual", "lpips"), ("--perceptual is 'lpips'",)),
        ((*COMMAND, "--perceptual", "none", "--features", "inseption"), ("inseption",)),
        ((*COMMAND, "--perceptual", "none", "--protocol", "adm-256-train50k"), ("for generation only",)),
        (few, ("holds 1 image",)),
        ((*COMMAND, "--out", "model/config.json"), ("model/config.json", "is to be a folder")),
        ((*COMMAND, "--out", "model"), ("model: is already there",)),
        ((*COMMAND, "--out", "photos/sub", "--overwrite"), ("photos/sub: lies in photos",)),
    ):
        out = () if "--out" in arguments else ("--out", "out")
        program.refuses(*arguments, *out, names=names)
    assert not Path("out").exists()
    Path("few/00.png").unlink()
    Path("few").rmdir()
    assert contents(Path()) == before


def test_protocols_are_checked_before_anything_is_computed(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from softvq.commands import evaluate_reconstruction

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr(evaluate_reconstruction, "set_features", never)
    features = ("--features", f"timm:{NETWORK}=network.safetensors", "--perceptual", "none", "--out", "out")
    program.refuses(
        *COMMAND, *features, "--protocol", "adm-256-train50k", names=("adm-256-train50k is for generation only",)
    )
    program.refuses(*COMMAND, *features, "--protocol", "val50k-center256", names=("val50k-center256", "Inception"))
    np.savez("adm.npz", mu=np.zeros(4), sigma=np.eye(4), arr_0=np.zeros((2, 32, 32, 3), np.uint8))
    program.refuses(*COMMAND[:3], "adm.npz", *COMMAND[4:], *features, names=("adm.npz: holds statistics",))


def test_a_damaged_photograph_is_named(program: Program) -> None:
    Path("damaged").mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        photograph(40, 40, seed=number).save(f"damaged/{name}")
    data = Path("damaged/b.png").read_bytes()
    Path("damaged/b.png").write_bytes(data[: len(data) // 2])
    arguments = (*COMMAND[:3], "damaged", *COMMAND[4:], "--perceptual", "none", "--out", "out")
    program.refuses(*arguments, names=("damaged/b.png", "damaged or cut short"))
    assert not Path("out").exists()


def evaluate_as_rank(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    assert main(arguments) == 0


def test_two_ranks_write_what_one_would(program: Program, tmp_path: Path) -> None:
    arguments = [*COMMAND, "--perceptual", "none", "--features", f"timm:{NETWORK}=network.safetensors"]
    assert program(*arguments, "--out", "alone").code == 0
    run_as_ranks(evaluate_as_rank, tmp_path, [*arguments, "--out", "both"])
    alone, both = result_of("alone"), result_of("both")
    for ours, theirs in zip(alone["rows"], both["rows"], strict=True):
        assert theirs["figures"] == pytest.approx(ours["figures"], rel=1e-4, abs=1e-7)
    assert [row["name"] for row in both["worst"]] == [row["name"] for row in alone["worst"]]
    for side in ("reference", "samples"):
        assert both["provenance"][side] == alone["provenance"][side]
