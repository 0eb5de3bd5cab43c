"""Sampling shows every step, ends where the last one pointed, and is not changed by being watched."""

import pytest
import torch
from torch import Tensor

from tests.generators import KINDS, QUICK, build


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_shown_once(kind: str) -> None:
    generator, seen = build(kind), list[tuple[int, Tensor]]()
    condition, keys = torch.tensor([0, 2]), torch.tensor([5, 6])
    latents = generator.sample(condition, keys, watch=lambda step, shown: seen.append((step, shown.clone())))
    assert torch.equal(latents, generator.sample(condition, keys))
    assert [step for step, _ in seen] == list(range(1, QUICK[kind]["steps"] + 1))
    torch.testing.assert_close(seen[-1][1], latents)  # the last step leads to what is predicted
    assert not torch.allclose(seen[0][1], latents)


def test_what_a_watcher_raises_ends_it() -> None:
    def stop(step: int, shown: Tensor) -> None:
        raise InterruptedError(step)

    with pytest.raises(InterruptedError, match="1"):
        build("sit").sample(torch.tensor([0]), torch.tensor([5]), watch=stop)
