"""Exported files: they compute what the model does, for any batch, and are not kept where they do not."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from softvq.errors import InputError, RunError
from softvq.export import files
from softvq.export.files import run_part, write_part
from softvq.export.parts import Part, decoder_part, encoder_part, sampler_part
from softvq.generators.guidance import Guidance
from softvq.generators.recipe import SamplingRecipe
from softvq.pipeline import GenerationPipeline
from softvq.randomness import fold_in, keys_of, normal
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests import generators
from tests.program import DIM, SIZE, TOKENS, Program, make_model

GUIDED = SamplingRecipe(sampler="euler", steps=2, guidance=Guidance(scale=2.0, interval=(0.0, 0.6)), temperature=0.9)


@pytest.fixture(autouse=True)
def traceable() -> Iterator[None]:
    """Switch off the checks of shapes, which exist in tests only, and which no tracer can look into."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "model")
    generators.make_generator(folder / "sit", "sit")
    generators.make_generator(folder / "mar", "mar")
    return folder


@pytest.fixture(scope="module")
def tokenizer(made: Path) -> ImageTokenizer:
    found = ImageTokenizer.from_pretrained(made / "model")
    found.latent_mean.fill_(0.1)
    found.latent_std.fill_(0.3)
    return found


@pytest.fixture(scope="module")
def pipeline(made: Path) -> GenerationPipeline:
    return GenerationPipeline.from_pretrained(made / "sit")


