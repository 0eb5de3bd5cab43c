import pytest
import torch
from torch import Tensor, nn

from softvq.errors import InputError
from softvq.evaluation.probing import (
    Labelled,
    evenly,
    generator_features,
    held_back,
    keys_of_names,
    knn_classes,
    parse_features,
    probe_classes,
    tokenizer_features,
)
from softvq.randomness import fold_in, normal
from softvq.tokenizers.autoencoder import ImageTokenizer
from tests.generators import build
from tests.program import DIM, MODEL, SIZE, TOKENS

CLASSES = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(count: int, apart: float, seed: int = 0, name: str = "a") -> Labelled:
    """Return clouds of deviation 1 around corners that are `apart` from the origin."""
    labels = torch.arange(count) % CLASSES
    centres = apart * nn.functional.one_hot(labels, 6).double()
    names = [f"{name}{i}" for i in range(count)]
    return Labelled(features=centres + random(count, 6, seed=seed), labels=labels, keys=keys_of_names(names))


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not() -> None:
    train, val = samples(200, 12.0), samples(120, 12.0, seed=1, name="b")
    found = probe_classes(train, val, CLASSES)
    assert (found.linear.correct, found.linear.total, found.knn.accuracy) == (120, 120, 1.0)
    assert found.majority.accuracy == 0.25
    assert torch.equal(found.confusion, 30 * torch.eye(CLASSES, dtype=torch.int64))
    assert found.l2 == 1.0  # all do equally well, so the strongest penalty is taken
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    shuffled = Labelled(features=train.features, labels=train.labels[order], keys=train.keys)
    found = probe_classes(shuffled, val, CLASSES)
    for score in (found.linear, found.knn):
        low, high = score.as_dict()["interval_95"]
        assert score.accuracy < 0.5
        assert low < score.accuracy < high


def test_the_confusion_has_a_row_for_each_true_class() -> None:
    train, val = samples(60, 12.0), samples(24, 12.0, seed=1, name="b")
    moved = val.labels.clone()
    moved[val.labels == 2] = 3  # what looks like class 2 is said to be 3
    found = probe_classes(train, Labelled(features=val.features, labels=moved, keys=val.keys), CLASSES)
    expected = torch.tensor([[6, 0, 0, 0], [0, 6, 0, 0], [0, 0, 0, 0], [0, 0, 6, 6]])
    assert torch.equal(found.confusion, expected)
    assert found.linear.correct == 18
    assert "confusion" not in found.as_dict()


def test_the_penalty_is_chosen_on_what_was_held_back() -> None:
    train, val = samples(60, 1.0), samples(60, 1.0, seed=1, name="b")
    found = probe_classes(train, val, CLASSES, strengths=(1e-6, 0.1, 30.0))
    assert found.sweep[found.l2] == max(found.sweep.values())
    assert list(found.as_dict()["sweep"][0]) == ["l2", "held_back_accuracy"]
    other = Labelled(features=random(60, 6, seed=9), labels=val.labels, keys=val.keys)
    assert probe_classes(train, other, CLASSES, strengths=(1e-6, 0.1, 30.0)).sweep == found.sweep  # val has no say


def test_the_order_of_samples_does_not_matter() -> None:
    train, val = samples(80, 1.5), samples(50, 1.5, seed=1, name="b")
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    mixed = Labelled(features=train.features[order], labels=train.labels[order], keys=train.keys[order])
    first, second = probe_classes(train, val, CLASSES), probe_classes(mixed, val, CLASSES)
    assert (first.linear, first.knn, first.sweep) == (second.linear, second.knn, second.sweep)
    assert torch.equal(held_back(train.labels, train.keys)[order], held_back(mixed.labels, mixed.keys))


def test_a_fifth_of_every_class_is_held_back() -> None:
    labels = torch.tensor([0] * 21 + [1] * 6 + [2] * 2 + [3])
    away = held_back(labels, keys_of_names([str(i) for i in range(30)]))
    assert labels[away].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    assert not torch.equal(away, held_back(labels, keys_of_names([str(i) for i in range(30)], seed=1)))


@pytest.mark.parametrize("count", [1, 5, 30])
def test_votes_are_what_every_pair_gives(count: int) -> None:
    train, val = samples(30, 1.0), samples(17, 1.0, seed=1)
    found = knn_classes(train.features, train.labels, val.features, CLASSES, count=count)
    cosines = nn.functional.normalize(val.features) @ nn.functional.normalize(train.features).mT
    for row, label in zip(cosines, found.tolist(), strict=True):
        best = row.argsort(descending=True)[:count]
        votes = [sum(float((row[i] / 0.07).exp()) for i in best if train.labels[i] == c) for c in range(CLASSES)]
        assert label == votes.index(max(votes))


