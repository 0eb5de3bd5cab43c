"""The adapters answer as diffusers' classes do, with the numbers of the plain interface."""

from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from softvq.adapters import AutoencoderTokens, Posterior, TokensPipeline
from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.transformer import TransformerConfig
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.baselines import KLConfig
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.vit import ViTConfig


@pytest.fixture
def unchecked() -> Iterator[None]:
    """What a user has, without the checks of signatures that run in tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tokenizer_of(**fields):
    torch.manual_seed(0)
    vit = ViTConfig(width=32, depth=1, num_heads=2)
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    tokenizer = ImageTokenizer(TokenizerConfig(encoder=vit, decoder=vit, **sizes, **fields)).eval()
    tokenizer.latent_mean += 0.3
    tokenizer.latent_std *= 2.0
    return tokenizer


def images_of(count=2, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gaussian(seed=0, shape=(2, 4, 8), dtype=torch.float64):
    noise = torch.Generator().manual_seed(seed)
    return Posterior(*(torch.randn(shape, generator=noise, dtype=dtype) for _ in range(2)))


def test_the_posterior_of_softvq_is_a_point():
    tokenizer, images = tokenizer_of(), images_of()
    model = AutoencoderTokens(tokenizer)
    found = model.encode(images).latent_dist
    expected = tokenizer.encode(images)
    assert torch.equal(found.mode(), expected)
    assert torch.equal(found.sample(), expected)
    assert torch.equal(model.decode(expected).sample, tokenizer.decode(expected))
    assert torch.equal(model(images).sample, tokenizer.decode(expected))
    assert not found.std.any()
    assert not found.var.any()
    assert found.logvar.exp().tolist() == found.var.tolist()
    assert found.kl().tolist() == found.nll(expected).tolist() == [0, 0]
    assert (model.config.scaling_factor, model.config.shift_factor, model.config.latent_channels) == (1.0, None, 8)


def test_answers_have_names_and_places():
    tokenizer, images = tokenizer_of(), images_of()
    model, latents = AutoencoderTokens(tokenizer), tokenizer.encode(images)
    for found in (model.encode(images), model.encode(images, return_dict=False), model.encode(images, False)):
        assert found[0] is found.latent_dist
        (alone,) = found
        assert torch.equal(alone.mean, latents)
    for found in (model.decode(latents), model.decode(latents, return_dict=False, generator=None)):
        assert found[0] is found.sample
        assert torch.equal(found[0], tokenizer.decode(latents))


def test_the_posterior_of_kl_is_its_gaussian_in_normalised_latents():
    tokenizer, images = tokenizer_of(quantizer=KLConfig()), images_of(1)
    with torch.no_grad():
        found = AutoencoderTokens(tokenizer).encode(images).latent_dist
        mean, log_variance = tokenizer.quantizer.moments(tokenizer.encode_pre(images))
    torch.testing.assert_close(found.mean, (mean - 0.3) / 2)
    torch.testing.assert_close(found.std, (log_variance / 2).exp() / 2)
    torch.testing.assert_close(found.var, found.std.square())
    many = torch.stack([found.sample(torch.Generator().manual_seed(seed)) for seed in range(400)])
    torch.testing.assert_close(many.mean(0), found.mean, rtol=0, atol=5 * float(found.std.max()) / 20)
    torch.testing.assert_close(many.std(0).mean(), found.std.mean(), rtol=0.05, atol=0)


def test_divergence_and_likelihood_are_those_of_gaussians():
    one, two, latents = gaussian(), gaussian(1), gaussian(2).mean
    p, q = Normal(one.mean, one.std), Normal(two.mean, two.std)
    normal = Normal(torch.zeros_like(one.mean), torch.ones_like(one.std))
    torch.testing.assert_close(one.kl(), kl_divergence(p, normal).sum(dim=(1, 2)))
    torch.testing.assert_close(one.kl(two), kl_divergence(p, q).sum(dim=(1, 2)))
    torch.testing.assert_close(one.nll(latents), -p.log_prob(latents).sum(dim=(1, 2)))
    torch.testing.assert_close(one.nll(latents, dims=[2]), -p.log_prob(latents).sum(dim=2))
    rough = Posterior(one.mean.bfloat16(), one.logvar.bfloat16())
    exact = Posterior(rough.mean.double(), rough.logvar.double())
    torch.testing.assert_close(rough.kl().double(), exact.kl(), rtol=1e-6, atol=0)
    assert rough.kl().dtype == torch.float32
    assert rough.sample().dtype == torch.bfloat16


def test_a_draw_is_of_one_generator_or_of_one_for_each_image():
    posterior = gaussian(dtype=torch.float32)
    drawn = posterior.sample([torch.Generator().manual_seed(seed) for seed in (3, 4)])
    for row, seed in enumerate((3, 4)):
        alone = Posterior(posterior.mean[row, None], posterior.logvar[row, None])
        assert torch.equal(alone.sample(torch.Generator().manual_seed(seed))[0], drawn[row])
    noise = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    expected = posterior.mean + posterior.logvar.exp().sqrt() * noise
    torch.testing.assert_close(posterior.sample(torch.Generator().manual_seed(3)), expected)


def test_gradients_through_decode_are_finite_differences():
    model = AutoencoderTokens(tokenizer_of(quantizer=KLConfig())).double().requires_grad_(False)
    latents = gaussian(shape=(1, 4, 8)).mean.requires_grad_()
    shade = images_of(1).double()
    assert torch.autograd.gradcheck(lambda z: (model.decode(z).sample * shade).sum(), latents)


@pytest.mark.parametrize("fields", [{}, {"quantizer": KLConfig()}])
def test_gradients_through_encode_are_finite_differences(fields):
    model = AutoencoderTokens(tokenizer_of(**fields)).requires_grad_(False)
    weights, images = gaussian(shape=(1, 4, 8), dtype=torch.float32).mean, images_of(1).requires_grad_()

    def loss(images):
        found = model.encode(images).latent_dist
        return (found.sample(torch.Generator().manual_seed(0)) * weights).sum()

    (gradient,) = torch.autograd.grad(loss(images), images)
    assert gradient.abs().max() > 0
    step = 3e-3 * gradient.detach() / gradient.abs().max()
    with torch.no_grad():
        difference = (loss(images + step) - loss(images - step)) / 2
    torch.testing.assert_close(difference, (gradient * step).sum(), rtol=2e-2, atol=0)


def test_what_is_made_without_gradients_may_be_learned_from():
    model = AutoencoderTokens(tokenizer_of())
    with torch.no_grad():
        latents = model.encode(images_of()).latent_dist.sample()
        painted = model.decode(latents).sample
    scale = torch.ones((), requires_grad=True)
    ((latents * scale).square().sum() + (painted * scale).square().sum()).backward()
    torch.testing.assert_close(scale.grad, 2 * (latents.square().sum() + painted.square().sum()))


@pytest.mark.parametrize("fields", [{}, {"quantizer": KLConfig()}])
def test_it_moves_and_freezes_as_modules_do(fields):
    model = AutoencoderTokens(tokenizer_of(**fields))
    exact = model.encode(images_of()).latent_dist
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(weight.requires_grad for weight in model.requires_grad_(False).parameters())
    assert model.train().tokenizer.training
    assert not model.eval().tokenizer.training
    assert model.to("cpu", torch.bfloat16) is model
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    found = model.encode(images_of().bfloat16()).latent_dist
    assert {found.mean.dtype, found.logvar.dtype, found.sample().dtype} == {torch.bfloat16}
    assert model.decode(found.mode()).sample.dtype == torch.bfloat16
    torch.testing.assert_close(found.mean.float(), exact.mean, rtol=0.1, atol=0.05)
    assert model.to(torch.float32).dtype == torch.float32


def test_pictures_of_another_size_come_back_in_it():
    tokenizer = tokenizer_of()
    images = torch.zeros(1, 3, 16, 40)
    latents = tokenizer.encode(images)
    model = AutoencoderTokens(tokenizer)
    assert torch.equal(model(images).sample, tokenizer.decode(latents, (16, 40)))
    assert torch.equal(model.decode(latents, size=(16, 40)).sample, tokenizer.decode(latents, (16, 40)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda model: model.encode([[0.0]]), "images are of type list, expected a tensor"),
        (lambda model: model.encode(torch.zeros(3, 32, 32)), r"images are \[3, 32, 32\]"),
        (lambda model: model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), "images are torch.uint8"),
        (lambda model: model.encode(torch.zeros(1, 3, 32, 33)), "32x33 pixels"),
        (lambda model: model.decode(np.zeros((1, 4, 8))), "latents are of type ndarray, expected a tensor"),
        (lambda model: model.decode(torch.zeros(1, 8, 2, 2)), r"latents are \[1, 8, 2, 2\], expected \[batch, 4, 8\]"),
        (lambda model: model.decode(torch.zeros(1, 4, 8).long()), "latents are torch.int64, expected floats"),
        (lambda model: gaussian().sample(7), "generator is 7, expected a torch.Generator"),
        (lambda model: gaussian().sample([torch.Generator()] * 3), "3 generators for 2 images"),
        (lambda model: gaussian().nll(torch.zeros(2, 4)), r"latents are \[2, 4\], expected \[2, 4, 8\]"),
        (lambda model: gaussian().kl(gaussian(shape=(1, 4, 8))), r"of latents \[1, 4, 8\]"),
        (lambda model: gaussian().kl(model.encode(images_of()).latent_dist), "is a point, expected a Gaussian"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_used_is_one_sentence(call, said):
    with pytest.raises(InputError, match=said):
        call(AutoencoderTokens(tokenizer_of()))


@pytest.fixture
def plain():
    network = TransformerConfig(width=32, depth=1, num_heads=2)
    generator = LatentGenerator(GeneratorConfig(num_tokens=4, latent_dim=8, num_classes=3, network=network)).eval()
    return GenerationPipeline(generator, tokenizer_of())


def test_the_pipeline_gives_pictures_arrays_or_tensors(plain):
    pipeline = TokensPipeline(plain)
    how = {"num_inference_steps": 2, "guidance_scale": 2.0}
    expected = plain([0, 2], steps=2, guidance=2.0) / 2 + 0.5
    found = pipeline([0, 2], output_type="pt", **how)
    assert torch.equal(found.images, expected)
    assert found[0] is found.images
    assert not found.images.is_inference()
    array = pipeline([0, 2], output_type="np", return_dict=False, **how)[0]
    assert np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    shown = pipeline([0, 2], **how).images
    assert np.abs(np.asarray(shown[1]) / 255 - array[1]).max() < 0.51 / 255 + 1e-6
    with pytest.raises(InputError, match="expected pil, np or pt"):
        pipeline([0], output_type="latent")


@pytest.mark.usefixtures("unchecked")
def test_generators_decide_the_pipelines_seeds(plain):
    pipeline, how = TokensPipeline(plain), {"num_inference_steps": 2, "output_type": "pt"}

    def one(seed):
        return pipeline([0], generator=torch.Generator().manual_seed(seed), **how).images

    assert torch.equal(one(1), one(1))
    assert not torch.equal(one(1), one(2))
    both = pipeline([0, 0], generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], **how).images
    torch.testing.assert_close(both, torch.cat([one(1), one(2)]))
    with pytest.raises(InputError, match="1 seeds for 2 images"):
        pipeline([0, 0], generator=[torch.Generator()], **how)
    with pytest.raises(InputError, match="generator is 7, expected"):
        pipeline([0], generator=7)


def test_the_pipeline_moves_to_a_dtype_and_keeps_it(plain):
    pipeline = TokensPipeline(plain)
    assert pipeline.to("cpu") is pipeline
    assert pipeline.dtype == torch.float32
    assert pipeline.to(torch.bfloat16).dtype == torch.bfloat16
    assert pipeline.to("cpu").dtype == torch.bfloat16
    assert plain.generator.network.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert pipeline.device == torch.device("cpu")
    with pytest.raises(InputError, match=r"dtype is torch.float16, expected torch.bfloat16 or torch.float32"):
        pipeline.to("cpu", torch.float16)
