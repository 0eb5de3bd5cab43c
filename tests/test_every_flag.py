"""Every flag on at once: numbers stay finite, and a poisoned batch leaves the weights alone."""

import dataclasses
from pathlib import Path

import jaxtyping
import pytest
import torch

from softvq.errors import RunError
from tests import family

STRESS = {  # what float16 could still hold or just not
    "black": lambda images: torch.full_like(images, -1.0),
    "equal": lambda images: torch.full_like(images, 0.3),
    "tiny": lambda images: images * 6e-8,
    "huge": lambda images: images * 6e4,
    "one pixel": lambda images: torch.zeros_like(images).index_fill(3, torch.tensor([5]), 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softvq", "residual-product"])
def test_two_hundred_updates_stay_finite_under_bf16_and_stress(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = family.recipe(family.QUANTIZERS[name], every_flag=True, precision="bf16", steps=200, batch_size=4)
    ours = family.trainer(config, tmp_path)
    kinds = list(STRESS.values())
    for step in range(200):
        if step == 4 * len(kinds):  # every kind was there once: no shape of what follows is new
            monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        batch = family.pictures(config, step)
        if step % 4 == 3:
            batch = dataclasses.replace(batch, images=kinds[step // 4 % len(kinds)](batch.images))
        report = ours.update(batch)
        ours.step = step + 1
        wrong = [key for key, value in report.items() if not value.isfinite()]
        assert not wrong, (step, wrong)
    ours.check_finite()
    assert all(value.isfinite().all() for value in ours.state().values())
    assert {"adversarial", "alignment", "distance_matrix", "features", "consistency", "lecam"} <= report.keys()


@pytest.mark.parametrize("name", sorted(family.QUANTIZERS))
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_batch_changes_nothing(name: str, poison: float, tmp_path: Path) -> None:
    config = family.recipe(family.QUANTIZERS[name], every_flag=name in {"softvq", "kl"})
    ours = family.trainer(config, tmp_path)
    for step in range(3):
        ours.update(family.pictures(config, step))
        ours.step = step + 1
    before = {key: value.clone() for key, value in ours.state().items()}
    batch = family.pictures(config, 3)
    batch.images[2, 1, 7, 9] = poison
    ours.update(batch)
    after = ours.state()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    # the averages follow unchanged weights, and the power iteration unchanged matrices
    assert all(key.startswith("ema.") or key.endswith((".left", ".right")) for key in changed)
    assert all(value.isfinite().all() for value in after.values())
    with pytest.raises(RunError, match="step 4: the loss or its gradient is not finite, on samples 24 to 31"):
        ours.check_finite()


@pytest.mark.parametrize("name", sorted(family.QUANTIZERS))
@pytest.mark.parametrize("kind", ["black", "equal"])
def test_a_batch_of_one_colour_is_learned_from_like_any_other(name: str, kind: str, tmp_path: Path) -> None:
    config = family.recipe(family.QUANTIZERS[name], every_flag=name in {"softvq", "kl"})
    ours = family.trainer(config, tmp_path)
    for step in range(3):
        batch = family.pictures(config, step)
        ours.update(dataclasses.replace(batch, images=STRESS[kind](batch.images)))
        ours.step = step + 1
    ours.check_finite()
    assert all(value.isfinite().all() for value in ours.state().values())
