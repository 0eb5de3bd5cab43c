import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from softvq.commands.common import Photo, batched
from softvq.commands.inspect import parameter_counts
from softvq.data.images import center_crop, read_image, to_image, to_tensor
from softvq.data.latents import read_latents
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.program import DIM, PATCH, SIZE, TOKENS, Program, contents, make_model, make_photos, photograph, write_recipe


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    make_photos(Path("photos"))
    return Program(capsys)


def test_encode_writes_what_the_model_says(program: Program) -> None:
    result = program("encode", "model", "photos", "x.safetensors", "--dtype", "float32", "--batch-size", "2")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"x.safetensors: 3 x {TOKENS} tokens x {DIM} in float32\n"
    tokenizer = ImageTokenizer.from_pretrained("model")
    content = read_latents("x.safetensors", tokenizer.latent_fingerprint())
    assert content.names == ("a.png", "b.jpg", "sub/c.webp")
    assert content.sizes.tolist() == [[SIZE, SIZE]] * 3
    images = torch.stack([to_tensor(center_crop(read_image(Path("photos", name)), SIZE)) for name in content.names])
    torch.testing.assert_close(content.latents, tokenizer.encode(images).detach(), atol=1e-5, rtol=1e-5)


def test_decode_gives_back_what_the_model_decodes(program: Program) -> None:
    assert program("encode", "model", "photos", "x.safetensors", "--size", "16x40", "--dtype", "float32").code == 0
    result = program("decode", "model", "x.safetensors", "out", "--batch-size", "2")
    assert (result.code, result.out, result.err) == (0, "out: 3 PNG files\n", "")
    assert set(contents(Path("out"))) == {"a.png", "b.png", "sub/c.png"}
    tokenizer = ImageTokenizer.from_pretrained("model")
    image = tokenizer.decode(read_latents("x.safetensors").latents[2:], (16, 40))[0]
    found, expected = np.asarray(read_image(Path("out/sub/c.png"))), np.asarray(to_image(image.detach()))
    assert found.shape == (16, 40, 3)
    assert np.abs(found.astype(int) - expected).max() <= 1  # batches of two and of one may round differently


def test_one_photograph_and_its_own_size(program: Program) -> None:
    photograph(24, 56).save("wide.png")
    assert program("encode", "model", "wide.png", "x.safetensors", "--size", "native").code == 0
    content = read_latents("x.safetensors")
    assert (content.names, content.sizes.tolist()) == (("wide.png",), [[24, 56]])
    assert content.latents.dtype == torch.float16
    assert program("decode", "model", "x.safetensors", "out").code == 0
    assert read_image(Path("out/wide.png")).size == (56, 24)


def test_bf16_is_near_float32(program: Program) -> None:
    for precision in ("float32", "bf16"):
        assert program("encode", "model", "photos", f"{precision}.safetensors", "--precision", precision).code == 0
    exact, rough = (read_latents(f"{name}.safetensors").latents.float() for name in ("float32", "bf16"))
    assert 0 < (exact - rough).abs().max() < 0.1 * exact.abs().max()


def test_reconstruct_a_folder(program: Program) -> None:
    result = program("reconstruct", "model", "photos", "out")
    assert (result.code, result.err) == (0, "")
    pairs = {"pairs/a.png", "pairs/b.png", "pairs/sub/c.png"}
    assert set(contents(Path("out"))) == pairs | {"contact-sheet.png", "metrics.json"}
    report = json.loads(Path("out/metrics.json").read_text())
    tokenizer = ImageTokenizer.from_pretrained("model")
    assert report["tokenizer"] == tokenizer.fingerprint()
    assert [row["name"] for row in report["photographs"]] == ["a.png", "b.jpg", "sub/c.webp"]
    image = to_tensor(center_crop(read_image(Path("photos/a.png")), SIZE))[None]
    error = (tokenizer.decode(tokenizer.encode(image)).clamp(-1, 1) - image).square().mean().item()
    assert report["photographs"][0]["psnr"] == pytest.approx(10 * math.log10(4 / error), abs=1e-3)
    mean = sum(row["psnr"] for row in report["photographs"]) / 3
    assert report["mean"]["psnr"] == pytest.approx(mean)
    assert f"{mean:.2f}" in result.out
    assert "sub/c.webp" in result.out


