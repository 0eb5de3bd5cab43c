"""The adapters give the numbers of the plain interface, in the shapes that other libraries expect."""

import numpy as np
import pytest
import torch
from PIL import Image

from softvq.adapters import AutoencoderTokens, TokensPipeline, ToTokens, tokenize_images
from softvq.data.images import center_crop, to_tensor
from softvq.errors import InputError
from softvq.generators.config import GeneratorConfig
from softvq.generators.generator import LatentGenerator
from softvq.generators.transformer import TransformerConfig
from softvq.pipeline import GenerationPipeline
from softvq.tokenizers.autoencoder import ImageTokenizer
from softvq.tokenizers.baselines import KLConfig
from softvq.tokenizers.config import TokenizerConfig
from softvq.tokenizers.vit import ViTConfig


def tokenizer_of(**fields):
    torch.manual_seed(0)
    vit = ViTConfig(width=32, depth=1, num_heads=2)
    sizes = {"num_latent_tokens": 4, "latent_dim": 8, "image_size": 32, "patch_size": 8}
    tokenizer = ImageTokenizer(TokenizerConfig(encoder=vit, decoder=vit, **sizes, **fields)).eval()
    tokenizer.latent_mean += 0.3
    tokenizer.latent_std *= 2.0
    return tokenizer


def picture(width=50, height=40):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_posterior_of_softvq_is_a_point():
    tokenizer, images = tokenizer_of(), torch.rand(2, 3, 32, 32) * 2 - 1
    model = AutoencoderTokens(tokenizer)
    found = model.encode(images).latent_dist
    with torch.inference_mode():
        expected = tokenizer.encode(images)
        assert torch.equal(found.mode(), expected)
        assert torch.equal(found.sample(), expected)
        assert torch.equal(model.decode(expected).sample, tokenizer.decode(expected))
        assert torch.equal(model.decode(expected, return_dict=False)[0], tokenizer.decode(expected))
    assert torch.equal(model.encode(images, return_dict=False)[0].mean, expected)
    assert (model.config.scaling_factor, model.config.shift_factor, model.config.latent_channels) == (1.0, None, 8)


def test_the_posterior_of_kl_is_its_gaussian_in_normalised_latents():
    tokenizer, images = tokenizer_of(quantizer=KLConfig()), torch.rand(1, 3, 32, 32) * 2 - 1
    found = AutoencoderTokens(tokenizer).encode(images).latent_dist
    with torch.inference_mode():
        mean, log_variance = tokenizer.quantizer.moments(tokenizer.encode_pre(images))
    torch.testing.assert_close(found.mean, (mean - 0.3) / 2)
    torch.testing.assert_close(found.std, (log_variance / 2).exp() / 2)
    many = torch.stack([found.sample(torch.Generator().manual_seed(seed)) for seed in range(400)])
    torch.testing.assert_close(many.mean(0), found.mean, rtol=0, atol=5 * float(found.std.max()) / 20)
    torch.testing.assert_close(many.std(0).mean(), found.std.mean(), rtol=0.05, atol=0)


def test_the_pipeline_gives_pictures_arrays_or_tensors():
    network = TransformerConfig(width=32, depth=1, num_heads=2)
    generator = LatentGenerator(GeneratorConfig(num_tokens=4, latent_dim=8, num_classes=3, network=network)).eval()
    plain = GenerationPipeline(generator, tokenizer_of())
    pipeline = TokensPipeline(plain)
    how = {"num_inference_steps": 2, "guidance_scale": 2.0}
    expected = plain([0, 2], steps=2, guidance=2.0) / 2 + 0.5
    assert torch.equal(pipeline([0, 2], output_type="pt", **how).images, expected)
    array = pipeline([0, 2], output_type="np", return_dict=False, **how)[0]
    assert np.array_equal(array, expected.permute(0, 2, 3, 1).numpy())
    shown = pipeline([0, 2], **how).images
    assert np.abs(np.asarray(shown[1]) / 255 - array[1]).max() < 0.51 / 255 + 1e-6
    seeded = [
        pipeline([0], output_type="pt", generator=torch.Generator().manual_seed(seed), **how).images
        for seed in (1, 1, 2)
    ]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    with pytest.raises(InputError, match="expected pil, np or pt"):
        pipeline([0], output_type="latent")


def test_a_transform_takes_pictures_and_tensors():
    from torchvision.transforms import v2

    tokenizer = tokenizer_of()
    cut = to_tensor(center_crop(picture(), 32))
    with torch.inference_mode():
        expected = tokenizer.encode(cut[None])[0]
    torch.testing.assert_close(ToTokens(tokenizer)(picture()), expected)
    torch.testing.assert_close(ToTokens(tokenizer)(cut), expected)
    torch.testing.assert_close(ToTokens(tokenizer)(cut[None].expand(2, -1, -1, -1))[1], expected)
    torch.testing.assert_close(ToTokens(tokenizer)(((cut + 1) * 127.5).round().to(torch.uint8)), expected)
    composed = v2.Compose([v2.Resize(32), v2.CenterCrop(32), v2.PILToTensor(), ToTokens(tokenizer)])
    assert composed(picture()).shape == (4, 8)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(32, 32), r"\[32, 32\]"),
        (torch.zeros(3, 32, 32, dtype=torch.int64), "int64"),
    ],
)
def test_what_is_no_picture_is_refused(wrong, said):
    with pytest.raises(InputError, match=said):
        ToTokens(tokenizer_of())(wrong)
    with pytest.raises(InputError, match="is str, expected a PIL image"):
        tokenize_images(tokenizer_of())({"image": ["photo.jpg"]})


def test_a_data_set_gets_a_column_of_latents():
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    tokenizer = tokenizer_of()
    rows = datasets.Dataset.from_dict({"image": [picture(), picture(40, 40)], "label": [0, 1]})
    rows = rows.cast_column("image", datasets.Image())
    mapped = rows.map(tokenize_images(tokenizer), batched=True, batch_size=2).with_format("torch")
    with torch.inference_mode():
        expected = tokenizer.encode(to_tensor(center_crop(picture(), 32))[None])[0]
    torch.testing.assert_close(torch.as_tensor(mapped[0]["latents"]).float(), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="no column 'photo', only image, label"):
        tokenize_images(tokenizer, "photo")(rows[:2])
