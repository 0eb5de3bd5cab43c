"""Discriminators: sizes that were published, independence of the batch, passes that can be repeated, and learning."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.losses.adversarial import discriminator_loss
from softvq.losses.discriminators import (
    DinoConfig,
    DiscriminatorConfig,
    HalvingBlock,
    PatchGANConfig,
    StyleGANConfig,
    TokenHead,
    build_discriminator,
    group_deviation,
)
from softvq.losses.spectral import SpectralConv1d
from softvq.randomness import generator, keys_of

SMALL = {
    "dino": DinoConfig(backbone="vit_tiny_patch16_224", pretrained=False, layers=(0, 2), image_size=32, kernel=3),
    "patchgan": PatchGANConfig(width=8, depth=2),
    "stylegan": StyleGANConfig(width=8, max_width=16),
}
LOGITS = {"dino": 2 * 4, "patchgan": 6 * 6, "stylegan": 1}
KINDS = list(SMALL)


def small(kind, image_size=32, seed=0):
    torch.manual_seed(seed)
    return build_discriminator(SMALL[kind], image_size=image_size)


def pictures(batch=4, size=32, seed=0):
    return torch.rand(batch, 3, size, size, generator=generator(seed, "test")) * 2 - 1


def keys_for(batch, seed=0):
    return keys_of(seed, "test", torch.arange(batch))


def trained_parameters(module):
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def count(module):
    return sum(parameter.numel() for parameter in trained_parameters(module).values())


@pytest.mark.parametrize("kind", KINDS)
def test_gives_logits_and_gradients_to_images_and_all_parameters(kind):
    discriminator, images = small(kind), pictures().requires_grad_()
    logits = discriminator(images, keys_for(4))
    assert logits.shape == (4, LOGITS[kind])
    (logits * logits.detach().cos()).sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    for name, parameter in trained_parameters(discriminator).items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_learns_to_tell_two_kinds_of_pictures_apart(kind):
    discriminator = small(kind)
    waves = torch.sin(torch.arange(32) * 0.8).expand(3, 32, 32)

    def batch(step):
        noise, phase = pictures(16, seed=step), pictures(16, 1, seed=1000 + step)
        real = 0.7 * waves + 0.2 * phase + 0.2 * noise
        return real[:8], real.mT[8:]  # the same pictures but for their direction

    optimizer = torch.optim.Adam(trained_parameters(discriminator).values(), lr=3e-3, betas=(0.5, 0.9))
    for step in range(30):
        real, fake = batch(step)
        logits = discriminator(torch.cat([real, fake]), keys_for(16))
        loss = discriminator_loss(logits[:8], logits[8:], "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        discriminator.advance()
    real, fake = (discriminator(x, keys_for(8)).mean(1) for x in batch(5000))
    assert real.min() > fake.max()
    assert real.mean() - fake.mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_repeated_by_checkpointing_gives_the_same_gradients(kind):
    discriminator = small(kind).train()
    buffers = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
    images, keys = pictures(4, 32), keys_for(4)
    results = []
    for function in (discriminator, lambda *x: checkpoint(discriminator, *x, use_reentrant=False)):
        x = images.clone().requires_grad_()
        logits = function(x, keys)
        gradients = torch.autograd.grad(logits.sigmoid().sum(), [x, *trained_parameters(discriminator).values()])
        results.append([logits, *gradients])
    for plain, repeated in zip(*results, strict=True):
        assert torch.equal(plain, repeated)
    for name, buffer in discriminator.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("kind", ["dino", "patchgan"])
def test_a_logit_does_not_depend_on_the_batch(kind):
    discriminator, images, keys = small(kind, 48).train(), pictures(5, 48), keys_for(5)
    whole = discriminator(images, keys)
    parts = torch.cat([discriminator(images[:2], keys[:2]), discriminator(images[2:], keys[2:])])
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=1e-4)


def test_stylegan_logits_depend_on_groups_of_four_only():
    discriminator, images, keys = small("stylegan"), pictures(8), keys_for(8)
    whole = discriminator(images, keys)
    parts = torch.cat([discriminator(images[:4], keys[:4]), discriminator(images[4:], keys[4:])])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    changed = torch.cat([images[:7], -images[7:]])
    moved = (discriminator(changed, keys) - whole).abs().flatten() > 1e-5
    assert moved.tolist() == [False] * 4 + [True] * 4


@pytest.mark.parametrize(("batch", "group", "size"), [(8, 4, 4), (6, 4, 3), (5, 4, 1), (7, 8, 7), (4, 1, 1)])
def test_group_deviation_against_numpy(batch, group, size):
    hidden = torch.randn(batch, 5, 3, 2, generator=generator(0, "test"))
    groups = hidden.double().numpy().reshape(batch // size, size, -1)
    expected = np.sqrt(groups.var(axis=1) + 1e-8).mean(axis=1).repeat(size)
    torch.testing.assert_close(group_deviation(hidden, group).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)
    equal = torch.ones(4, 5, 3, 2, requires_grad=True)
    group_deviation(equal, 4).sum().backward()
    assert torch.equal(equal.grad, torch.zeros_like(equal))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_logits_in_float32_and_near(kind):
    discriminator, images = small(kind), pictures()
    full = discriminator(images, keys_for(4))
    with torch.autocast("cpu", torch.bfloat16):
        low = discriminator(images, keys_for(4))
    assert low.dtype == full.dtype == torch.float32
    assert not torch.equal(low, full)
    assert (low - full).norm() < 0.1 * full.norm()


def test_dino_heads_have_the_published_number_of_parameters():
    discriminator = build_discriminator(DinoConfig(pretrained=False), image_size=256)
    width = 384
    norms, biases = 2 * 2 * width, 2 * width + 1
    head = width * width + 9 * width * width + width + norms + biases
    assert count(discriminator) == 5 * head == 7_386_245
    assert discriminator(pictures(1, 256), keys_for(1)).shape == (1, 5 * 196)


def test_patchgan_is_that_of_the_paper():
    discriminator = build_discriminator(PatchGANConfig(), image_size=256)
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert count(discriminator) == kernels + 64 + 1 + 2 * (128 + 256 + 512) == 2_765_633
    for i, module in enumerate(discriminator.trunk):
        if isinstance(module, nn.GroupNorm):
            discriminator.trunk[i] = nn.Identity()  # it looks at the whole picture
    images = pictures(1, 256).requires_grad_()
    logits = discriminator(images, keys_for(1)).view(30, 30)
    (gradient,) = torch.autograd.grad(logits[15, 15], images)
    seen = (gradient[0] != 0).any(0)
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_stylegan_has_the_parameters_of_the_paper():
    discriminator = build_discriminator(StyleGANConfig(), image_size=256)
    widths = [128, 256, 512, 512, 512, 512, 512]
    blocks = sum(9 * a * a + a + 9 * a * b + b + a * b for a, b in itertools.pairwise(widths))
    last = (9 * 513 * 512 + 512) + (16 * 512 * 512 + 512) + (512 + 1)
    assert count(discriminator) == 3 * 128 + 128 + blocks + last == 28_864_129


def test_halving_does_not_alias():
    block = HalvingBlock(1, 1)
    with torch.no_grad():
        block.first.weight.zero_()  # leaves the linear path
        block.skip.weight.fill_(1)
    finest = (-1.0) ** torch.arange(16).expand(1, 1, 16, 16)
    ones = torch.ones(1, 1, 16, 16)
    assert block(finest)[..., 1:-1, 1:-1].abs().max() < 1e-6
    torch.testing.assert_close(block(ones)[..., 1:-1, 1:-1], torch.full((1, 1, 6, 6), 0.5**0.5))


def test_spectral_norm_is_the_largest_singular_value():
    torch.manual_seed(0)
    layer = SpectralConv1d(24, 16, 3)
    exact = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
    torch.testing.assert_close(layer.sigma(), exact, atol=0, rtol=0.05)  # from the start
    layer.advance(500)
    torch.testing.assert_close(layer.sigma(), exact, atol=1e-6, rtol=1e-5)
    (slope,) = torch.autograd.grad(layer.sigma(), layer.weight)
    (expected,) = torch.autograd.grad(torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2), layer.weight)
    torch.testing.assert_close(slope, expected, atol=1e-4, rtol=0)


def test_spectral_norm_follows_the_weight_only_when_told():
    torch.manual_seed(0)
    layer = SpectralConv1d(6, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0, 5.0]))[:5, :, None])
    before = layer.sigma().item()
    layer(torch.ones(1, 6, 4))
    assert layer.sigma().item() == before
    for _ in range(20):
        layer.advance()
    assert layer.sigma().item() == pytest.approx(9)


def test_spectral_convolution_is_torchs_circular_one_of_the_divided_weight():
    torch.manual_seed(0)
    layer, x = SpectralConv1d(4, 6, 5), torch.randn(2, 4, 9)
    plain = nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular")
    with torch.no_grad():
        plain.weight.copy_(3 * layer.weight)
        layer.weight.mul_(3)  # the scale of a weight has no effect
        layer.bias.normal_()
        plain.bias.copy_(layer.bias)
        plain.weight.div_(layer.sigma())
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer(x.roll(2, 2)), layer(x).roll(2, 2))


def test_spectral_norm_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = SpectralConv1d(64, 8), torch.randn(2, 64, 9)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    divided = layer.weight / layer.sigma()
    assert torch.equal(found, F.conv1d(x.bfloat16(), divided.bfloat16(), layer.bias.bfloat16()))


def test_a_head_step_by_step():
    torch.manual_seed(0)
    head, features = TokenHead(8, 3), torch.randn(2, 8, 3, 2)
    first = head.inward_norm(head.inward(features.reshape(2, 8, 6)))
    first = torch.where(first > 0, first, 0.2 * first)
    second = head.around_norm(head.around(first))
    second = torch.where(second > 0, second, 0.2 * second)
    expected = head.logit((first + second) / 2**0.5)[:, 0]
    torch.testing.assert_close(head(features), expected)


def test_a_halving_block_step_by_step():
    torch.manual_seed(0)
    block, x = HalvingBlock(16, 24), torch.randn(2, 16, 8, 8)
    blur = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8] * 2).expand(16, 1, 4, 4)
    hidden = F.leaky_relu(F.conv2d(x, block.first.weight / 144**0.5, padding=1), 0.2) * 2**0.5
    hidden = F.conv2d(F.conv2d(hidden, blur, padding=2, groups=16), block.second.weight / 144**0.5, stride=2)
    skip = F.conv2d(F.conv2d(x, blur, padding=1, groups=16), block.skip.weight / 4)[..., ::2, ::2]
    expected = (F.leaky_relu(hidden, 0.2) * 2**0.5 + skip) / 2**0.5
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


def test_dino_backbone_is_frozen_and_not_saved():
    discriminator = small("dino").train()
    names = set(discriminator.state_dict())
    assert names
    assert all(name.startswith("heads.") for name in names)
    assert all(name.startswith("heads.") for name in trained_parameters(discriminator))
    before = {name: tensor.clone() for name, tensor in discriminator.backbone.network.state_dict().items()}
    assert len(before) > 20
    discriminator(pictures(), keys_for(4)).sum().backward()
    torch.optim.SGD(discriminator.parameters(), lr=1.0).step()
    for name, tensor in discriminator.backbone.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    restored = small("dino", seed=1)
    restored.load_state_dict(discriminator.state_dict())
    assert torch.equal(restored.heads[0].around.left, discriminator.heads[0].around.left)


def test_dino_sees_crops_or_the_whole_of_larger_pictures_by_their_keys():
    discriminator, images = small("dino"), pictures(1, 64).expand(12, -1, -1, -1)
    logits = discriminator(images, keys_for(12))
    whole = discriminator(F.avg_pool2d(images[:1], 2), keys_for(1))
    shrunken = torch.isclose(logits, whole, atol=1e-4).all(1)
    assert 0 < shrunken.sum() < 12
    assert torch.equal(logits, discriminator(images, keys_for(12)))
    assert discriminator(pictures(2, 20), keys_for(2)).shape == (2, 8)


def test_dino_reads_convolutional_networks_too():
    torch.manual_seed(0)
    config = DinoConfig(backbone="resnet18", pretrained=False, layers=(1, 2), image_size=64)
    discriminator = build_discriminator(config, image_size=64)
    assert [head.logit.weight.shape[1] for head in discriminator.heads] == list(discriminator.backbone.channels)
    logits = discriminator(pictures(2, 64), keys_for(2))
    assert logits.shape[1] == sum(m[0, 0].numel() for m in discriminator.backbone(pictures(1, 64)))


def test_dino_adds_the_class_token_where_there_is_one():
    torch.manual_seed(0)
    with_token = small("dino").backbone
    network, images = with_token.network, pictures(2)
    tokens = network._pos_embed(network.patch_embed((images - with_token.shift) / with_token.scale))
    expected = (tokens[:, 1:] + tokens[:, :1]).mT.unflatten(2, (2, 2))
    torch.testing.assert_close(with_token(images)[0], expected)
    config = dataclasses.replace(SMALL["dino"], backbone="vit_wee_patch16_reg1_gap_256")
    assert not build_discriminator(config, image_size=32).backbone.add_class_token


def test_dino_computes_its_frozen_network_in_the_precision_asked_for():
    torch.manual_seed(0)
    discriminator = build_discriminator(SMALL["dino"], image_size=32, dtype=torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in discriminator.backbone.network.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in discriminator.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert discriminator(pictures(), keys_for(4)).dtype == torch.float32
    torch.testing.assert_close(
        discriminator(pictures(), keys_for(4)), small("dino")(pictures(), keys_for(4)), atol=0.1, rtol=0.1
    )


def test_configs_survive_their_files():
    @dataclasses.dataclass(frozen=True)
    class Run:
        discriminator: DiscriminatorConfig

    for config in SMALL.values():
        assert from_dict(Run, to_dict(Run(config))).discriminator == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DinoConfig(layers=()), "layers is empty"),
        (lambda: DinoConfig(kernel=4), "kernel is 4, expected an odd number"),
        (lambda: DinoConfig(image_size=0), "image_size is 0, expected 1 to 4096"),
        (
            lambda: build_discriminator(dataclasses.replace(SMALL["dino"], kernel=11), image_size=32),
            r"kernel is 11, expected at most 9 for the last of layers \(0, 2\)",
        ),
        (lambda: PatchGANConfig(width=0), "width is 0"),
        (lambda: PatchGANConfig(depth=9), "depth is 9"),
        (lambda: StyleGANConfig(max_width=5000), "max_width is 5000"),
        (lambda: StyleGANConfig(group=0), "group is 0"),
        (lambda: build_discriminator(PatchGANConfig(), image_size=23), "image_size is 23, expected at least 24"),
        (lambda: build_discriminator(StyleGANConfig(), image_size=96), "image_size is 96, expected a power of two"),
        (lambda: build_discriminator(StyleGANConfig(), image_size=4), "image_size is 4"),
        (lambda: small("stylegan")(pictures(2, 64), keys_for(2)), "images are 64x64 px, expected 32 px"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_the_smallest_pictures_are_judged():
    images = pictures(2, 24)
    assert build_discriminator(PatchGANConfig(width=4), image_size=24)(images, keys_for(2)).shape == (2, 1)
    assert small("stylegan", 8)(pictures(2, 8), keys_for(2)).shape == (2, 1)


def test_the_spectral_norm_is_followed_in_float32_under_autocast():
    layer = SpectralConv1d(24, 16, 3)
    with torch.autocast("cpu", torch.bfloat16):
        layer.advance(200)
    true = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
    torch.testing.assert_close(layer.sigma(), true, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.left.norm(), torch.tensor(1.0), rtol=1e-6, atol=0)