def test_near_neighbours_outvote_many_far_ones() -> None:
    references = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]], dtype=torch.float64)
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert knn_classes(references, labels, query, 2, count=3).tolist() == [0]
    assert knn_classes(references, labels, query, 2, count=3, temperature=10.0).tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_classes": 1}, ["1 class", "at least 2"]),
        ({"neighbours": 9}, ["knn is 9", "8 training"]),
        ({"val": samples(0, 1.0)}, ["at least 1 photograph"]),
        ({"train": samples(4, 1.0), "neighbours": 1}, ["every class has one", "too few"]),
    ],
)
def test_what_cannot_be_probed_is_refused(changes: dict, names: list[str]) -> None:
    given = {"train": samples(8, 1.0), "val": samples(8, 1.0), "num_classes": CLASSES, "neighbours": 3, **changes}
    with pytest.raises(InputError) as error:
        probe_classes(**given)
    assert not [name for name in names if name not in str(error.value)], str(error.value)


def test_what_is_taken_lies_evenly() -> None:
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(10, 5) == [1, 3, 5, 7, 9]
    assert evenly(7, 3) == [1, 3, 5]
    assert len(set(evenly(4097, 2048))) == 2048


def test_features_are_named() -> None:
    assert parse_features("encoder") == ("encoder", None)
    assert parse_features("generator:12") == ("generator", 12)
    for text in ("generator", "generator:", "generator:-1", "latents:3", "pixels", "generator:1:2"):
        with pytest.raises(InputError, match="expected latents-pooled, latents, encoder or generator:LAYER"):
            parse_features(text)


def tokenizer() -> ImageTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTokenizer(MODEL).eval()


def test_features_of_a_tokenizer() -> None:
    model, images = tokenizer(), random(5, 3, SIZE, SIZE).float().clamp(-1, 1)
    with torch.no_grad():
        latents, tokens = model.encode(images).double(), model.encoder(images).double()
    for kind, expected in (
        ("latents", latents.reshape(5, -1)),
        ("latents-pooled", latents.mean(1)),
        ("encoder", tokens.mean(1)),
    ):
        found = tokenizer_features(model, images, kind)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(tokenizer_features(model, images[3:], kind), found[3:], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="kind is 'pixels'"):
        tokenizer_features(model, images, "pixels")


@pytest.mark.parametrize("kind", ["sit", "dit", "mar"])
def test_features_of_a_generator_do_not_depend_on_the_batch(kind: str) -> None:
    model, latents = build(kind), random(5, TOKENS, DIM).float()
    keys = keys_of_names([str(i) for i in range(5)])
    found = [generator_features(model, latents, layer, keys) for layer in (0, 1)]
    assert found[0].shape == (5, 16)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(generator_features(model, latents[2:4], 1, keys[2:4]), found[1][2:4], atol=1e-5, rtol=0)
    hooks = [module for module in model.modules() if module._forward_hooks]
    assert not hooks


def test_features_of_a_transformer_are_those_of_its_block() -> None:
    model, latents = build("sit"), random(3, TOKENS, DIM).float()
    keys, network = keys_of_names(["a", "b", "c"]), model.network
    null, noise = torch.ones(3, dtype=torch.bool), normal(fold_in(keys, 2), TOKENS, DIM)
    time = torch.full((3,), 0.4)
    with torch.no_grad():
        tokens = network.to_tokens(0.6 * latents + 0.4 * noise) + network.positions
        vector = nn.functional.silu(network.time_embedding(time) + network.condition(torch.zeros(3).long(), null))
        expected = network.blocks[0](tokens, vector).double().mean(1)
    torch.testing.assert_close(generator_features(model, latents, 0, keys, time=0.4), expected, atol=1e-5, rtol=1e-5)
    clean = generator_features(model, latents, 0, keys, time=0.0)
    torch.testing.assert_close(clean, generator_features(model, latents, 0, keys + 1, time=0.0), atol=0, rtol=0)
    assert not torch.allclose(clean, expected)


@pytest.mark.parametrize(
    ("changes", "arguments", "names"),
    [
        ({}, {"layer": 2}, ["layer is 2", "0 to 1"]),
        ({}, {"layer": -1}, ["layer is -1"]),
        ({}, {"time": 1.5}, ["time is 1.5"]),
        ({}, {"latents": torch.zeros(2, TOKENS + 1, DIM)}, [f"[{TOKENS + 1}, {DIM}]", f"[{TOKENS}, {DIM}]"]),
        ({"label_dropout": 0.0}, {}, ["label_dropout is 0"]),
    ],
)
def test_what_a_generator_cannot_do_is_refused(changes: dict, arguments: dict, names: list[str]) -> None:
    given = {"latents": torch.zeros(2, TOKENS, DIM), "layer": 0, "keys": torch.arange(2), **arguments}
    with pytest.raises(InputError) as error:
        generator_features(build("sit", **changes), **given)
    assert not [name for name in names if name not in str(error.value)], str(error.value)


@pytest.mark.parametrize("condition", ["none", "embedding"])
def test_other_conditions_can_be_hidden_too(condition: str) -> None:
    model = build("sit", condition=condition, condition_dim=5)
    found = generator_features(model, random(2, TOKENS, DIM).float(), 0, torch.arange(2))
    assert bool(found.isfinite().all())
