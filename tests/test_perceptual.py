import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from softvq.errors import InputError
from softvq.files import write_tensors
from softvq.losses import perceptual
from softvq.losses.perceptual import PerceptualDistance, blur_pool, feature_distance, load_perceptual
from softvq.randomness import generator

KERNEL = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16


@pytest.fixture(scope="module")
def trained():
    return load_perceptual()


@pytest.fixture(scope="module")
def scene():
    """A picture with edges, shading and texture, so that blur and noise both do something: [2, 3, 64, 64]."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((rows - 0.2).square() + (columns + 0.1).square() < 0.3).float()
    stripes = torch.sign(torch.sin(18 * columns + 5 * rows))
    first = torch.stack([disc - 0.3, 0.6 * rows * (1 - disc) + 0.3 * stripes * disc, 0.7 * columns])
    second = torch.stack([0.5 * stripes, disc * rows, 0.8 - disc])
    return torch.stack([first, second]).clamp(-1, 1)


def tiny(**arguments):
    return PerceptualDistance(widths=(4, 6), depths=(1, 2), **arguments)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "test")) * 2 - 1


def colour(*features, size=8):
    """A picture of one colour that is `features` after the shift and scale of the pixels."""
    pixels = torch.tensor(features) * torch.tensor(perceptual.PIXEL_SCALE) + torch.tensor(perceptual.PIXEL_SHIFT)
    return pixels.view(1, 3, 1, 1).expand(1, 3, size, size).clone()


def copying_trunk(num_stages):
    """A trunk whose convolutions hand on three channels unchanged."""
    distance = PerceptualDistance(widths=(3,) * num_stages, depths=(1,) * num_stages)
    for module in distance.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
            module.weight[:, :, 1, 1] = torch.eye(3)
    for head in distance.heads:
        head.copy_(torch.tensor([2.0, 5.0, 7.0]))
    return distance


def torchvision_distance(images, targets):
    """The distance of the installed weights, put together from torchvision's VGG16 in float64, without our code."""
    import torchvision

    files = importlib.metadata.distribution("stlpips-pytorch").files
    assert files is not None
    path = next(file.locate() for file in files if file.name == "vgg_shift_tolerant.pth")
    state = torch.load(path, map_location="cpu", weights_only=True)
    layers = list(torchvision.models.vgg16(weights=None).features.children())[:30]
    weights = [v for k, v in state.items() if k.startswith("net.") and k.endswith("weight")]
    biases = [v for k, v in state.items() if k.startswith("net.") and k.endswith("bias")]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for convolution, weight, bias in zip(convolutions, weights, biases, strict=True):
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
    filters = [v for k, v in state.items() if k.endswith("filt")]
    maps = [(x - state["scaling_layer.shift"]) / state["scaling_layer.scale"] for x in (images.double(), targets)]
    total, stage = 0.0, 0
    for layer in [*layers, nn.MaxPool2d(2)]:
        if isinstance(layer, nn.MaxPool2d):  # the end of a stage
            a, b = (x.flatten(2) / torch.linalg.vector_norm(x.flatten(2), dim=1, keepdim=True) for x in maps)
            head = state[f"lin{stage}.model.1.weight"].double().view(1, -1, 1)
            total = total + (head * (a * a - 2 * a * b + b * b)).sum(1).mean(1)
            if stage == 4:
                break
            blur = nn.Conv2d(
                len(filters[stage]), len(filters[stage]), 3, 2, 2, 1, len(filters[stage]), False, "reflect"
            )
            blur.weight = nn.Parameter(filters[stage])
            maps = [blur.double()(nn.functional.max_pool2d(x, 2, 1)) for x in maps]
            stage += 1
        else:
            maps = [layer.double()(x) if isinstance(layer, nn.Conv2d) else x.relu() for x in maps]
    return total


def test_equals_the_same_network_built_from_torchvision(trained, scene):
    images = (scene + 0.3 * noise(2, 3, 64, 64)).requires_grad_()
    expected = torchvision_distance(images, scene.double())
    (expected_gradient,) = torch.autograd.grad(expected.sum(), images)
    found = trained(images, scene)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-7, rtol=2e-3)


def test_hand_computed_distance_of_plain_colours():
    # On the unit sphere (3, 4, 0) and (4, 3, 0) are (0.6, 0.8, 0) and (0.8, 0.6, 0): 0.04 x 2 + 0.04 x 5 a stage.
    for num_stages in (1, 2, 3):
        distance = copying_trunk(num_stages)(colour(3.0, 4.0, 0.0), colour(4.0, 3.0, 0.0))
        torch.testing.assert_close(distance, torch.tensor([0.28 * num_stages]), atol=1e-6, rtol=1e-6)


def test_relu_drops_what_is_negative():
    distance = copying_trunk(1)(colour(3.0, 4.0, -9.0), colour(3.0, 4.0, 0.0))
    torch.testing.assert_close(distance, torch.zeros(1), atol=1e-10, rtol=0)


