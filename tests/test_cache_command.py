"""`softvq cache-latents` from the command line."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from softvq.data.images import center_crop, read_image, to_tensor
from softvq.data.latent_cache import cache_info, read_cache
from softvq.pipeline import GenerationPipeline, keys_of_images
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.program import DIM, MODEL, PATCH, SIZE, TOKENS, Program, contents, make_model, make_photos

NAMES = tuple(f"{'ant' if i % 2 else 'bee'}/{i:02}.png" for i in range(20))
COMMAND = ("cache-latents", "model", "photos", "out", "--shard-size", "8")
RECIPE = """
model: {preset: sit-tiny, network: {width: 16, depth: 1, num_heads: 2}}
train: {batch_size: 4, steps: 1, sample_every: 0, device: cpu, precision: fp32}
sampling: {steps: 2}
"""


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.chdir(tmp_path)
    make_model(Path("model"))
    make_photos(Path("photos"), NAMES)
    return Program(capsys)


def test_a_folder_becomes_a_cache(program: Program) -> None:
    result = program(*COMMAND, "--dtype", "float32", "--batch-size", "3")
    assert (result.code, result.err) == (0, "")
    assert "out: complete, 20 photographs encoded" in result.out
    assert f"{TOKENS} x {DIM}, float32" in result.out
    tokenizer = ImageTokenizer.from_pretrained("model")
    cache = read_cache("out", tokenizer.latent_fingerprint())
    assert (cache.classes, len(cache.names), cache.image_size) == (("ant", "bee"), 20, SIZE)
    for name, views in list(zip(cache.names, cache.latents, strict=True))[::7]:
        square = center_crop(read_image(Path("photos", name)), SIZE)
        mirrored = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        with torch.no_grad():
            expected = tokenizer.encode(torch.stack([to_tensor(square), to_tensor(mirrored)]))
        torch.testing.assert_close(views, expected, atol=1e-5, rtol=1e-5)
    before = contents(Path("out"))
    result = program(*COMMAND, "--dtype", "float32")
    assert (result.code, result.err) == (0, "")
    assert "out: was complete, every shard is whole" in result.out
    assert contents(Path("out")) == before


def test_an_interrupted_cache_is_gone_on_with(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program(*COMMAND[:3], "whole", *COMMAND[4:]).code == 0
    encode, calls = ImageTokenizer.encode, iter([True])

    def interrupted(self: ImageTokenizer, images: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return encode(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(ImageTokenizer, "encode", interrupted)
        result = program(*COMMAND)
    assert (result.code, result.err) == (130, "softvq: stopped by the keyboard\n")
    assert len(cache_info("out").shards) == 1
    result = program(*COMMAND)
    assert "complete, 12 photographs encoded" in result.out
    assert contents(Path("out")) == contents(Path("whole"))


def test_options(program: Program) -> None:
    assert program(*COMMAND, "--no-flip", "--size", "16", "--precision", "bf16", "--device", "cpu").code == 0
    header = cache_info("out")
    assert (header.views, header.image_size, header.plan.precision, len(header.shards)) == (1, 16, "bf16", 3)
    assert read_cache("out").latents.shape == (20, 1, TOKENS, DIM)


def test_fewer_tokens_are_the_first(program: Program) -> None:
    nested = ImageTokenizer(dataclasses.replace(MODEL, min_latent_tokens=2)).eval()
    nested.save_pretrained("nested")
    for out, more in (("all", ()), ("few", ("--tokens", "3"))):
        assert program("cache-latents", "nested", "photos", out, *more).code == 0
    assert cache_info("few").plan.tokens == 3
    assert torch.equal(read_cache("few").latents, read_cache("all").latents[:, :, :3])
    program.refuses(
        "cache-latents", "nested", "photos", "more", "--tokens", "1", names=("--tokens is 1", f"2 to {TOKENS}")
    )
    program.refuses(*COMMAND, "--tokens", "3", names=("--tokens is 3", f"{TOKENS}, and no fewer"))
    # a generator of so many tokens is trained, sampled and probed with the tokenizer of all of them
    Path("recipe.yaml").write_text(RECIPE)
    assert program("train", "generator", "--config", "recipe.yaml", "--latents", "few", "--run", "run").code == 0
    pipeline = GenerationPipeline.from_pretrained("run/generator")
    images = pipeline([0, 1], seed=0)
    latents = pipeline.latents(torch.tensor([0, 1]), keys_of_images(0, 2))
    assert latents.shape == (2, 3, DIM)
    with torch.inference_mode():
        torch.testing.assert_close(images, nested.decode(latents).clamp(-1, 1), atol=1e-5, rtol=0)
    probe = ("evaluate", "probe", "nested", "photos", "--val", "photos", "--on", "generator:0", "--knn", "3")
    assert program(*probe, "--generator", "run/generator").code == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_change_nothing(program: Program) -> None:
    assert program(*COMMAND).code == 0
    assert program(*COMMAND[:3], "other", *COMMAND[4:], "--workers", "2").code == 0
    assert contents(Path("out")) == contents(Path("other"))


def test_bad_photographs_are_skipped_and_listed(program: Program) -> None:
    Path("photos/ant/01.png").write_bytes(b"no photograph")
    result = program(*COMMAND)
    assert result.code == 0
    assert "skipped: photos/ant/01.png: is not a JPEG, PNG or WebP image" in result.err
    assert cache_info("out").skipped == ("ant/01.png",)
    Path("photos/ant/03.png").write_bytes(b"no photograph")
    sentence = program.refuses(*COMMAND[:3], "other", code=3, names=("2 of 20 photographs cannot be read", "5%"))
    assert "ant/01.png, ant/03.png" in sentence


def test_a_cache_of_something_else_is_refused(program: Program) -> None:
    make_model(Path("other"), seed=1)
    assert program(*COMMAND).code == 0
    before = contents(Path())
    program.refuses("cache-latents", "other", *COMMAND[2:], names=("out", "belong to tokenizer", "(model)"))
    program.refuses(*COMMAND, "--no-flip", names=("out", "flip True, not False"))
    program.refuses(*COMMAND, "--size", "16", names=("out", "image_size 32, not 16"))
    program.refuses(*COMMAND[:4], names=("out", "shard_size 8, not 4096"))
    assert contents(Path()) == before
    make_photos(Path("photos"), ("ant/more.png",))
    program.refuses(*COMMAND, names=("out", "20 files then, 21 now"))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("model", "photos", "photos"), ("photos: holds ant",)),
        (("model", "photos", "model/config.json"), ("model/config.json", "is a file")),
        (("model", "photos", "model/config.json/out"), ("config.json is a file",)),
        (("model", "nowhere", "out"), ("nowhere", "no such file or folder")),
        (("model", "photos/ant/01.png", "out"), ("is a file, expected a folder of images",)),
        (("nowhere", "photos", "out"), ("nowhere",)),
        (("model", "photos", "out", "--size", "33"), ("--size is '33'", f"patch size {PATCH}", "32x32")),
        (("model", "photos", "out", "--size", "16x16"), ("--size", "'16x16'")),
        (("model", "photos", "out", "--shard-size", "0"), ("--shard-size", "'0'")),
        (("model", "photos", "out", "--shard-size", "99999"), ("shard_size is 99999", "65536")),
        (("model", "photos", "out", "--workers", "-1"), ("--workers",)),
        (("model", "photos", "out", "--device", "abacus"), ("device is 'abacus'",)),
    ],
)
def test_what_cannot_be_is_one_sentence(program: Program, arguments: tuple[str, ...], names: tuple[str, ...]) -> None:
    before = contents(Path())
    program.refuses("cache-latents", *arguments, names=names)
    assert contents(Path()) == before


def test_latents_that_are_not_finite(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ImageTokenizer, "encode", lambda self, images: torch.full((len(images), TOKENS, DIM), torch.nan)
    )
    program.refuses(*COMMAND, code=3, names=("ant/01.png", "not all finite", "--dtype float32"))
    assert set(contents(Path("out"))) == {"cache.json"}
