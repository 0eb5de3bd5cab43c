import numpy as np
import pytest
import timm
import torch
from torch import nn

from softvq.backbones import FrozenBackbone, compute_dtype, load_backbone
from softvq.errors import InputError
from softvq.randomness import generator
from softvq.tokenizers import alignment
from softvq.tokenizers.alignment import (
    AlignmentConfig,
    Projector,
    alignment_loss,
    check_alignment,
    distance_matrix_loss,
    patch_features,
)

MODES = ["repeat", "avg_1d", "avg_1d_shuffle", "global"]
BATCH, TOKENS, PATCHES, CHANNELS = 2, 4, 12, 5
RUN = PATCHES // TOKENS


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"))


PROJECTED = noise(BATCH, TOKENS, CHANNELS, seed=1)
FEATURES = noise(BATCH, PATCHES, CHANNELS, seed=2)


def cosine(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def pairs(projected, features, mode):
    """Every (token, feature) that is compared, one by one, in float64."""
    projected, features = projected.double().numpy(), features.double().numpy()
    order = alignment._permutation(features.shape[1], torch.device("cpu")).tolist()
    run = features.shape[1] // projected.shape[1]
    for tokens, patches in zip(projected, features, strict=True):
        if mode == "global":
            yield sum(tokens) / len(tokens), sum(patches) / len(patches)
        for i, token in enumerate(tokens):
            mine = range(i * run, (i + 1) * run)
            if mode == "repeat":
                yield from ((token, patches[n]) for n in mine)
            elif mode == "avg_1d":
                yield token, sum(patches[n] for n in mine) / run
            elif mode == "avg_1d_shuffle":
                yield token, sum(patches[order[n]] for n in mine) / run


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_against_a_loop(mode):
    cosines = [cosine(token, feature) for token, feature in pairs(PROJECTED, FEATURES, mode)]
    assert len(cosines) == {"repeat": BATCH * PATCHES, "global": BATCH}.get(mode, BATCH * TOKENS)
    assert alignment_loss(PROJECTED, FEATURES, mode).item() == pytest.approx(-np.mean(cosines), abs=1e-6)
    for margin in (0.0, 0.5, 1.2):
        expected = np.mean([max(0.0, 1 - margin - c) for c in cosines])
        assert alignment_loss(PROJECTED, FEATURES, mode, margin).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_limits_of_each_mode(mode):
    same = noise(BATCH, 1, CHANNELS)
    tokens, patches = same.expand(-1, TOKENS, -1), 3 * same.expand(-1, PATCHES, -1)
    assert alignment_loss(tokens, patches, mode).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(-tokens, patches, mode).item() == pytest.approx(1, abs=1e-6)
    assert alignment_loss(tokens, patches, mode, 0.1).item() == 0
    assert alignment_loss(-tokens, patches, mode, 0.1).item() == pytest.approx(1.9, abs=1e-6)
    # cosines never exceed 1, so that without slack the margin only shifts the loss
    shifted = alignment_loss(PROJECTED, FEATURES, mode, 0.0) - 1
    torch.testing.assert_close(shifted, alignment_loss(PROJECTED, FEATURES, mode), atol=1e-6, rtol=0)


def test_the_default_is_the_released_codes():
    torch.testing.assert_close(alignment_loss(PROJECTED, FEATURES), alignment_loss(PROJECTED, FEATURES, "repeat", None))


def test_global_is_the_average_with_one_token():
    token = PROJECTED.mean(1, keepdim=True)
    expected = alignment_loss(token, FEATURES, "avg_1d")
    torch.testing.assert_close(alignment_loss(PROJECTED, FEATURES, "global"), expected)
    for other in (PATCHES, 5):  # any number of tokens
        tokens = token + noise(BATCH, other, CHANNELS) - noise(BATCH, other, CHANNELS).mean(1, keepdim=True)
        torch.testing.assert_close(alignment_loss(tokens, FEATURES, "global"), expected, atol=1e-5, rtol=0)


def test_averaging_equals_repeating_where_runs_are_constant_and_not_elsewhere():
    constant = FEATURES[:, ::RUN].repeat_interleave(RUN, dim=1)
    repeated, averaged = (alignment_loss(PROJECTED, constant, mode) for mode in ("repeat", "avg_1d"))
    torch.testing.assert_close(repeated, averaged, atol=1e-6, rtol=0)
    assert (alignment_loss(PROJECTED, FEATURES) - alignment_loss(PROJECTED, FEATURES, "avg_1d")).abs() > 0.01


def test_the_permutation_is_one_and_stays_the_same():
    order = alignment._permutation(256, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(256))
    assert (order[1:] - order[:-1] == 1).sum() < 10
    alignment._permutation.cache_clear()
    torch.manual_seed(5)
    assert torch.equal(alignment._permutation(256, torch.device("cpu")), order)
    undone = FEATURES[:, alignment._permutation(PATCHES, torch.device("cpu")).argsort()]
    torch.testing.assert_close(
        alignment_loss(PROJECTED, undone, "avg_1d_shuffle"), alignment_loss(PROJECTED, FEATURES, "avg_1d")
    )


@pytest.mark.parametrize("mode", [*MODES, "distance"])
def test_only_the_latents_learn_and_zeros_do_no_harm(mode):
    def loss(tokens, patches):
        return (
            distance_matrix_loss(tokens, patches, 0.0) if mode == "distance" else alignment_loss(tokens, patches, mode)
        )

    projected, features = PROJECTED.clone().requires_grad_(), FEATURES.clone().requires_grad_()
    loss(projected, features).backward()
    assert features.grad is None
    assert projected.grad.abs().max() > 0
    zeros = torch.zeros(BATCH, TOKENS, CHANNELS, requires_grad=True)
    found = loss(zeros, FEATURES)
    found.backward()
    assert torch.isfinite(zeros.grad).all()
    if mode != "distance":
        assert found.item() == alignment_loss(PROJECTED, torch.zeros_like(FEATURES), mode).item() == 0


def test_computes_in_float32_under_autocast():
    half, full = PROJECTED.bfloat16(), PROJECTED.bfloat16().float()
    for mode in MODES:
        expected = alignment_loss(full, FEATURES.bfloat16().float(), mode)
        with torch.autocast("cpu", torch.bfloat16):
            found = alignment_loss(half, FEATURES.bfloat16(), mode)
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    expected = distance_matrix_loss(full, FEATURES, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(distance_matrix_loss(half, FEATURES, 0.1), expected, atol=0, rtol=0)


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.9])
def test_distance_matrices_against_a_loop(margin):
    latents = noise(BATCH, TOKENS, 3, seed=4)
    terms = []
    for tokens, patches in zip(latents.double().numpy(), FEATURES.double().numpy(), strict=True):
        runs = [patches[i * RUN : (i + 1) * RUN].mean(0) for i in range(TOKENS)]
        for i in range(TOKENS):
            for j in range(TOKENS):
                difference = abs(cosine(tokens[i], tokens[j]) - cosine(runs[i], runs[j]))
                terms.append(max(0.0, difference - margin))
    assert len(terms) == BATCH * TOKENS**2
    assert distance_matrix_loss(latents, FEATURES, margin).item() == pytest.approx(np.mean(terms), abs=1e-6)


