"""`softvq evaluate probe` and `softvq evaluate latents` from the command line."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from softvq.backbones import load_backbone
from softvq.commands import common
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.data.images import read_image
from softvq.evaluation.probing import evenly
from softvq.files import write_tensors
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.generators import make_generator
from tests.program import DIM, SIZE, TOKENS, Program, contents, make_model, photograph, work_beside
from tests.test_page import Page

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
PROBE = ("evaluate", "probe", "model", "photos", "--device", "cpu", "--knn", "3")
LATENTS = ("evaluate", "latents", "model", "photos/train", "--device", "cpu")


def coloured(folder: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Write photographs whose colour is their class."""
    for name, count in counts.items():
        for number in range(count):
            path = folder / name / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            tint = Image.new("RGB", (40, 48), COLOURS[name])
            Image.blend(photograph(48, 40, seed=seed + number), tint, 0.7).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model")
    make_generator(folder / "sit")
    make_generator(folder / "mar", "mar")
    coloured(folder / "photos" / "train", dict.fromkeys(COLOURS, 8))
    coloured(folder / "photos" / "val", dict.fromkeys(COLOURS, 5), seed=50)
    return folder


@pytest.fixture
def program(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    work_beside(made, tmp_path, monkeypatch)
    return Program(capsys)


def test_colours_are_told_from_latents(program: Program) -> None:
    result = program(*PROBE, "--out", "out", "--batch-size", "5")
    assert (result.code, result.err) == (0, "")
    assert "out: probe.html, probe.json" in result.out
    assert "latents-pooled, 24 training photographs" in result.out
    report = json.loads(Path("out/probe.json").read_text())
    assert report["linear"]["accuracy"] == report["knn"]["accuracy"] == 1
    assert report["majority"] == {
        "accuracy": 1 / 3, "interval_95": report["majority"]["interval_95"], "correct": 5, "total": 15,
    }  # fmt: skip
    assert report["tokenizer"] == ImageTokenizer.from_pretrained("model").fingerprint()
    for name, count in (("train", 24), ("val", 15)):
        folder = PhotoFolder(Path("photos", name), SIZE, DataConfig(), seed=0)
        data = report["data"][name]
        assert (data["fingerprint"], data["photographs"], data["skipped"]) == (folder.fingerprint, count, [])
    assert {"softvq", "torch"} <= set(report["versions"])
    assert "generator" not in report
    assert program(*PROBE, "--out", "again", "--batch-size", "39").code == 0
    again = json.loads(Path("again/probe.json").read_text())
    assert {**again, "gradient": 0} == {**report, "gradient": 0}


@pytest.mark.parametrize("workers", ["0", "3"])
def test_photographs_are_read_ahead_where_asked(
    program: Program, workers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def read(path: Path) -> Image.Image:
        threads.add(threading.current_thread().name.partition("_")[0])
        return read_image(path)

    assert program(*PROBE, "--out", "before").code == 0
    monkeypatch.setattr(common, "read_image", read)
    assert program(*PROBE, "--out", "after", "--workers", workers).code == 0
    assert threads == {"MainThread" if workers == "0" else "softvq-decoder"}
    assert Path("after/probe.json").read_bytes() == Path("before/probe.json").read_bytes()
    broken = Path(shutil.copytree("photos", "more"), "train", "red", "03.png")
    broken.write_bytes(b"no picture")
    result = program("evaluate", "probe", "model", "more", *PROBE[4:], "--out", "less", "--workers", workers)
    assert result.code == 0
    assert f"skipped: {broken}" in result.err
    data = json.loads(Path("less/probe.json").read_text())["data"]["train"]
    assert (data["skipped"], data["photographs"]) == (["red/03.png"], 23)


def test_the_probe_has_a_page(program: Program) -> None:
    assert program(*PROBE, "--out", "out").code == 0
    page = Page(Path("out/probe.html").read_text())
    assert len(page.pictures) == 3  # bars, confusion, sweep
    words = page.words()
    for expected in ("linear probe", "3 nearest neighbours", "5 of 15", "100.0 %", "33.3 %", "chosen", "Machine"):
        assert expected in words
    assert ImageTokenizer.from_pretrained("model").fingerprint() in words
    program.refuses(*PROBE, "--out", "out", names=("out", "--overwrite"))


def test_several_models_stand_side_by_side(program: Program) -> None:
    make_model(Path("other"), seed=1)
    alone = [(*PROBE[:2], model, *PROBE[3:], "--out", f"out-{model}") for model in ("model", "other")]
    assert [program(*command).code for command in alone] == [0, 0]
    result = program(*PROBE[:3], "other", *PROBE[3:], "--out", "both")
    assert (result.code, result.err) == (0, "")
    assert "model: latents-pooled, 24 training photographs" in result.out
    reports = json.loads(Path("both/probe.json").read_text())
    assert reports == [json.loads(Path(f"out-{model}/probe.json").read_text()) for model in ("model", "other")]
    page = Page(Path("both/probe.html").read_text())
    assert len(page.pictures) == 5  # two bar charts, a confusion for each, one sweep
    for report, name in zip(reports, ("1: model", "2: other"), strict=True):
        assert name in page.words()
        assert report["tokenizer"] in page.words()
    program.refuses(*PROBE[:3], "model", *PROBE[3:], names=("MODEL model is there twice",))
    program.refuses(*PROBE[:3], "nowhere", *PROBE[3:], "--out", "none", names=("nowhere",))
    generator = ("--on", "generator:0", "--generator", "sit")
    program.refuses(*PROBE[:3], "other", *PROBE[3:], *generator, names=("--generator", "2 MODELs"))
    assert not Path("none").exists()


def test_a_second_folder_judges_and_fewer_images_are_spread(program: Program) -> None:
    result = program(
        "evaluate", "probe", "model", "photos/train", "--val", "photos/val", "--images", "6", "--knn", "2",
        "--on", "encoder", "--out", "out", "--device", "cpu",
    )  # fmt: skip
    assert (result.code, result.err) == (0, "")
    data = json.loads(Path("out/probe.json").read_text())["data"]
    assert [(data[name]["photographs"], data[name]["found"]) for name in ("train", "val")] == [(6, 24), (6, 15)]
    assert evenly(24, 6) == [2, 6, 10, 14, 18, 22]


@pytest.mark.parametrize("model", ["sit", "mar"])
def test_blocks_of_a_generator(program: Program, model: str) -> None:
    command = ("evaluate", "probe", f"{model}/tokenizer", *PROBE[3:], "--generator", model, "--on", "generator:1")
    assert program(*command, "--time", "0.1", "--out", "out").code == 0
    report = json.loads(Path("out/probe.json").read_text())
    assert report["generator"]["time"] == (0.1 if model == "sit" else None)
    assert (report["generator"]["model"], report["on"]) == (model, "generator:1")
    program.refuses(*command[:-1], "generator:2", names=("layer is 2", "0 to 1"))


def test_what_cannot_be_probed_is_refused(program: Program) -> None:
    shutil.copytree("photos/train", "more")
    coloured(Path("more"), {"red": 1})
    Path("more/red").rename("more/violet")
    shutil.copytree("photos/train/red", "one/red")
    shutil.copytree("photos/train/red", "flat")
    make_model(Path("other"), seed=1)
    program.refuses(*PROBE, "--on", "pixels", names=("--on is 'pixels'", "generator:LAYER"))
    program.refuses(*PROBE, "--on", "generator:0", names=("--generator", "both or neither"))
    program.refuses(*PROBE, "--generator", "sit", names=("--on generator:LAYER", "both or neither"))
    program.refuses(*PROBE[:3], "photos/train", names=("photos/train", "no folder train", "--val"))
    program.refuses(*PROBE, "--val", "more", names=("more", "violet", "photos/train"))
    program.refuses(*PROBE[:3], "one", "--val", "one", names=("one: has one class, red", "at least 2"))
    program.refuses(*PROBE[:3], "photos", "--val", "flat", names=("flat: has no classes",))
    program.refuses(*PROBE, "--knn", "99", names=("knn is 99", "24"))
    program.refuses(*PROBE, "--size", "33", names=("--size is '33'", "multiples of the patch size"))
    program.refuses(*PROBE, "--val", "nowhere", names=("nowhere",))
    program.refuses(*PROBE, "--on", "generator:0", "--generator", "model", names=("softvq-generator",))
    generator = ("--on", "generator:0", "--generator", "sit")
    program.refuses("evaluate", "probe", "other", *PROBE[3:], *generator, names=("the tokenizer is", "trained on"))
    assert not list(Path().glob("*/probe.json"))


def test_a_report_about_latents(program: Program) -> None:
    result = program(*LATENTS, "--out", "out", "--batch-size", "5")
    assert (result.code, result.err) == (0, "")
    assert "out: report.html, report.json" in result.out
    assert {path.name for path in Path("out").iterdir()} == {"report.html", "report.json"}
    report = json.loads(Path("out/report.json").read_text())
    tokenizer = ImageTokenizer.from_pretrained("model")
    assert report["tokenizer"] == tokenizer.fingerprint()
    assert [len(report["channels"][name]) for name in ("mean", "excess_kurtosis")] == [DIM, DIM]
    assert report["spectrum"]["images"]["largest_possible"] == min(23, TOKENS * DIM)
    assert report["classes"]["latents"]["linear"]["total"] == 6
    assert [row["level"] for row in report["noise"]["levels"]] == [0.05, 0.1, 0.2, 0.4, 0.8]
    falling = [row["psnr"] for row in report["noise"]["levels"]]
    assert falling == sorted(falling, reverse=True)
    assert report["codewords"]["codebook_size"] == 16
    assert report["neighbours"]["overlap_with_encoder"] is None
    assert report["data"]["photographs"] == 24
    page = Page(Path("out/report.html").read_text())
    assert len(page.pictures) == 10
    assert tokenizer.fingerprint() in page.words()
    before = contents(Path("out"))
    program.refuses(*LATENTS, "--out", "out", names=("out", "--overwrite"))
    assert program(*LATENTS, "--out", "out", "--batch-size", "5", "--overwrite").code == 0
    assert contents(Path("out")) == before


def test_a_vision_encoder_is_compared_with(program: Program) -> None:
    name = "test_vit"
    write_tensors("weights.safetensors", load_backbone(name, image_size=SIZE, pretrained=False).network.state_dict())
    features = ("--features", name, "weights.safetensors")
    assert program(*LATENTS, "--images", "12", *features).code == 0
    report = json.loads(Path("latent-report/report.json").read_text())
    assert 0 <= report["neighbours"]["overlap_with_encoder"] <= 1
    assert report["features"] == [name, "weights.safetensors"]
    assert report["data"]["photographs"] == 12
    program.refuses(*LATENTS, "--out", "b", "--features", "resnet5o", names=("resnet5o", "timm"))
    program.refuses(*LATENTS, "--out", "b", "--features", "a", "b", "c", names=("--features has 3 parts",))


def test_what_cannot_be_reported_is_refused(program: Program) -> None:
    program.refuses(*LATENTS[:3], "photos", names=("photos: holds train and val",))
    program.refuses(*LATENTS, "--images", "7", names=("photos/train: 7 photographs", "at least 8"))
    program.refuses(*LATENTS, "--size", "31", names=("--size is '31'",))
    shutil.copytree("photos/train", "torn")
    for path in sorted(Path("torn").glob("*/*.png"))[1:11]:
        path.write_bytes(b"no picture")
    result = program(*LATENTS[:3], "torn", "--out", "out")
    assert result.code == 0
    assert result.err.count("skipped: ") == 10
    report = json.loads(Path("out/report.json").read_text())
    assert (report["data"]["photographs"], len(report["data"]["skipped"])) == (14, 10)
    result = program(*LATENTS[:3], "torn", "--out", "few", "--images", "12")
    assert (result.code, result.out) == (2, "")
    assert result.err.endswith("softvq: torn: 7 photographs can be read, expected at least 8\n")
    assert not Path("few").exists()


def test_latents_that_are_not_finite_are_an_error(program: Program) -> None:
    tokenizer = make_model(Path("broken"))
    with torch.no_grad():
        tokenizer.to_latents.weight.mul_(3e38)
    tokenizer.save_pretrained("broken")
    program.refuses("evaluate", "latents", "broken", *LATENTS[3:], code=3, names=("not finite",))
    program.refuses("evaluate", "probe", "broken", *PROBE[3:], code=3, names=("not finite",))
