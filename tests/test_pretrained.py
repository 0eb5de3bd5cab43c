"""The models that come with the package: small, whole, attributed, and good for what their cards say."""

import torch
from safetensors import safe_open

from softvq import GenerationPipeline, ImageTokenizer
from softvq.commands.demo_photos import photos_of
from softvq.data.images import center_crop, read_image, to_tensor
from softvq.evaluation.metrics import psnr
from softvq.evaluation.probing import evenly
from softvq.generators.generator import LatentGenerator
from softvq.pretrained import FOLDER, bundled

NAMES = ("photos-64", "flowers-dit")


def test_they_are_small_and_attributed() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/config.json")} == set(NAMES)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 40e6
    assert (FOLDER / "photos-64/model.safetensors").stat().st_size < 30e6
    ids = (FOLDER / "flowers.txt").read_text().split()
    assert len(set(ids)) == len(ids) == 2004
    assert all(text in (FOLDER / "ATTRIBUTION.txt").read_text() for text in ("CC0", "MIT", "Creative Commons", *NAMES))
    for name in NAMES:
        assert "Licence" in (FOLDER / name / "README.md").read_text()
        with safe_open(FOLDER / name / "model.safetensors", "pt") as file:
            assert all(file.get_tensor(key).dtype == torch.float16 for key in file.keys())  # noqa: SIM118


@torch.inference_mode()
def test_the_tokenizer_brings_photographs_back_and_more_tokens_more_of_them() -> None:
    tokenizer = ImageTokenizer.from_pretrained("photos-64")
    paths = sorted(photos_of("val").rglob("*.jpg"))
    chosen = [paths[i] for i in evenly(len(paths), 6)]
    images = torch.stack([to_tensor(center_crop(read_image(path), 256)) for path in chosen])
    latents = tokenizer.encode(images)
    assert latents.shape == (6, 64, 32)
    means = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    found = [psnr(tokenizer.decode(latents[:, :n]).clamp(-1, 1), images).mean() for n in (16, 32, 64)]
    assert psnr(means, images).mean() + 4 < found[0] < found[1] - 0.5 < found[2] - 1.0
    assert found[2] > 20
    assert latents.std() < 1.5


def test_the_generator_belongs_to_the_tokenizer_and_draws_what_it_is_asked_for() -> None:
    folder = bundled("flowers-dit")
    assert folder is not None
    generator = LatentGenerator.from_pretrained(folder)
    assert generator.tokenizer is not None
    assert generator.tokenizer.fingerprint == ImageTokenizer.from_pretrained("photos-64").latent_fingerprint()
    pipeline = GenerationPipeline.from_pretrained("flowers-dit")
    images = pipeline(["daisy", "dandelion", "rose", "sunflower", "tulip"], seed=2, steps=8)
    assert images.shape == (5, 3, 256, 256)
    red, _, blue = (images[:, channel].mean(dim=(1, 2)) for channel in range(3))
    assert (red - blue)[3] > (red - blue)[:2].max()  # sunflowers are yellow
    assert images.std() > 0.3
