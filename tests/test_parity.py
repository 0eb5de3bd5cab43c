"""The released tokenizers load by their own names and compute what the released code computed.

The arrays in `tests/parity/` were made by the released code; its weights are a pure function of their names and shapes
(`fill.py`), so a folder in the released format is written here, loaded by name, and compared.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from softvq.errors import InputError
from softvq.tokenizers import released
from softvq.tokenizers.alignment import Projector, alignment_loss
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.quantizers import KL, VQ, SoftVQ
from tests.parity import fill

PARITY = Path(__file__).parent / "parity"
CASES = sorted(path.stem for path in PARITY.glob("*_small_32*.json"))
IMAGES = torch.from_numpy(fill.image(1, 256, seed=0))


def description_of(case):
    return json.loads((PARITY / f"{case}.json").read_text())


def released_alignment(description, latents):
    """Align latents with the case's teacher, a DINOv2 ViT-S at 256 pixels and patches of 16."""
    state = {name: torch.from_numpy(fill.fill(name, tuple(shape))) for name, shape in description["state_dict"].items()}
    teacher = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=256, patch_size=16)
    teacher.load_state_dict({k.removeprefix("repa_model."): v for k, v in state.items() if k.startswith("repa_model.")})
    projector = Projector(32, 64, 384)
    projector.load_state_dict(
        {k.removeprefix("projection."): v for k, v in state.items() if k.startswith("projection.")}
    )
    mean, std = (torch.tensor(pair).view(3, 1, 1) for pair in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    features = teacher.eval().forward_features((IMAGES * 0.5 + 0.5 - mean) / std)[:, 1:]
    return alignment_loss(projector(latents), features)


def write_released_folder(case, folder, leave_out=()):
    """Write the case as a released repository would hold it."""
    description = description_of(case)
    state = {
        name: torch.from_numpy(fill.fill(name, tuple(shape)))
        for name, shape in description["state_dict"].items()
        if not name.startswith(tuple(leave_out))
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description["config"]))
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Give a case's name, its tokenizer, loaded by a released repository's name, and the released code's arrays."""
    folder = write_released_folder(request.param, tmp_path_factory.mktemp(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
        tokenizer = ImageTokenizer.from_pretrained("SoftVQVAE/softvq-l-64")
    return request.param, tokenizer, load_file(PARITY / f"{request.param}.safetensors")


def close(ours, theirs):
    np.testing.assert_allclose(ours.detach().numpy(), theirs.numpy(), atol=1e-4, rtol=0)


def test_every_array_matches(case):
    name, tokenizer, expected = case
    quantizer = tokenizer.quantizer
    with torch.no_grad():
        pre = tokenizer.encode_pre(IMAGES)
        latents = tokenizer.encode_raw(IMAGES)
        reconstruction = tokenizer.decode_raw(latents)
    _, losses = quantizer(pre)
    computed = {
        "recon_stride8": reconstruction[:, :, ::8, ::8],
        "recon_mean_std": torch.stack([reconstruction.mean(), reconstruction.std()]),
        "z": latents,
    }
    match quantizer:
        case SoftVQ():
            unit = torch.nn.functional.normalize(pre, dim=-1)
            computed["cos_z_zq"] = torch.cosine_similarity(unit, latents, dim=-1).mean()[None]
            computed["mean_max_prob"] = quantizer.statistics(pre)["max_probability"][None]
            computed["train_entropy_loss"] = losses["entropy"][None]
            computed["train_commit_loss"] = computed["train_vq_loss"] = torch.zeros(1)
        case VQ():
            computed["train_commit_loss"] = losses["commitment"][None]
            computed["train_vq_loss"] = losses["codebook"][None]
            computed["train_entropy_loss"] = losses["entropy"][None]
        case KL():
            computed["mean"], computed["logvar"] = quantizer.moments(pre)
            computed["kl_per_image"] = quantizer.divergence(pre)
    if "train_alignment_loss" in expected:
        computed["train_alignment_loss"] = 0.1 * released_alignment(description_of(name), latents)[None]
    for name, theirs in expected.items():
        if name == "indices":
            groups = theirs.shape[1] if isinstance(quantizer, SoftVQ) else 1
            np.testing.assert_array_equal(
                quantizer.indices(pre).reshape(1, groups, -1).numpy().ravel(), theirs.numpy().ravel()
            )
        else:
            close(computed[name], theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": "abc"}, "tau is 'abc', expected a finite number"),
        ({"vq_std": 0}, "vq_mean is 0.0 and vq_std 0.0"),
        ({"codebook_embed_dim": 10**12}, "codebook_embed_dim is 1000000000000"),
        ({"image_size": "256"}, "image_size is '256', expected a whole number"),
        ({"encoder_model": "resnet50"}, "encoder_model is 'resnet50'"),
    ],
)
def test_released_configs_that_cannot_be_are_named(change, message, tmp_path):
    config = description_of("softvq_small_32")["config"] | change
    with pytest.raises(InputError, match=message):
        released.convert(config, {"quantize.embedding": torch.zeros(4, 512, 32)}, "here")


@pytest.mark.parametrize(
    "name", ["quantize.codebook_used_too", "to_latents.weight", "projection.9.weight", "latent_mean"]
)
def test_no_other_key_of_a_released_file_is_forgiven(name):
    config = description_of("softvq_small_32")["config"]
    with pytest.raises(InputError, match=f"the weights hold '{name}', which no released tokenizer has"):
        released.convert(config, {name: torch.zeros(1)}, "here")