def test_an_encoder_and_a_decoder(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    check = write_part(encoder_part(tokenizer), tmp_path / "x.onnx", "onnx")
    assert 0 < check.largest < 1e-4  # ONNX computes with other kernels
    assert write_part(decoder_part(tokenizer), tmp_path / "x.pt2", "torch").largest < 1e-6
    images = torch.rand(5, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        latents = tokenizer.encode(images)
        wanted = tokenizer.decode(latents)
    found = run_part(tmp_path / "x.onnx", "onnx")(images)
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run_part(tmp_path / "x.pt2", "torch")(found), wanted, rtol=1e-3, atol=1e-3)
    facts = json.loads((tmp_path / "x.onnx.json").read_text())
    assert facts["inputs"] == [
        {"name": "images", "dtype": "float32", "shape": ["batch", 3, SIZE, SIZE], "values": "RGB, -1 to 1"}
    ]
    assert facts["output"]["shape"] == ["batch", TOKENS, DIM]
    assert facts["tokenizer"] == tokenizer.fingerprint()


def test_a_sampler_makes_the_images_of_its_generator(pipeline: GenerationPipeline, tmp_path: Path) -> None:
    import onnxruntime

    write_part(sampler_part(pipeline, GUIDED), tmp_path / "x.onnx", "onnx")
    keys = keys_of(7, "image", torch.arange(4))
    labels = torch.tensor([2, 0, 1, 2])
    noise = normal(fold_in(keys, 16), TOKENS, DIM)  # what the generator draws for these keys
    with torch.no_grad():
        wanted = pipeline.tokenizer.decode(pipeline.generator.sample(labels, keys, GUIDED))
        plain = pipeline.tokenizer.decode(pipeline.generator.sample(labels, keys, SamplingRecipe(steps=2)))
    found = run_part(tmp_path / "x.onnx", "onnx")(noise, labels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3
    others = run_part(tmp_path / "x.onnx", "onnx")(noise, torch.tensor([1, 0, 1, 2]))
    assert not torch.equal(others[0], found[0])
    torch.testing.assert_close(others[1:], found[1:])

    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    facts = json.loads((tmp_path / "x.onnx.json").read_text())
    for ports, ours in ((session.get_inputs(), facts["inputs"]), (session.get_outputs(), [facts["output"]])):
        assert [port.name for port in ports] == [port["name"] for port in ours]
        assert [port.shape[1:] for port in ports] == [port["shape"][1:] for port in ours]
        assert all(isinstance(port.shape[0], str) for port in ports)
    assert facts["sampling"]["guidance"]["scale"] == 2.0
    assert facts["classes"] == list(generators.CLASSES)


def test_a_generator_without_classes_takes_noise_alone(tmp_path: Path) -> None:
    generators.make_generator(tmp_path / "dit", "dit", condition="none")
    part = sampler_part(GenerationPipeline.from_pretrained(tmp_path / "dit"), SamplingRecipe(steps=1), pixels=False)
    write_part(part, tmp_path / "x.pt2", "torch")
    noise = torch.randn(3, TOKENS, DIM)
    with torch.no_grad():
        torch.testing.assert_close(run_part(tmp_path / "x.pt2", "torch")(noise), part.module(noise))


def test_rounded_variants_are_near(tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    small = write_part(decoder_part(tokenizer), tmp_path / "x.onnx", "onnx", "int8")
    half = write_part(decoder_part(tokenizer), tmp_path / "x.pt2", "torch", "bf16")
    assert 1e-4 < small.root_mean_square < 0.05
    assert 1e-4 < half.root_mean_square < 0.05
    assert tokenizer.decoder.to_pixels.weight.dtype == torch.float32  # the model itself stays


@pytest.mark.parametrize("change", [1.01, float("nan")])
def test_files_that_compute_something_else_are_not_kept(
    change: float, tokenizer: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "run_part", lambda *_: lambda *inputs: change * part.module(*inputs).detach())
    monkeypatch.setattr(files, "_program", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda _, path: Path(path).write_bytes(b"x"))
    part = decoder_part(tokenizer)
    with pytest.raises(RunError, match=r"the decoder that was written .* it is not kept"):
        write_part(part, tmp_path / "x.pt2", "torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_models_that_give_zeros_are_kept_and_those_that_give_no_numbers_are_not(
    value: float, tokenizer: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "run_part", lambda *_: torch.zeros_like)
    monkeypatch.setattr(files, "_program", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", lambda _, path: Path(path).write_bytes(b"x"))

    class Constant(torch.nn.Module):
        def forward(self, latents: Tensor) -> Tensor:
            return torch.full_like(latents, value)

    part = dataclasses.replace(decoder_part(tokenizer), module=Constant())
    if value == 0:
        assert write_part(part, tmp_path / "x.pt2", "torch") == files.Check(largest=0.0, root_mean_square=0.0)
        return
    with pytest.raises(RunError, match="the decoder itself gives values that are not finite"):
        write_part(part, tmp_path / "x.pt2", "torch")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_told(
    made: Path, pipeline: GenerationPipeline, tokenizer: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="MAR draws at random in every step"):
        sampler_part(GenerationPipeline.from_pretrained(made / "mar"))
    with pytest.raises(InputError, match="sampler is euler_maruyama, which draws noise in every step; take one of eu"):
        sampler_part(pipeline, SamplingRecipe(sampler="euler_maruyama", steps=3))
    with pytest.raises(InputError, match="tokens is 3, this tokenizer decodes 4 to 4"):
        decoder_part(tokenizer, 3)
    with pytest.raises(InputError, match="precision int8 is not of format torch; bf16 is for torch, int8 for onnx"):
        write_part(encoder_part(tokenizer), tmp_path / "x.pt2", "torch", "int8")
    with pytest.raises(InputError, match="precision bf16 is not of format onnx"):
        write_part(encoder_part(tokenizer), tmp_path / "x.onnx", "onnx", "bf16")
    monkeypatch.setattr(files, "ONNX_BYTES", 1000)
    with pytest.raises(InputError, match=r"the weights take .* GiB, an ONNX file holds 2; take format torch"):
        write_part(encoder_part(tokenizer), tmp_path / "x.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_extra_is_named(tokenizer: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(files.importlib, "import_module", without)
    with pytest.raises(InputError, match=r"ONNX needs onnx; run: pip install 'softvq\[export\]'"):
        write_part(encoder_part(tokenizer), tmp_path / "x.onnx", "onnx")


def test_the_command(made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = Program(capsys)
    monkeypatch.chdir(made)
    written: list[tuple[Part, str, str]] = []

    def write(part: Part, out: Path, file_format: str, precision: str) -> files.Check:
        written.append((part, file_format, precision))
        Path(out).write_bytes(b"x")
        return files.Check(largest=2e-6, root_mean_square=1e-3)

    monkeypatch.setattr("softvq.commands.export.write_part", write)
    done = program("export", "model", "d.onnx", "--part", "decoder", "--precision", "int8")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        "d.onnx: decoder, int8, 0.0 MiB; largest difference 2.0e-06 of the largest output, 60.0 dB"
    )
    options = ("--steps", "3", "--sampler", "heun", "--guidance", "1.5", "--latents")
    assert program("export", "sit", "s.pt2", "--part", "sampler", *options).code == 0
    sampling = written[1][0].facts["sampling"]
    assert [each[1:] for each in written] == [("onnx", "int8"), ("torch", "float32")]
    assert (sampling["steps"], sampling["sampler"], sampling["guidance"]["scale"]) == (3, "heun", 1.5)
    assert written[1][0].output.name == "latents"
    program.refuses("export", "model", "d.onnx", names=("d.onnx", "already there"))
    program.refuses("export", "model", "d.pt2", "--format", "onnx", names=("d.pt2", ".onnx"))
    program.refuses("export", "model", "d.bin", names=("d.bin", ".pt2 or .onnx"))
    program.refuses("export", "model", "e.pt2", "--part", "decoder", "--tokens", "9", names=("tokens is 9",))
    program.refuses("export", "model", "e.pt2", "--tokens", "4", names=("--tokens is for --part decoder, not for enc",))
    options = ("--part", "decoder", "--latents")
    program.refuses("export", "model", "e.pt2", *options, names=("--latents is for --part sampler, not for decoder",))
    Path("f.pt2.json").write_text("mine")
    program.refuses("export", "model", "f.pt2", names=("f.pt2.json", "already there"))
