"""The distance of a frozen network's features, and its place among the losses of a tokenizer."""

from typing import Any

import pytest
import torch

from softvq.config import from_dict, to_dict
from softvq.errors import InputError
from softvq.losses.semantic import SemanticConfig, SemanticDistance
from softvq.training.tokenizer_recipe import TokenizerRunConfig, build_task
from softvq.training.tokenizer_task import LossConfig, TokenizerTask
from tests import family
from tests.test_tokenizer_task import Counted, Darker, batch

VIT: dict[str, Any] = {"backbone": "test_vit", "pretrained": False, "layers": (1, 2), "image_size": 32}
CNN: dict[str, Any] = {"backbone": "test_efficientnet", "pretrained": False, "layers": (1, 2)}


@pytest.fixture(params=[VIT, CNN], ids=["vit", "cnn"])
def distance(request: pytest.FixtureRequest) -> SemanticDistance:
    torch.manual_seed(0)
    return SemanticDistance(SemanticConfig(**request.param))


def test_it_is_one_minus_the_cosine_of_each_place(distance: SemanticDistance) -> None:
    images, targets = (batch(3, 32).images for _ in range(2))
    expected = []
    for a, b in zip(distance.backbone(images), distance.backbone(targets), strict=True):
        cosines = torch.cosine_similarity(a.double(), b.double(), dim=1)
        expected.append(1 - cosines.flatten(1).mean(1))
    torch.testing.assert_close(distance(images, targets).double(), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-6)


def test_a_picture_is_no_distance_from_itself_and_only_the_first_gets_a_gradient(distance: SemanticDistance) -> None:
    images, targets = (batch(2, 32).images.requires_grad_() for _ in range(2))
    assert distance(images, images.detach()).abs().max() < 1e-5
    distance(images, targets).sum().backward()
    assert targets.grad is None
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    assert not [p for p in distance.parameters() if p.requires_grad]


def task(**loss: Any) -> TokenizerTask:
    config = LossConfig(semantic=SemanticConfig(weight=3.0, **CNN), **loss)
    assert config.semantic is not None
    torch.manual_seed(0)
    return TokenizerTask(Darker(), config, perceptual=Counted(), semantic=SemanticDistance(config.semantic))


def test_it_is_weighted_beside_the_perceptual_distance_and_scheduled_with_it() -> None:
    one = batch(2)
    schedule = {"perceptual_weight": 0.5, "perceptual_start": 2, "perceptual_warmup_steps": 2}
    plain = TokenizerTask(Darker(), LossConfig(**schedule), perceptual=Counted())
    ours = task(**schedule)
    assert "semantic" not in ours(one, 1)[1]
    for step, weight in ((3, 0.25), (9, 0.5)):
        loss, report, _ = ours(one, step)
        expected = plain(one, step)[0] + weight * 3.0 * report["semantic"]
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_tokenizer_learns_from_it() -> None:
    one = batch(2)
    slopes = {}
    for name, made in {
        "with": task(perceptual_warmup_steps=0),
        "without": TokenizerTask(Darker(), LossConfig(perceptual_warmup_steps=0), perceptual=Counted()),
    }.items():
        made(one, 0)[0].backward()
        assert isinstance(made.tokenizer, Darker)
        assert made.tokenizer.amount.grad is not None
        slopes[name] = float(made.tokenizer.amount.grad)
    pixels = (one.images - 0.5).requires_grad_()
    (slope,) = torch.autograd.grad(task().semantic(pixels, one.images).mean(), pixels)
    assert slopes["with"] - slopes["without"] == pytest.approx(-3.0 * float(slope.sum()), rel=1e-3)


def with_semantic(**fields: Any) -> TokenizerRunConfig:
    data = to_dict(family.recipe(family.SOFT))
    data["loss"] |= {"perceptual_weight": 1.0, "semantic": {**CNN, **fields}}
    return from_dict(TokenizerRunConfig, data)


def test_a_recipe_builds_it_and_what_cannot_be_is_refused() -> None:
    made = build_task(with_semantic(layers=[1]), torch.device("cpu"))
    assert made.semantic is not None
    assert made.semantic.backbone.layers == (1,)
    with pytest.raises(InputError, match="perceptual_weight is 0"):
        LossConfig(perceptual_weight=0.0, semantic=SemanticConfig(**CNN))
    with pytest.raises(InputError, match="weight is 0"):
        SemanticConfig(weight=0.0)
    with pytest.raises(InputError, match="layers is empty"):
        SemanticConfig(layers=())
    with pytest.raises(InputError, match=r"loss\.semantic: layers is \(9,\)"):
        build_task(with_semantic(layers=[9]), torch.device("cpu"))
