"""The fast path of inference computes what the plain one does, and nothing else changes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.transformer import TransformerConfig
from softvq.inference.accelerate import accelerate, fuse
from softvq.inference.blocks import Product
from softvq.inference.rows import FP8, FP8_MAX, activate, add_norm, attend
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.vit import ViTConfig

BOUND = {"bf16": 1e-2, "fp8": 1e-1}
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def shaken(model):
    """Give every parameter a say: fresh models have gates, biases and modulations of zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def generator_of(*, qk_norm=False):
    torch.manual_seed(0)
    network = TransformerConfig(width=64, depth=3, num_heads=4, qk_norm=qk_norm)
    return shaken(LatentGenerator(GeneratorConfig(num_tokens=6, latent_dim=8, num_classes=5, network=network)))


def tokenizer_of():
    torch.manual_seed(0)
    vit = ViTConfig(width=48, depth=3, num_heads=3)
    config = TokenizerConfig(encoder=vit, decoder=vit, num_latent_tokens=4, latent_dim=8, image_size=32, patch_size=8)
    return shaken(ImageTokenizer(config))


def evaluate(generator):
    noisy = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1))
    device = next(generator.parameters()).device
    given = (noisy, torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.arange(4), torch.tensor([False, False, True, True]))
    with torch.inference_mode():
        return generator.network(*(one.to(device) for one in given)).float().cpu()


def away(found, expected):
    return float((found - expected).norm() / expected.norm())


def plain(rows):
    values, scales = rows
    return values.float() if scales is None else values.float() * scales


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_fused_generator_computes_what_the_plain_one_does(precision, qk_norm):
    generator = generator_of(qk_norm=qk_norm)
    expected = evaluate(generator)
    fuse(generator.network, precision)
    assert 0 < away(evaluate(generator), expected) < BOUND[precision]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)])
