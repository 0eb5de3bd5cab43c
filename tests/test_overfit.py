"""The tiny preset can learn: a handful of real photographs by heart."""

import shutil
from pathlib import Path

import pytest
import torch

import softvq
from softvq.config import from_dict
from softvq.data.folder import DataConfig, PhotoFolder
from softvq.evaluation.metrics import psnr
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.training.tokenizer_recipe import TokenizerRunConfig, expand_preset
from softvq.training.tokenizer_run import train_tokenizer

PHOTOS = Path(softvq.__file__).parent / "assets/photos/val"


@pytest.mark.slow
@pytest.mark.timeout(900)  # two minutes of computing, on a machine that has nothing else to do
def test_the_tiny_preset_brings_a_handful_of_photographs_above_25_db(tmp_path: Path) -> None:
    """Train on six bundled photographs and reconstruct the same six."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(PHOTOS.rglob("*.jpg"))[::4]:
        shutil.copy(path, photos)
    steps = 360
    recipe = {
        "model": {"preset": "softvq-tiny-32", "image_size": 64},
        "data": {"path": str(photos), "crop": "center", "flip": False},
        "loss": {"perceptual_weight": 0.0},
        "optim": {"kind": "muon", "lr": 2e-3, "warmup_steps": 10, "min_lr_ratio": 0.02},
        "train": {
            "batch_size": 6,
            "steps": steps,
            "save_every": steps,
            "sample_every": 0,
            "ema_decay": 0.9,
            "device": "cpu",
        },
    }
    config = from_dict(TokenizerRunConfig, expand_preset(recipe))
    tokenizer = ImageTokenizer.from_pretrained(train_tokenizer(config, tmp_path / "run"))
    folder = PhotoFolder(photos, 64, DataConfig(crop="center", flip=False), seed=0)
    images = torch.stack([folder[position].image for position in range(len(folder))])
    with torch.no_grad():
        reconstructions = tokenizer.decode(tokenizer.encode(images))
    assert len(images) == 6
    worst = float(psnr(reconstructions, images).min())
    assert worst > 25