def test_reconstruct_one_photograph(program: Program) -> None:
    assert program("reconstruct", "model", "photos/b.jpg", "out").code == 0
    assert set(contents(Path("out"))) == {"b.png", "metrics.json"}


def test_names_are_not_taken_for_markup_and_do_not_collide(program: Program) -> None:
    make_photos(Path("odd"), ("[red]a.png", "[red]a.jpg", "contact-sheet.png"))
    result = program("reconstruct", "model", "odd", "out")
    assert result.code == 0
    assert "[red]a.jpg" in result.out
    assert {"pairs/[red]a.png.png", "pairs/[red]a.jpg.png", "contact-sheet.png"} < set(contents(Path("out")))


def test_bad_photographs_of_a_folder_are_skipped_and_named(program: Program) -> None:
    Path("photos/broken.jpg").write_bytes(b"no photograph")
    result = program("reconstruct", "model", "photos", "out")
    assert result.code == 0
    assert "skipped: photos/broken.jpg: is not a JPEG, PNG or WebP image" in result.err
    assert "skipped 1 of 4 photographs" in result.err
    assert json.loads(Path("out/metrics.json").read_text())["skipped"] == ["broken.jpg"]
    assert program("encode", "model", "photos", "x.safetensors").code == 0
    assert len(read_latents("x.safetensors").names) == 3


@pytest.mark.parametrize(
    ("command", "out"),
    [
        (("encode", "model", "photos"), "x.safetensors"),
        (("decode", "model", "given.safetensors"), "out"),
        (("reconstruct", "model", "photos"), "out"),
    ],
)
def test_what_is_there_is_replaced_only_when_asked(program: Program, command: tuple[str, ...], out: str) -> None:
    assert program("encode", "model", "photos", "given.safetensors").code == 0
    assert program(*command, out).code == 0
    before = contents(Path())
    program.refuses(*command, out, names=(out, "already there", "--overwrite"))
    assert contents(Path()) == before
    assert program(*command, out, "--overwrite").code == 0
    assert contents(Path()) == before


@pytest.mark.parametrize("per_channel", [False, True])
def test_fit_stats_makes_latents_standard(program: Program, per_channel: bool) -> None:
    flags = ["--per-channel"] if per_channel else []
    result = program("fit-stats", "model", "photos", "--batch-size", "2", *flags)
    assert result.code == 0
    assert "fitted on 3 photographs" in result.out
    assert "encode them again" in result.err
    assert program("encode", "model", "photos", "x.safetensors", "--dtype", "float32").code == 0
    latents = read_latents("x.safetensors").latents
    dims = (0, 1) if per_channel else (0, 1, 2)
    expected = torch.zeros_like(latents.mean(dims))
    torch.testing.assert_close(latents.mean(dims), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(dims, correction=0), expected + 1, atol=1e-3, rtol=0)


def test_fit_stats_can_save_elsewhere(program: Program) -> None:
    before = contents(Path("model"))
    assert program("fit-stats", "model", "photos", "--out", "fitted").code == 0
    assert contents(Path("model")) == before
    assert ImageTokenizer.from_pretrained("fitted").latent_std[0] != 1


