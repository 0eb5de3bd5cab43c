"""What a tokenizer says of its codewords, of fewer tokens, of softer posteriors, and what stays when it is saved."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.files import read_tensors
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from tests import family

CODES = 16
SHAPES = {  # axes after the token's
    "softvq": (), "softvq-euclidean": (), "vq": (), "gmmvq": (), "gumbel": (), "gumbel-hard": (),
    "product": (2,), "residual": (3,), "residual-product": (2, 2),
}  # fmt: skip
VQ = {**family.VQ, "entropy_weight": 0.0}
HARD = {
    "vq": VQ,
    "gumbel-hard": family.QUANTIZERS["gumbel-hard"],
    "product": {"kind": "product", "parts": 4, "inner": VQ},
    "residual": {"kind": "residual", "depth": 3, "inner": VQ},
    "product-residual": {"kind": "product", "parts": 2, "inner": {"kind": "residual", "depth": 2, "inner": VQ}},
}


def build(quantizer: dict[str, Any], **changes: object) -> ImageTokenizer:
    torch.manual_seed(0)
    data = {**to_dict(family.recipe(quantizer).model), **changes}
    return ImageTokenizer(from_dict(TokenizerConfig, data)).eval()


def pictures() -> Tensor:
    return family.pictures(family.recipe(family.SOFT), 0).images


@pytest.mark.parametrize("name", sorted(HARD))
@torch.no_grad()
def test_a_hard_quantizers_indices_decode_to_what_its_latents_do(name: str) -> None:
    tokenizer, images = build(HARD[name]), pictures()
    indices = tokenizer.encode_indices(images)
    assert len(indices.unique()) > 1  # equal pictures alone would not tell
    expected = tokenizer.decode_raw(tokenizer.encode_raw(images))
    torch.testing.assert_close(tokenizer.decode_indices(indices), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokenizer.decode_indices(indices, (32, 32)), expected, rtol=1e-4, atol=1e-5)
    assert tokenizer.decode_indices(indices, (16, 24)).shape == (8, 3, 16, 24)
    assert not torch.allclose(tokenizer.decode_indices((indices + 1) % CODES), expected, atol=1e-2)


@pytest.mark.parametrize("name", sorted(SHAPES))
@torch.no_grad()
def test_indices_and_top_codewords_have_an_axis_for_each_wrapper(name: str) -> None:
    tokenizer, images = build(family.QUANTIZERS[name]), pictures()
    indices = tokenizer.encode_indices(images)
    assert indices.shape == (8, 4, *SHAPES[name])
    assert 0 <= int(indices.min()) <= int(indices.max()) < CODES
    top, weights = tokenizer.top_codewords(images, 3)
    assert top.shape == weights.shape == (8, 4, *SHAPES[name], 3)
    assert torch.equal(top[..., 0], indices)
    assert (weights.diff(dim=-1) <= 0).all()
    everything = tokenizer.top_codewords(images, CODES)
    torch.testing.assert_close(everything[1].sum(dim=-1), torch.ones(indices.shape))
    assert torch.equal(everything[0].sort(dim=-1).values, torch.arange(CODES).expand(*indices.shape, CODES))
    assert torch.equal(everything[0][..., :3], top)


@torch.no_grad()
def test_the_top_codewords_with_their_weights_make_the_latents() -> None:
    tokenizer, images = build(family.SOFT), pictures()
    indices, weights = tokenizer.top_codewords(images, CODES)
    codewords = torch.stack([tokenizer.quantizer.lookup(indices[..., k]) for k in range(CODES)], dim=2)
    mixture = (weights[..., None] * codewords).sum(dim=2)
    torch.testing.assert_close(mixture, tokenizer.encode_raw(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
@torch.no_grad()
def test_a_soft_posterior_at_a_tiny_temperature_decodes_its_indices(similarity: str) -> None:
    images = pictures()
    distances = []
    for temperature in (1.0, 1e-5):
        tokenizer = build({**family.SOFT, "similarity": similarity, "temperature": temperature})
        expected = tokenizer.decode_raw(tokenizer.encode_raw(images))
        distances.append(float((tokenizer.decode_indices(tokenizer.encode_indices(images)) - expected).abs().max()))
    assert distances[0] > 0.01
    assert distances[1] < 1e-4


@pytest.mark.parametrize("kind", ["kl", "none"])
def test_without_a_codebook_there_are_no_indices(kind: str) -> None:
    tokenizer = build(family.QUANTIZERS[kind])
    message = f"the quantizer is '{kind}', which has no codewords to index"
    with pytest.raises(InputError, match=message):
        tokenizer.encode_indices(pictures())
    with pytest.raises(InputError, match=message):
        tokenizer.decode_indices(torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(InputError, match=message):
        tokenizer.top_codewords(pictures())
    assert tokenizer.statistics(pictures()) == {}


@pytest.mark.parametrize(("value", "found"), [(CODES, f"0 to {CODES}"), (-1, "-1 to 0"), (1 << 40, f"0 to {1 << 40}")])
@pytest.mark.parametrize("name", ["vq", "residual-product"])
def test_indices_that_are_no_codewords_are_refused(name: str, value: int, found: str) -> None:
    tokenizer = build(family.QUANTIZERS[name])
    indices = torch.zeros(2, 4, *SHAPES[name], dtype=torch.long)
    indices.view(-1)[5] = value
    with pytest.raises(InputError, match=f"indices are {found}, expected 0 to {CODES - 1}"):
        tokenizer.decode_indices(indices)


@pytest.mark.parametrize("k", [0, CODES + 1])
@pytest.mark.parametrize("name", ["softvq", "product", "residual-product"])
def test_more_or_fewer_codewords_than_there_are_cannot_be_the_top(name: str, k: int) -> None:
    with pytest.raises(InputError, match=rf"k is {k}, expected 1 to the codebook's size \({CODES}\)"):
        build(family.QUANTIZERS[name]).top_codewords(pictures(), k)


@torch.no_grad()
def test_the_first_tokens_alone_decode_where_the_model_allows_it() -> None:
    tokenizer, images = build(family.SOFT, min_latent_tokens=2), pictures()
    latents = tokenizer.encode(images)
    for count in (2, 3, 4):
        assert tokenizer.decode(latents[:, :count]).shape == images.shape
        part = tokenizer(images, num_tokens=count).images  # what training decodes
        torch.testing.assert_close(tokenizer.decode(latents[:, :count]), part, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tokenizer.decode(latents[:, :2]), tokenizer.decode(latents), atol=1e-3)
    for count in (1, 0):
        with pytest.raises(InputError, match=rf"latents are \[8, {count}, 8\], expected \[batch, 2 to 4, 8\]"):
            tokenizer.decode(latents[:, :count])
    with pytest.raises(InputError, match=r"latents are \[8, 8, 8\], expected \[batch, 2 to 4, 8\]"):
        tokenizer.decode(latents.repeat(1, 2, 1))


@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_other_number_of_tokens_is_refused_without_the_field(count: int) -> None:
    with pytest.raises(InputError, match=rf"latents are \[1, {count}, 8\], expected \[batch, 4, 8\]"):
        build(family.SOFT).decode(torch.zeros(1, count, 8))


@pytest.mark.parametrize("name", ["softvq", "softvq-euclidean", "gmmvq", "gumbel", "product", "residual-product"])
@torch.no_grad()
def test_a_softening_of_one_is_the_default(name: str) -> None:
    tokenizer, images, keys = build(family.QUANTIZERS[name]), pictures(), torch.arange(8)
    plain = tokenizer(images, keys)
    for one in (1.0, torch.ones(())):
        assert torch.equal(tokenizer(images, keys, softening=one).latents, plain.latents)
    assert not torch.allclose(tokenizer(images, keys, softening=3.0).latents, plain.latents, atol=1e-3)


@pytest.mark.parametrize("name", ["softvq", "softvq-euclidean", "gmmvq", "gumbel"])
@torch.no_grad()
def test_a_large_softening_makes_every_latent_the_mean_of_its_codebook(name: str) -> None:
    tokenizer = build(family.QUANTIZERS[name])
    latents = tokenizer(pictures(), torch.arange(8), softening=torch.tensor(1e7)).latents
    everything = torch.arange(CODES)[:, None].expand(CODES, 4)  # every token's codewords, one in each row
    mean = tokenizer.quantizer.lookup(everything).mean(dim=0)
    torch.testing.assert_close(latents, mean.expand(8, -1, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_softening_multiplies_the_temperature() -> None:
    warm = build({**family.SOFT, "temperature": 0.21})
    softened = build({**family.SOFT, "temperature": 0.07})
    ours = softened(pictures(), softening=3.0).images
    torch.testing.assert_close(ours, warm(pictures()).images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(family.QUANTIZERS))
@torch.no_grad()
def test_every_quantizer_survives_saving(name: str, tmp_path: Path) -> None:
    tokenizer = build(family.QUANTIZERS[name], min_latent_tokens=2)
    tokenizer.fit_statistics([pictures()], per_channel=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = ImageTokenizer.from_pretrained(tmp_path)
    assert loaded.config == tokenizer.config
    assert not loaded.training
    assert loaded.fingerprint() == tokenizer.fingerprint()
    latents = tokenizer.encode(pictures())
    assert torch.equal(loaded.encode(pictures()), latents)
    assert torch.equal(loaded.decode(latents[:, :3]), tokenizer.decode(latents[:, :3]))
    if name in SHAPES:
        assert torch.equal(loaded.encode_indices(pictures()), tokenizer.encode_indices(pictures()))


def test_the_kinds_within_kinds_are_written_down(tmp_path: Path) -> None:
    build(family.QUANTIZERS["residual-product"]).save_pretrained(tmp_path)
    tensors, _ = read_tensors(tmp_path / "model.safetensors")
    expected = {f"quantizer.stages.{i}.stages.{j}.codebook" for i in range(2) for j in range(2)} | {"quantizer.scales"}
    assert {name for name in tensors if name.startswith("quantizer.")} == expected
    quantizer = json.loads((tmp_path / "config.json").read_text())["quantizer"]
    kinds = [quantizer["kind"], quantizer["inner"]["kind"], quantizer["inner"]["inner"]["kind"]]
    assert kinds == ["residual", "product", "softvq"]


@pytest.mark.parametrize("name", sorted(family.QUANTIZERS))
def test_a_frozen_encoder_gives_the_latents_of_use_and_the_decoder_alone_learns(name: str) -> None:
    tokenizer = build(family.QUANTIZERS[name]).train()
    tokenizer.freeze_encoder()
    output = tokenizer(pictures(), torch.arange(8))
    assert torch.equal(output.latents, tokenizer.encode_raw(pictures()))
    assert not output.latents.requires_grad
    assert output.losses == {}
    torch.testing.assert_close(output.images, tokenizer.decode_raw(output.latents))
    output.images.square().mean().backward()
    parts = {part for part, _ in tokenizer.named_children()}
    assert parts == {"encoder", "to_latents", "quantizer", "from_latents", "decoder"}
    for key, parameter in tokenizer.named_parameters():
        learns = key.startswith(("decoder.", "from_latents."))
        assert parameter.requires_grad == learns
        assert (parameter.grad is not None and bool((parameter.grad != 0).any())) == learns, key


@torch.no_grad()
def test_fresh_keys_are_drawn_where_none_are_given() -> None:
    tokenizer = build(family.QUANTIZERS["kl"])
    torch.manual_seed(1)
    first, second = tokenizer(pictures()).latents, tokenizer(pictures()).latents
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(tokenizer(pictures()).latents, first)


def test_the_first_indices_decode_with_the_codebooks_they_are_of() -> None:
    tokenizer = build(family.VQ, min_latent_tokens=1)
    images = pictures()
    indices, latents = tokenizer.encode_indices(images), tokenizer.encode_raw(images)
    for count in range(1, latents.shape[1] + 1):
        found = tokenizer.decode_indices(indices[:, :count])
        torch.testing.assert_close(found, tokenizer.decode_raw(latents[:, :count]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("vq", (1, 3), "batch, 4"),
        ("vq", (1, 4, 1), "batch, 4"),
        ("residual", (1, 4), "batch, 4, 3"),
        ("residual", (1, 4, 5), "batch, 4, 3"),
        ("residual-product", (1, 4, 2), "batch, 4, 2, 2"),
    ],
)
def test_indices_of_another_shape_are_refused(name: str, shape: tuple[int, ...], expected: str) -> None:
    indices = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(InputError, match=re.escape(f"indices are {list(shape)}, expected [{expected}]")):
        build(family.QUANTIZERS[name]).decode_indices(indices)


@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 4, 5), (8,), (4, 8), (1, 3, 8)])
@pytest.mark.parametrize("how", ["decode", "decode_raw"])
def test_latents_of_another_shape_are_never_stretched(how: str, shape: tuple[int, ...]) -> None:
    tokenizer = build(family.VQ)
    function = getattr(ImageTokenizer, how)
    unchecked = getattr(function, "__wrapped__", function)  # without the tests' own check of shapes
    with pytest.raises(InputError, match=re.escape(f"latents are {list(shape)}, expected [batch, 4, 8]")):
        unchecked(tokenizer, torch.zeros(shape))


def test_indices_are_whole_numbers_of_any_width() -> None:
    tokenizer, images = build(family.VQ), pictures()
    indices = tokenizer.encode_indices(images)
    assert torch.equal(tokenizer.decode_indices(indices.to(torch.int16)), tokenizer.decode_indices(indices))
    with pytest.raises(InputError, match=r"indices are torch.float32, expected whole numbers"):
        getattr(ImageTokenizer.decode_indices, "__wrapped__", ImageTokenizer.decode_indices)(tokenizer, indices.float())
