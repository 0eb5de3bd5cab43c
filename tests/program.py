"""What the tests of the program share: a model small enough to be made anew, photographs, and a way to run commands."""

import contextlib
import io
import json
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.cli import main
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.quantizers import SoftVQConfig
from softvq.tokenizers.vit import ViTConfig

SIZE = 32
PATCH = 8
TOKENS = 4
DIM = 8
VIT = ViTConfig(width=24, depth=1, num_heads=2)
MODEL = TokenizerConfig(
    encoder=VIT,
    decoder=VIT,
    num_latent_tokens=TOKENS,
    latent_dim=DIM,
    quantizer=SoftVQConfig(codebook_size=16, num_codebooks=2),
    image_size=SIZE,
    patch_size=PATCH,
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Program:
    """Runs `softvq` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        self._capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *self._capsys.readouterr())

    def refuses(self, *arguments: object, code: int = 2, names: tuple[object, ...]) -> str:
        """Run a command that must fail with one sentence, which names all of `names`; return it."""
        result = self(*arguments)
        assert result.code == code, result
        *remarks, sentence = result.err.splitlines()
        assert all(remark.startswith("skipped: ") for remark in remarks), result.err
        assert sentence.startswith("softvq: "), result.err
        assert "Traceback" not in result.err
        assert result.out == ""
        missing = [name for name in map(str, names) if name not in sentence]
        assert not missing, f"{missing} not in: {sentence}"
        return sentence


def make_model(folder: Path, seed: int = 0) -> ImageTokenizer:
    """Save a model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = ImageTokenizer(MODEL).eval()
    tokenizer.save_pretrained(folder)
    return tokenizer


def work_beside(made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change into an empty folder, with a link to everything that was made once for all tests."""
    monkeypatch.chdir(folder)
    for path in made.iterdir():
        (folder / path.name).symlink_to(path)


def photograph(height: int = 48, width: int = 40, seed: int = 0) -> Image.Image:
    """Draw smooth colours with a little noise: a picture that no encoder of files can make perfect."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (3 + channel) + seed) + np.cos(columns / (5 + channel)) for channel in range(3)]
    pixels = 128 + 50 * np.stack(waves, axis=-1) + generator.normal(0, 5, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_photos(folder: Path, names: tuple[str, ...] = ("a.png", "b.jpg", "sub/c.webp")) -> list[Path]:
    """Write photographs of different sizes."""
    paths = [folder / name for name in names]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(48 + 8 * number, 40, seed=number).save(path)
    return paths


@contextlib.contextmanager
def full_disk(room: int = 512) -> Iterator[None]:
    """Let no file grow beyond `room` bytes, as on a disk that has become full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, to see that nothing was touched and nothing left behind."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_recipe(path: Path, **changes: object) -> Path:
    """Write a recipe that trains for two steps; `train__steps=3` changes a field."""
    vit = {"width": 24, "depth": 1, "num_heads": 2}
    quantizer = {"kind": "softvq", "codebook_size": 16, "num_codebooks": 2}
    model = {"encoder": vit, "decoder": vit, "num_latent_tokens": TOKENS, "latent_dim": DIM, "quantizer": quantizer}
    recipe: dict[str, dict[str, object]] = {
        "model": {**model, "image_size": SIZE, "patch_size": PATCH},
        "loss": {"perceptual_weight": 0.0},
        "train": {"batch_size": 2, "steps": 2, "log_every": 1, "sample_every": 0, "device": "cpu"},
    }
    for name, value in changes.items():
        group, _, field = name.partition("__")
        recipe.setdefault(group, {})[field] = value
    path.write_text(json.dumps(recipe))  # which is YAML too
    return path


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