def test_brightness_of_features_does_not_count():
    distance = copying_trunk(2)(colour(1.0, 2.0, 3.0), colour(2.0, 4.0, 6.0))
    torch.testing.assert_close(distance, torch.zeros(1), atol=1e-6, rtol=0)


def test_distance_is_the_mean_over_pixels():
    images, targets = colour(3.0, 4.0, 0.0), colour(3.0, 4.0, 0.0)
    targets[..., :2] = colour(4.0, 3.0, 0.0)[..., :2]  # a quarter of the picture
    torch.testing.assert_close(copying_trunk(1)(images, targets), torch.tensor([0.07]), atol=1e-6, rtol=1e-6)


def test_equal_pictures_have_distance_zero_and_others_do_not(trained, scene):
    assert torch.equal(trained(scene, scene), torch.zeros(2))
    assert (trained(scene, scene.flip(0)) > 0.1).all()


def test_symmetric(trained, scene):
    a, b = scene, scene.flip(3)
    torch.testing.assert_close(trained(a, b), trained(b, a), atol=1e-7, rtol=1e-6)


def test_each_picture_is_compared_on_its_own(trained, scene):
    targets = scene.flip(3)
    alone = torch.cat([trained(scene[i : i + 1], targets[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(trained(scene, targets), alone, atol=1e-6, rtol=1e-5)


def test_more_distortion_is_farther(trained, scene):
    from torchvision.transforms.functional import gaussian_blur

    blurred = [trained(gaussian_blur(scene, [21, 21], [sigma]), scene) for sigma in (0.5, 1.0, 2.0, 4.0)]
    noised = [trained(scene + scale * noise(2, 3, 64, 64), scene) for scale in (0.02, 0.1, 0.4)]
    for series in (blurred, noised):
        assert (torch.stack(series).diff(dim=0) > 0).all()
    assert (blurred[0] > 0.001).all()


def test_a_shift_by_one_pixel_counts_less_than_a_blur_of_one_pixel(trained, scene):
    from torchvision.transforms.functional import gaussian_blur

    shifted = trained(scene[..., 1:, 1:], scene[..., :-1, :-1])
    assert (shifted < 0.5 * trained(gaussian_blur(scene, [9, 9], [1.0]), scene)).all()


@pytest.mark.parametrize("size", [(4, 4), (7, 6), (10, 13)])
def test_blur_pool_against_loops(size):
    x = noise(2, 3, *size)
    height, width = size
    peaks = np.zeros((2, 3, height - 1, width - 1), np.float32)
    for i in range(height - 1):
        for j in range(width - 1):
            peaks[:, :, i, j] = x[:, :, i : i + 2, j : j + 2].amax((2, 3)).numpy()
    padded = np.pad(peaks, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    expected = np.zeros((2, 3, height // 2 + 1, width // 2 + 1), np.float32)
    for i in range(expected.shape[2]):
        for j in range(expected.shape[3]):
            window = padded[:, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            expected[:, :, i, j] = (window * KERNEL.numpy()).sum((2, 3))
    torch.testing.assert_close(blur_pool(x), torch.from_numpy(expected), atol=1e-6, rtol=1e-6)


def test_blur_pool_of_a_constant_is_the_constant():
    torch.testing.assert_close(blur_pool(torch.full((1, 2, 9, 8), 0.7)), torch.full((1, 2, 5, 5), 0.7))


def test_gradient_is_finite_where_pictures_are_equal_or_have_no_features(trained, scene):
    black = torch.full((1, 3, 64, 64), -1.0)
    for targets in (scene, black, torch.zeros(1, 3, 64, 64)):
        images = targets.clone().requires_grad_()
        trained(images, targets).sum().backward()
        assert torch.equal(images.grad, torch.zeros_like(images))  # the smallest there is
        images = (-targets).requires_grad_()
        trained(images, targets + 0.01).sum().backward()
        assert torch.isfinite(images.grad).all()
        assert images.grad.abs().max() > 0
    dead = colour(-1.0, -1.0, -1.0).requires_grad_()
    distance = copying_trunk(2)(dead, colour(3.0, 4.0, 0.0))
    distance.sum().backward()
    assert torch.isfinite(dead.grad).all()


def test_following_the_gradient_brings_pictures_nearer():
    distance, targets = tiny(), noise(1, 3, 16, 16)
    images = noise(1, 3, 16, 16, seed=1).requires_grad_()
    before = distance(images, targets)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = distance(images - 0.1 * gradient / gradient.norm(), targets)
    predicted = before - 0.1 * gradient.norm()
    assert after.item() == pytest.approx(predicted.item(), abs=0.2 * (before - predicted).item())


def test_gradient_flows_to_images_alone_unless_targets_ask_for_it():
    distance, images, targets = tiny(), noise(1, 3, 16, 16).requires_grad_(), noise(1, 3, 16, 16, seed=1)
    assert not any(features.requires_grad for features in distance.features(targets))
    distance(images, targets).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distance.parameters())
    targets.requires_grad_()
    (gradient,) = torch.autograd.grad(distance(images.detach(), targets).sum(), targets)
    assert gradient.abs().max() > 0


def test_stays_frozen_inside_a_training_module():
    parent = nn.ModuleList([nn.Dropout(), tiny()]).train()
    assert parent[0].training
    assert not any(module.training for module in parent[1].modules())
    assert parent[1].train() is parent[1]


def test_compares_in_float32_under_autocast():
    a, b = noise(2, 5, 4, 4).bfloat16() * 100, noise(2, 5, 4, 4, seed=1).bfloat16() * 100
    weight = torch.rand(5, generator=generator(0, "weight"))
    with torch.autocast("cpu", torch.bfloat16):
        found = feature_distance(a, b, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, feature_distance(a.float(), b.float(), weight))


def test_autocast_changes_the_distance_little_but_does_run_in_low_precision():
    distance, images, targets = tiny(), noise(2, 3, 32, 32), noise(2, 3, 32, 32, seed=1)
    images.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        low = distance(images, targets)
        assert next(distance.features(images)).dtype == torch.bfloat16
    low.sum().backward()
    full = distance(images, targets)
    assert low.dtype == full.dtype == torch.float32
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, atol=0, rtol=0.02)
    assert torch.isfinite(images.grad).all()


def test_smallest_picture_is_computed_and_a_smaller_one_refused(trained):
    assert torch.isfinite(trained(noise(1, 3, 18, 40), noise(1, 3, 18, 40, seed=1))).all()
    with pytest.raises(InputError, match="images are 17x40 px, expected at least 18 px"):
        trained(noise(1, 3, 17, 40), noise(1, 3, 17, 40))


def test_weights_are_a_function_of_the_seed_and_nothing_global_is_drawn():
    before = torch.get_rng_state()
    first, again, other = tiny(seed=3), tiny(seed=3), tiny(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    images, targets = noise(1, 3, 16, 16), noise(1, 3, 16, 16, seed=1)
    assert torch.equal(first(images, targets), again(images, targets))
    assert not torch.equal(first(images, targets), other(images, targets))


def test_loading_imports_none_of_the_package(trained):
    assert not any(name.startswith("stlpips") for name in sys.modules)
    assert sum(parameter.numel() for parameter in trained.parameters()) == 14_714_688 + 64 + 128 + 256 + 512 + 512


def test_loads_from_safetensors(trained, scene, tmp_path):
    write_tensors(tmp_path / "vgg.safetensors", trained.state_dict())
    again = load_perceptual(str(tmp_path / "vgg.safetensors"))
    assert torch.equal(again(scene, scene.flip(0)), trained(scene, scene.flip(0)))


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_safetensors_must_match_exactly(trained, tmp_path, change):
    state = dict(trained.state_dict())
    if change == "missing":
        del state["heads.2"]
    else:
        state["heads.2" if change == "shape" else "heads.9"] = torch.zeros(3)
    write_tensors(tmp_path / "vgg.safetensors", state)
    name = "heads.9" if change == "unknown" else "heads.2"
    with pytest.raises(InputError, match=rf"vgg.safetensors: 1 tensors are missing.*\({name}\)"):
        load_perceptual(tmp_path / "vgg.safetensors")


@pytest.mark.parametrize("name", ["absent.safetensors", "weights.pth"])
def test_a_missing_file_or_a_pickle_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=name):
        load_perceptual(tmp_path / name)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=r"stlpips-pytorch.*pip install 'softvq\[train\]'"):
        load_perceptual()


def test_a_package_without_its_file_or_with_half_of_it_is_named(monkeypatch, tmp_path):
    class Distribution:
        def locate_file(self, path):
            return tmp_path / path

    whole = Path(str(importlib.metadata.distribution("stlpips-pytorch").locate_file("")))
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(InputError, match=r"vgg_shift_tolerant.pth: no such file"):
        load_perceptual()
    path = tmp_path / perceptual.WEIGHTS_IN_DISTRIBUTION
    path.parent.mkdir(parents=True)
    for length in (0, 100_000):
        path.write_bytes((whole / perceptual.WEIGHTS_IN_DISTRIBUTION).read_bytes()[:length])
        with pytest.raises(InputError, match=r"vgg_shift_tolerant.pth: not a whole weight file"):
            load_perceptual()
    torch.save({"heads.0": torch.zeros(64)}, path)
    with pytest.raises(InputError, match=r"scaling_layer.shift is not what the distance has"):
        load_perceptual()


def test_one_target_stands_for_all_images() -> None:
    distance = PerceptualDistance(widths=(4, 6), depths=(1, 2))
    images, target = torch.rand(3, 3, 24, 24) * 2 - 1, torch.rand(1, 3, 24, 24) * 2 - 1
    expected = distance(images, target.expand_as(images))
    assert len(expected.unique()) == 3
    torch.testing.assert_close(distance(images, target), expected)
