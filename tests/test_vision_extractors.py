"""DINOv2 and CLIP as judges: small stand-ins for their large networks, the same code around them."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from softvq.backbones import load_backbone
from softvq.errors import InputError
from softvq.evaluation import vision_extractors
from softvq.evaluation.extractors import Extractor, extractor
from softvq.evaluation.vision_extractors import _positions

SMALL = "test_vit"  # 160 px, patches of 16: at 224 px its positions must be resampled as DINOv2's are


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_extractors, "DINOV2", SMALL)
    monkeypatch.setattr(vision_extractors, "CLIP", SMALL)


def pixels(height: int = 224, width: int = 224, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def normal(images: Tensor) -> Tensor:
    return images.float() / 255 / 0.5 - 1  # the small network's mean and deviation are 0.5


def by_hand(network: timm.models.VisionTransformer, images: Tensor, positions: Tensor) -> Tensor:
    """Return the normed tokens, with these positions added."""
    tokens = network.patch_embed.proj(images).flatten(2).mT
    tokens = torch.cat([network.cls_token.expand(len(images), -1, -1), tokens], 1) + positions
    for block in network.blocks:
        tokens = block(tokens)
    return network.norm(tokens)


def cubic(distance: float) -> float:
    """The kernel of Keys with a = -0.75, which torch has without antialiasing."""
    a, x = -0.75, abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights_of(old: int, new: int) -> np.ndarray:
    """Each new place as a sum over old ones, the grid taken to be (new + 0.1) / old as large; edges are repeated."""
    matrix = np.zeros((new, old))
    for place in range(new):
        where = (place + 0.5) * old / (new + 0.1) - 0.5
        for tap in range(math.floor(where) - 1, math.floor(where) + 3):
            matrix[place, min(max(tap, 0), old - 1)] += cubic(where - tap)
    return matrix


@pytest.mark.parametrize(("old", "new"), [(37, 16), (10, 14), (7, 7)])
def test_positions_are_resampled_as_the_definition_says(old: int, new: int) -> None:
    positions = torch.randn(1, 1 + old * old, 3, generator=torch.Generator().manual_seed(0))
    found = _positions(positions, (old, old), (new, new), prefix=1)
    weights = weights_of(old, new) if old != new else np.eye(old)
    grid = positions[0, 1:].numpy().reshape(old, old, 3)
    expected = np.einsum("ap,bq,pqc->abc", weights, weights, grid).reshape(-1, 3)
    np.testing.assert_allclose(found[0, 1:], expected, atol=2e-5)
    assert torch.equal(found[:, 0], positions[:, 0])


def test_dinov2_gives_the_normed_class_token_and_patch_tokens() -> None:
    found = extractor("dinov2", pretrained=False)
    network = load_backbone(SMALL, image_size=160, pretrained=False).network
    positions = _positions(network.pos_embed.detach(), (10, 10), (14, 14), prefix=1)
    with torch.no_grad():
        tokens = by_hand(network, normal(pixels()), positions)
    looked = found.look_pixels(pixels())
    torch.testing.assert_close(looked.features, tokens[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(looked.spatial, tokens[:, 1:, :7].flatten(1), rtol=1e-4, atol=1e-5)
    assert looked.logits is None
    assert (found.dim, found.spatial_dim, found.image_size) == (network.embed_dim, 14 * 14 * 7, 224)


def test_clip_gives_the_projected_embedding() -> None:
    found = extractor("clip", pretrained=False)
    whole = found.network.network
    images = pixels(160, 160)
    with torch.no_grad():
        tokens = by_hand(whole, normal(images), whole.pos_embed)
        expected = tokens[:, 0] @ whole.head.weight.T + whole.head.bias
    looked = found.look_pixels(images)
    torch.testing.assert_close(looked.features, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(looked.spatial, tokens[:, 1:, :7].flatten(1), rtol=1e-4, atol=1e-5)
    assert (found.dim, found.image_size) == (1000, 160)


@pytest.mark.parametrize(("height", "width"), [(256, 256), (97, 301), (512, 300)])
@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_pictures_are_resized_as_pillow_does_it(kind: str, height: int, width: int) -> None:
    image = pixels(height, width, 1)
    tower = extractor(kind, pretrained=False).network
    photos = [Image.fromarray(channel.float().numpy()) for channel in image[0]]
    side = (tower.size, tower.size)
    resized = [np.array(photo.resize(side, Image.Resampling.BICUBIC)) for photo in photos]
    theirs = torch.from_numpy(np.stack(resized))
    assert height > 97 or theirs.min() < 0
    ours = tower.seen(image)[0]
    if kind == "clip":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=6e-3)
        return
    assert torch.equal(ours, ours.round())  # as 8-bit pictures are resized
    assert ours.amin() >= 0
    assert ours.amax() <= 255
    photo = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    for bounds in ((tower.size, height), side):  # across first: newer Pillow takes the cheaper order, older ones this
        photo = photo.resize(bounds, Image.Resampling.BICUBIC)
    theirs = torch.tensor(np.array(photo)).permute(2, 0, 1).float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1)
    assert (ours != theirs).float().mean() < 0.02  # its weights are whole numbers


def test_pictures_of_the_right_size_are_not_touched() -> None:
    tower = extractor("dinov2", pretrained=False).network
    assert torch.equal(tower.seen(pixels()), pixels().float())


def loaded(kind: str, path: object, **changes: Tensor) -> Extractor:
    network = (
        timm.create_model(SMALL) if kind == "clip" else load_backbone(SMALL, image_size=160, pretrained=False).network
    )
    save_file({**network.state_dict(), **changes}, str(path))
    return extractor(kind, weights=str(path))


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_weights_come_from_a_file_and_are_named(kind: str, tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = loaded(kind, path)
    again = extractor(kind, weights=path)
    assert found.sha256 == again.sha256
    assert torch.equal(found.look_pixels(pixels()).features, again.look_pixels(pixels()).features)
    name = {"dinov2": "DINOv2", "clip": "CLIP"}[kind]
    assert found.label("Fréchet distance") == f"Fréchet distance on {name} with the weights {found.sha256[:8]}"
    assert extractor(kind, pretrained=False).label("CMMD") == f"CMMD on {name} with random weights"


def test_only_the_published_weights_have_published_names(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**options, "pretrained": False}))
    dino, clip = extractor("dinov2"), extractor("clip")
    assert [dino.label(figure) for figure in ("Fréchet distance", "CMMD")] == ["FD-DINOv2", "CMMD on DINOv2"]
    assert [clip.label(figure) for figure in ("Fréchet distance", "CMMD")] == ["Fréchet distance on CLIP", "CMMD"]
    assert not dino.is_fid_inception


def test_the_real_networks_are_those_of_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    dino, clip = (timm.get_pretrained_cfg(name) for name in (vision_extractors.DINOV2, vision_extractors.CLIP))
    assert (dino.input_size[-1], dino.mean) == (518, (0.485, 0.456, 0.406))
    assert (clip.input_size[-1], clip.num_classes) == (336, 768)
    assert "quickgelu" in clip.architecture  # what OpenAI trained with, as timm itself notes
    assert "natively QuickGELU" in " ".join(clip.notes)


def test_files_that_do_not_fit_are_told(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(
        InputError, match=r"1 tensors are missing, unknown or of another shape than timm's test_vit has"
    ):
        loaded("clip", path, **{"head.weight": torch.zeros(3, 64)})
    with pytest.raises(InputError, match=r"norm\.bias hold numbers that are not finite"):
        loaded("clip", path, **{"norm.bias": torch.full((64,), math.nan)})
    for kind in ("dinov2", "clip"):
        with pytest.raises(InputError, match=r"expected a \.safetensors file"):
            extractor(kind, weights=tmp_path / "weights.pth")
        with pytest.raises(InputError, match="image_size and pretrained are for the kind timm:NAME only"):
            extractor(kind, image_size=96)


def test_weights_that_cannot_be_had_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", fails)
    for kind in ("dinov2", "clip"):
        with pytest.raises(InputError, match="weights of test_vit cannot be had here"):
            extractor(kind)


def test_building_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    one, other = extractor("clip", pretrained=False), extractor("clip", pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert one.sha256 == other.sha256