def test_inspect(program: Program) -> None:
    tokenizer = ImageTokenizer.from_pretrained("model")
    report = json.loads(program("inspect", "model", "--json").out)
    assert report["fingerprint"] == tokenizer.fingerprint()
    assert report["parameters"] == parameter_counts(tokenizer)
    total = report["parameters"].pop("total")
    assert total == sum(report["parameters"].values()) == sum(p.numel() for p in tokenizer.parameters())
    assert report["latents"]["num_latent_tokens"] == TOKENS
    assert report["latents"]["fingerprint"] == tokenizer.latent_fingerprint()
    assert report["latent_statistics"] == {"fitted": False, "per_channel": False, "mean": [0, 0], "std": [1, 1]}
    assert set(report["files"]) == {"config.json", "model.safetensors"}
    # one block: 12 w^2 weights for each token, and 2 n^2 w for attention; a multiplication and an addition are two
    width, tokens = 24, (SIZE // PATCH) ** 2 + TOKENS
    block = 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)
    ends = 2 * ((SIZE // PATCH) ** 2 * 3 * PATCH**2 * width + TOKENS * width * DIM + 2 * TOKENS * 8 * DIM)
    assert report["flops"]["encode"] == pytest.approx(block + ends, rel=0.05)
    text = program("inspect", "model").out
    assert tokenizer.fingerprint() in text
    assert f"{total:,}" in text


def test_doctor(program: Program) -> None:
    result = program("doctor")
    assert (result.code, result.err) == (0, "")
    assert torch.__version__.partition("+")[0] in result.out
    assert all(word in result.out for word in ("cores", "GPU", "stlpips_pytorch", "tensorboard", "folder"))


def test_train_then_use(program: Program) -> None:
    recipe = write_recipe(Path("recipe.yaml"))
    result = program("train", "tokenizer", "--config", recipe, "--data", "photos", "train.steps=3", "--run", "run")
    assert (result.code, result.out) == (0, "run/tokenizer\n")
    assert "step 3/3" in result.err
    assert program("inspect", "run/tokenizer").code == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["train"]["steps"] == 3
    again = ("train", "tokenizer", "--config", recipe, "--data", "photos", "--run", "run")
    program.refuses(*again, "train.steps=3", names=("run", "--resume"))
    program.refuses(*again, "--resume", code=2, names=("train.steps was 3, is 2",))
    assert program(*again, "train.steps=3", "--resume").code == 0


def test_train_dry_run_writes_nothing(program: Program) -> None:
    recipe = write_recipe(Path("recipe.yaml"))
    before = contents(Path())
    result = program("train", "tokenizer", "--config", recipe, "--dry-run", "seed=7", "--data", "photos")
    assert (result.code, result.err) == (0, "")
    resolved = yaml.safe_load(result.out.partition("\n\n")[0])
    assert (resolved["seed"], resolved["data"]["path"], resolved["train"]["steps"]) == (7, "photos", 2)
    total = sum(p.numel() for p in ImageTokenizer.from_pretrained("model").parameters())
    assert f"{total:,}" in result.out
    assert "photos: 3 images, 1.3 passes" in result.out
    assert contents(Path()) == before


def test_batches_hold_photographs_of_one_size() -> None:
    shapes = [(8, 8), (8, 8), (8, 8), (8, 16), (8, 8)]
    photos = [Photo(name=str(i), image=torch.full((3, *shape), float(i))) for i, shape in enumerate(shapes)]
    found = list(batched(photos, 2))
    assert [names for names, _ in found] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert all(torch.equal(images[:, 0, 0, 0], torch.tensor([float(n) for n in names])) for names, images in found)


def test_reconstruct_never_replaces_a_photograph_even_when_told_to_overwrite(program: Program) -> None:
    make_photos(Path("photos"), ("a.png",))
    before = Path("photos/a.png").read_bytes()
    program.refuses(
        "reconstruct", "model", "photos/a.png", "photos", "--overwrite", names=("photos/a.png", "themselves")
    )
    assert Path("photos/a.png").read_bytes() == before


def test_fit_stats_replaces_nothing_elsewhere_unless_told(program: Program) -> None:
    Path("mine").mkdir()
    Path("mine/README.md").write_text("my own words")
    program.refuses("fit-stats", "model", "photos", "--out", "mine", names=("mine", "already there", "--overwrite"))
    assert program("fit-stats", "model", "photos", "--out", "mine", "--overwrite").code == 0
    assert Path("mine/README.md").read_text() == "my own words"


def test_a_model_that_paints_no_numbers_fails_with_a_sentence(program: Program) -> None:
    tokenizer = ImageTokenizer.from_pretrained("model")
    with torch.no_grad():
        tokenizer.decoder.norm.weight.fill_(3e38)
    tokenizer.save_pretrained("model")
    for command, out in ((("reconstruct", "model", "photos"), "out"),):
        result = program(*command, out)
        assert result.code == 3
        assert "not finite" in result.err
        assert not list(Path(out).rglob("*.png")) if Path(out).exists() else True
