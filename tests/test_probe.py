import math

import numpy as np
import pytest
import torch
from torch import Tensor

from softvq.errors import InputError
from softvq.evaluation.probe import accuracy, fit_probe, wilson_interval


def blobs(count: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return samples around the corners of a triangle, on axes of very different scales, and a constant feature."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    places = corners[labels] + spread * torch.randn(count, 2, generator=generator)
    return torch.cat([places * torch.tensor([1000.0, 0.01]) + 5, torch.full((count, 1), 7.0)], 1), labels


def newton(inputs: np.ndarray, labels: np.ndarray, num_classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimise the same sum by Newton's method; the biases, which are free up to a constant, end with a mean of 0."""
    count, dim = inputs.shape
    extended = np.concatenate([inputs, np.ones((count, 1))], 1)
    weights = np.zeros((num_classes, dim + 1))
    penalty = l2 * np.tile(np.append(np.ones(dim), 0.0), num_classes)
    hits = np.eye(num_classes)[labels]
    for _ in range(30):
        logits = extended @ weights.T
        chances = np.exp(logits - logits.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        gradient = ((chances - hits).T @ extended / count).ravel() + penalty * weights.ravel()
        curvature = chances[:, :, None] * (np.eye(num_classes) - chances[:, None, :])
        hessian = np.einsum("nab,ni,nj->aibj", curvature, extended, extended).reshape(len(penalty), -1) / count
        weights -= (np.linalg.pinv(hessian + np.diag(penalty), rcond=1e-12) @ gradient).reshape(weights.shape)
    return weights[:, :-1], weights[:, -1] - weights[:, -1].mean()


def test_blobs_far_apart_are_told_apart() -> None:
    features, labels = blobs(300, 0.1)
    probe = fit_probe(features, labels, 3)
    assert accuracy(probe, *blobs(300, 0.1, seed=1)) == 1.0
    assert accuracy(probe, features, (labels + 1) % 3) == 0.0
    assert probe.scale[2] == 1
    assert torch.equal(probe.weight[:, 2], torch.zeros(3, dtype=torch.float64))


def test_it_is_what_newtons_method_finds() -> None:
    features, labels = blobs(200, 0.7)
    probe = fit_probe(features[:, :2], labels, 3, l2=0.01, tolerance=1e-10)
    assert probe.gradient < 1e-9
    inputs = ((features[:, :2].double() - probe.mean) / probe.scale).numpy()
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(inputs.std(0), 1, rtol=1e-9)
    weight, bias = newton(inputs, labels.numpy(), 3, 0.01)
    np.testing.assert_allclose(probe.weight, weight, atol=1e-6)
    np.testing.assert_allclose(probe.bias - probe.bias.mean(), bias, atol=1e-6)


def test_the_gradient_at_the_end_is_that_of_the_sum() -> None:
    features, labels = blobs(90, 0.7)
    probe = fit_probe(features, labels, 3, max_iterations=3)
    hits = torch.nn.functional.one_hot(labels, 3)
    error = (probe.logits(features).softmax(1) - hits) / 90
    inputs = (features - probe.mean) / probe.scale
    weight = (error.T @ inputs + 1e-3 * probe.weight).abs().max()
    assert probe.gradient == pytest.approx(float(torch.maximum(weight, error.sum(0).abs().max())), rel=1e-9)
    assert probe.gradient > 1e-6  # as it was stopped


def test_it_is_a_function_of_the_data_whatever_their_scale() -> None:
    features, labels = blobs(120, 0.5)
    one, again = fit_probe(features, labels, 3), fit_probe(features, labels, 3)
    assert torch.equal(one.weight, again.weight)
    with torch.no_grad():
        scaled = fit_probe(features.double() * 64 - 3, labels, 3)
    torch.testing.assert_close(one.logits(features), scaled.logits(features.double() * 64 - 3), rtol=1e-3, atol=1e-4)
    single = fit_probe(features, labels, 3, dtype=torch.float32, tolerance=1e-5)
    assert single.weight.dtype == torch.float32
    torch.testing.assert_close(single.weight.double(), one.weight, rtol=1e-2, atol=1e-2)


def test_a_class_without_samples_is_never_likeliest() -> None:
    features, labels = blobs(120, 0.1)
    probe = fit_probe(features, labels, 4)
    assert accuracy(probe, features, labels) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1, expected at least 2"),
        ({"num_classes": 2}, "labels go from 0 to 2, expected 0 to 1"),
        ({"labels": torch.arange(9) - 1}, "labels go from -1 to 7"),
        ({"features": torch.full((9, 2), math.nan)}, "features holds values that are not finite"),
        ({"features": torch.zeros(0, 2), "labels": torch.zeros(0, dtype=torch.int64)}, "features has 0 samples"),
        ({"l2": 0.0}, r"l2 is 0\.0, expected a positive number"),
        ({"max_iterations": 0}, "max_iterations is 0, expected at least 1"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    given = {"features": torch.rand(9, 2), "labels": torch.arange(9) % 3, "num_classes": 3, **change}
    with pytest.raises(InputError, match=message):
        fit_probe(given.pop("features"), given.pop("labels"), given.pop("num_classes"), **given)


def test_accuracy_needs_samples() -> None:
    features, labels = blobs(30, 0.1)
    with pytest.raises(InputError, match="features has 0 samples"):
        accuracy(fit_probe(features, labels, 3), features[:0], labels[:0])


def test_wilsons_interval() -> None:
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))
    for end in (low, high):  # where the score test just rejects
        assert abs(0.8 - end) / math.sqrt(end * (1 - end) / 10) == pytest.approx(1.959964)
    assert wilson_interval(0, 10) == (0.0, pytest.approx(1.959964**2 / (10 + 1.959964**2)))
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(500, 1000, z=1.0)[1] == pytest.approx(0.5 + math.sqrt(0.25 / 1001), rel=1e-9)
    for correct, total in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(InputError, match=f"correct is {correct} of {total}"):
            wilson_interval(correct, total)