def test_a_fused_tokenizer_computes_what_the_plain_one_does(precision, size):
    tokenizer = tokenizer_of()
    images = torch.rand(3, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        encoded = tokenizer.encode_pre(images)  # quantized, two near codewords may change places
        decoded = tokenizer.decode(tokenizer.encode(images), size)
        latents = tokenizer.encode(images)
        fuse(tokenizer, precision)
        assert 0 < away(tokenizer.encode_pre(images), encoded) < BOUND[precision]
        assert 0 < away(tokenizer.decode(latents, size), decoded) < BOUND[precision]


def test_what_is_saved_stays_as_it_was():
    generator = generator_of()
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    fuse(generator.network, "fp8")
    after = generator.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_add_norm_is_the_sum_of_a_branch_and_its_layer_norm():
    torch.manual_seed(0)
    stream, branch = torch.randn(6, 10), torch.randn(6, 10)
    gate, scale, shift = torch.randn(3, 3, 10)
    given = stream.clone()
    total, rows = add_norm(
        stream, (branch, gate), (scale, shift), plus=1.0, eps=1e-6, dtype=torch.float32, in_place=False
    )
    expected = stream + branch * gate[[0, 0, 1, 1, 2, 2]]
    normed = F.layer_norm(expected, (10,)) * (1 + scale[[0, 0, 1, 1, 2, 2]]) + shift[[0, 0, 1, 1, 2, 2]]
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(rows[0], normed, rtol=1e-4, atol=1e-5)
    assert torch.equal(stream, given)
    same, _ = add_norm(stream, (branch, gate), None, plus=0.0, eps=0.0, dtype=torch.float32, in_place=True)
    assert same is stream
    torch.testing.assert_close(stream, expected)


@pytest.mark.parametrize("kind", ["none", "gelu", "gelu_tanh"])
def test_float8_rows_are_off_by_no_more_than_its_three_bits_allow(kind):
    hidden = 5 * torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    hidden[0] = 0
    exact = hidden if kind == "none" else F.gelu(hidden, approximate="tanh" if kind == "gelu_tanh" else "none")
    values, scales = activate(hidden, kind, FP8)
    # half a unit in the last of three bits; below 2^-6 numbers are spaced evenly, by 2^-9
    bound = torch.maximum(exact.abs() / 16, scales * 2**-10) * (1 + 1e-6)
    assert ((plain((values, scales)) - exact).abs() <= bound).all()
    assert float(values.float().abs().max()) == FP8_MAX
    assert not values[0].float().any()


def test_a_float8_product_is_near_that_of_its_layer():
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    layer.weight.data[0] *= 1e3  # each output has a scale of its own, so that the others keep their bits
    rows = torch.randn(50, 64)
    expected = layer(rows).detach()
    found = Product.of(layer, FP8)(activate(rows, "none", FP8)).float()
    for column in (0, 1, 31):
        assert away(found[:, column], expected[:, column]) < 0.06


def test_attention_is_that_of_every_image_alone():
    torch.manual_seed(0)
    packed = torch.randn(2 * 5, 3 * 4 * 8)
    found = attend(packed, 5, 4)
    for image in (0, 1):
        q, k, v = packed[5 * image : 5 * image + 5].view(5, 3, 4, 8).permute(1, 2, 0, 3)
        expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
        torch.testing.assert_close(found[5 * image : 5 * image + 5], expected.transpose(0, 1).reshape(5, 32))


def test_what_cannot_be_fast_is_refused_in_a_sentence():
    with pytest.raises(InputError, match="only on CUDA"):
        accelerate(tokenizer_of())
    vit = ViTConfig(width=24, depth=1, num_heads=3)
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    narrow = ImageTokenizer(TokenizerConfig(encoder=vit, decoder=vit, **sizes))
    with pytest.raises(InputError, match=r"width of (24|72)"):
        fuse(narrow, "fp8")


def test_fp8_is_refused_where_it_cannot_be():
    network = TransformerConfig(width=32, depth=1, num_heads=2)
    generator = LatentGenerator(GeneratorConfig(num_tokens=4, latent_dim=8, num_classes=3, network=network))
    pipeline = GenerationPipeline(generator.eval(), tokenizer_of())
    with pytest.raises(InputError, match="fp8 needs networks in bf16 on CUDA"):
        pipeline.compile(fp8=True)


def test_compiled_code_takes_the_same_activation():
    act = generator_of().network.blocks[0].mlp.act
    given = torch.linspace(-8, 8, 1001)
    compiled = torch.compile(act, backend="eager")
    torch.testing.assert_close(compiled(given), F.gelu(given, approximate="tanh"), rtol=1e-5, atol=1e-6)


KERNELS = """
import torch
import torch.nn.functional as F
from softvq.inference import rows, triton_kernels as kernels

torch.manual_seed(0)
for width in (64, 96, 10):
    stream, branch = torch.randn(6, width), torch.randn(6, width)
    gate, scale, shift = torch.randn(3, 6 * width).chunk(6, dim=1)[:3]
    how = {"plus": 1.0, "eps": 1e-6, "dtype": torch.float32}
    out = torch.empty_like(stream)
    found, _ = kernels.add_norm(stream, out, (branch, gate), (scale, shift), tokens=2, **how)
    total, (expected, _) = rows.add_norm(stream, (branch, gate), (scale, shift), in_place=False, **how)
    torch.testing.assert_close(out, total)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for kind in ("gelu", "gelu_tanh"):
        found, _ = kernels.activate(3 * stream, kind, torch.float32)
        torch.testing.assert_close(found, rows.activate(3 * stream, kind, torch.float32)[0], rtol=1e-5, atol=1e-6)
    values, scales = kernels.activate(stream, "none", rows.FP8)
    assert float((values.float() * scales - stream).norm() / stream.norm()) < 0.1
for tokens, heads, dim in ((5, 2, 16), (16, 3, 24)):
    packed = torch.randn(2 * tokens, 3 * heads * dim)
    torch.testing.assert_close(kernels.attend(packed, tokens, heads), rows.attend(packed, tokens, heads))
"""


def test_the_kernels_compute_what_plain_torch_does():
    pytest.importorskip("triton", reason="triton is not installed: torch here is one without CUDA")
    # its interpreter has to be chosen before it is imported; it rounds to float8 towards zero, hence the wide bound
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNELS], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_accelerated_models_compute_what_plain_ones_do(precision):
    generator, tokenizer = generator_of(), tokenizer_of()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        expected, latents = evaluate(generator), tokenizer.encode(images)
        painted = tokenizer.decode(latents)
        accelerate(generator.to("cuda").to(torch.bfloat16).network, precision)
        assert away(evaluate(generator), expected) < 2 * BOUND[precision]  # all of it is bf16, not its blocks alone
        accelerate(tokenizer.to("cuda"), precision)
        first = tokenizer.decode(latents.cuda())
        kept = first.clone()
        assert away(first.float().cpu(), painted) < 2 * BOUND[precision]
        tokenizer.decode(latents.cuda() + 1)
        assert torch.equal(first, kept)  # a result is not overwritten by the next
        assert tokenizer.decode(latents[:1].cuda()).shape[0] == 1
