"""Which tokenizers are the same, and which make the same latents."""

import dataclasses

import pytest
import torch

from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.quantizers import SoftVQConfig
from tests.program import MODEL


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(MODEL).eval()


def test_the_fingerprint_tells_weights_statistics_and_configs_apart(tokenizer):
    first = tokenizer.fingerprint()
    tokenizer.latent_mean[0] = 1
    second = tokenizer.fingerprint()
    softer = dataclasses.replace(MODEL, quantizer=SoftVQConfig(codebook_size=16, num_codebooks=2, temperature=0.08))
    other = ImageTokenizer(softer)
    other.load_state_dict(tokenizer.state_dict())
    assert len({first, second, other.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("encoder.latent_tokens", True),
        ("to_latents.weight", True),
        ("quantizer.codebook", True),
        ("latent_std", True),
        ("from_latents.weight", False),
        ("decoder.mask_token", False),
    ],
)
def test_the_latents_fingerprint_is_of_what_decides_them(tokenizer, name, decides):
    before = tokenizer.latent_fingerprint()
    tokenizer.state_dict()[name].add_(1)
    assert (tokenizer.latent_fingerprint() != before) == decides


@pytest.mark.parametrize(
    ("change", "decides"),
    [
        ({"quantizer": SoftVQConfig(codebook_size=16, num_codebooks=2, temperature=0.08)}, True),
        ({"quantizer": SoftVQConfig(codebook_size=16, num_codebooks=2, entropy_weight=0.5)}, False),
        ({"min_latent_tokens": 1}, False),
        ({"head_channels": 3}, False),
        ({"encoder": dataclasses.replace(MODEL.encoder, layer_scale_init=0.5)}, False),
        ({"decoder": dataclasses.replace(MODEL.decoder, depth=MODEL.decoder.depth + 1)}, False),
    ],
)
def test_a_config_decides_latents_unless_it_is_of_training_or_the_decoder(tokenizer, change, decides):
    other = ImageTokenizer(dataclasses.replace(MODEL, **change))
    other.load_state_dict(tokenizer.state_dict(), strict=False)
    assert (other.latent_fingerprint() != tokenizer.latent_fingerprint()) == decides