def test_latents_of_the_same_angles_have_no_distance():
    rotation, _ = torch.linalg.qr(noise(CHANNELS, CHANNELS))
    runs = FEATURES.unflatten(1, (TOKENS, RUN)).mean(2)
    lengths = noise(BATCH, TOKENS, 1).exp()
    assert distance_matrix_loss(lengths * runs @ rotation, FEATURES, 0.0).item() == pytest.approx(0, abs=1e-6)
    sheared = lengths * runs @ (rotation * torch.linspace(0.1, 3, CHANNELS))
    assert distance_matrix_loss(sheared, FEATURES, 0.0) > 0.05


def test_tokens_must_divide_patches():
    message = "the teacher has 12 patches, expected a multiple of the 5 latent tokens"
    for mode in ("repeat", "avg_1d", "avg_1d_shuffle"):
        check_alignment(mode, 12, 12)
        with pytest.raises(InputError, match=message):
            check_alignment(mode, 5, 12)
        with pytest.raises(InputError, match=message):
            alignment_loss(noise(1, 5, CHANNELS), FEATURES[:1], mode)
    with pytest.raises(InputError, match=message):
        distance_matrix_loss(noise(1, 5, 3), FEATURES[:1], 0.0)
    with pytest.raises(InputError, match="the teacher has 64 patches, expected a multiple of the 128 latent tokens"):
        check_alignment("repeat", 128, 64)
    check_alignment("global", 5, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, "teacher is '', expected the name of a timm model"),
        ({"weight": -0.1}, "weight is -0.1, expected 0 or more"),
        ({"weight": float("inf")}, "weight is inf"),
        ({"distance_weight": float("nan")}, "distance_weight is nan"),
        ({"hidden": 0}, "hidden is 0, expected 1 to 65536"),
        ({"cosine_margin": -0.5}, "cosine_margin is -0.5, expected 0 or more and less than 2"),
        ({"cosine_margin": float("nan")}, "cosine_margin is nan"),
        ({"distance_margin": 2.0}, "distance_margin is 2.0, expected 0 or more and less than 2"),
    ],
)
def test_configs_that_cannot_be_are_named(change, message):
    with pytest.raises(InputError, match=message):
        AlignmentConfig(**change)


def test_precision_follows_the_device_where_it_is_automatic():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    for precision, expected in {
        "auto": (torch.float32, torch.bfloat16),
        "bf16": (torch.bfloat16, torch.bfloat16),
        "fp32": (torch.float32, torch.float32),
    }.items():
        chosen = AlignmentConfig(precision=precision).precision
        assert (compute_dtype(chosen, cpu), compute_dtype(chosen, cuda)) == expected


def test_patch_features_are_the_last_map_in_raster_order():
    images = noise(2, 3, 32, 64).clamp(-1, 1).requires_grad_()
    backbone = load_backbone("resnet18", image_size=64, layers=(0, 3), pretrained=False)
    features = patch_features(backbone, images)
    last = backbone(images)[-1]
    assert features.shape == (2, 2 * 4, backbone.channels[-1])
    for row in range(2):
        for column in range(4):
            torch.testing.assert_close(features[:, 4 * row + column], last[:, :, row, column])
    assert not features.requires_grad
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=1)
    backbone = FrozenBackbone(vit, image_size=32)
    pixels = images[..., :32] * (0.5 / torch.tensor(vit.pretrained_cfg["std"]).view(3, 1, 1))
    assert torch.equal(backbone.shift, torch.zeros(3, 1, 1))  # this one takes pixels in [-1, 1]
    torch.testing.assert_close(patch_features(backbone, images[..., :32]), vit.forward_features(pixels)[:, 1:])


def test_latents_can_learn_what_the_teacher_sees():
    torch.manual_seed(0)
    target = noise(8, PATCHES, CHANNELS, seed=7).unflatten(1, (TOKENS, RUN)).mean(2).repeat_interleave(RUN, dim=1)
    latents = nn.Parameter(noise(8, TOKENS, 3, seed=8))
    projector = Projector(3, 64, CHANNELS)
    optimizer = torch.optim.Adam([latents, *projector.parameters()], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = alignment_loss(projector(latents), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < -0.98
